package state

import (
	"maps"
	"slices"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
)

// affects notes whose discovery chains an entry has a part in: its own service's,
// and those of all services that lead to it, directly or not. A proxy-defaults
// entry has a part in all.
func (w *writer) affects(kind, name string) {
	switch kind {
	case configentry.ProxyDefaults:
		for _, k := range []string{configentry.ServiceRouter, configentry.ServiceSplitter, configentry.ServiceResolver} {
			for r := range under[*configRow](w.Txn, nil, tableConfigEntries, k) {
				w.chains[fold(r.name)] = r.name
			}
		}
	case configentry.ServiceDefaults, configentry.ServiceRouter, configentry.ServiceSplitter, configentry.ServiceResolver:
		w.affectsChain(name)
	}
}

func (w *writer) affectsChain(name string) {
	if _, seen := w.chains[fold(name)]; seen {
		return
	}
	w.chains[fold(name)] = name
	for r := range each[*configRow](w.Txn, nil, tableConfigEntries, byLink, name) {
		w.affectsChain(r.name)
	}
}

// graphDatacenter and graphTrustDomain stand in for the real ones, which whether a
// chain makes sense does not depend on.
const (
	graphDatacenter  = "dc1"
	graphTrustDomain = "11111111-2222-3333-4444-555555555555.consul"
)

// checkChains compiles the chains that the writes had a part in, as they would be
// after them.
func (w *writer) checkChains() error {
	get := func(kind, name string) (configentry.Entry, error) {
		if r := first[*configRow](w.Txn, nil, tableConfigEntries, byID, kind, name); r != nil {
			return r.entry, nil
		}
		return nil, nil
	}
	for _, folded := range slices.Sorted(maps.Keys(w.chains)) {
		var service catalog.ServiceName
		if err := service.UnmarshalText([]byte(w.chains[folded])); err != nil {
			return err
		}
		_, err := configentry.Compile(get, configentry.CompileRequest{
			Service: service, EvaluateInDatacenter: graphDatacenter, TrustDomain: graphTrustDomain,
		})
		if err != nil {
			return err
		}
	}
	return nil
}
