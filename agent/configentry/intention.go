package configentry

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// Wildcard stands for every service, as the source or destination of an
// intention.
const Wildcard = "*"

// Precedence returns how an intention ranks: an exact destination before a
// wildcard one, then an exact source before a wildcard one.
func Precedence(source, destination string) int {
	switch {
	case destination != Wildcard && source != Wildcard:
		return 9
	case destination != Wildcard:
		return 8
	case source != Wildcard:
		return 6
	default:
		return 5
	}
}

// IntentionsOf returns the intentions that an entry holds, in its order.
func IntentionsOf(e *api.ServiceIntentionsConfigEntry) []*Intention {
	if e == nil {
		return nil
	}
	out := make([]*Intention, 0, len(e.Sources))
	for _, s := range e.Sources {
		if s == nil {
			continue
		}
		in := &Intention{
			ID:                  s.LegacyID,
			Description:         s.Description,
			SourceNS:            defaulted(s.Namespace),
			SourceName:          s.Name,
			SourcePartition:     s.Partition,
			SourcePeer:          s.Peer,
			SourceSamenessGroup: s.SamenessGroup,
			SourceType:          api.IntentionSourceConsul,
			DestinationNS:       defaulted(e.Namespace),
			DestinationName:     e.Name,
			Action:              s.Action,
			Permissions:         s.Permissions,
			Meta:                e.Meta,
			Precedence:          Precedence(s.Name, e.Name),
			CreateIndex:         e.CreateIndex,
			ModifyIndex:         e.ModifyIndex,
		}
		if s.LegacyID != "" {
			in.Meta = s.LegacyMeta
		}
		out = append(out, in)
	}
	return out
}

func defaulted(tenancy string) string {
	if tenancy == "" {
		return catalog.DefaultTenancy
	}
	return tenancy
}

// SortIntentions orders by descending precedence, then by names, so that the
// result does not depend on the order of the entries.
func SortIntentions(in []*Intention) {
	slices.SortStableFunc(in, func(a, b *Intention) int {
		return cmp.Or(
			cmp.Compare(b.Precedence, a.Precedence),
			cmp.Compare(a.DestinationName, b.DestinationName),
			cmp.Compare(a.SourceName, b.SourceName),
			cmp.Compare(a.SourcePeer, b.SourcePeer),
		)
	})
}

// IntentionsFor returns the intentions that apply to a destination, those of the
// wildcard destination included, highest precedence first.
func IntentionsFor(get Get, destination catalog.ServiceName) ([]*Intention, error) {
	names := []string{destination.Name}
	if destination.Name != Wildcard {
		names = append(names, Wildcard)
	}
	out := []*Intention{}
	for _, name := range names {
		e, err := lookup[*api.ServiceIntentionsConfigEntry](get, ServiceIntentions, name)
		if err != nil {
			return nil, err
		}
		out = append(out, IntentionsOf(e)...)
	}
	SortIntentions(out)
	return out, nil
}

// MatchSource returns the intentions of entries that a source is subject to,
// wildcard sources included, highest precedence first. Entries of other kinds
// are passed over.
func MatchSource(entries []Entry, source catalog.ServiceName) []*Intention {
	out := []*Intention{}
	for _, e := range entries {
		if si, ok := e.(*api.ServiceIntentionsConfigEntry); ok {
			for _, in := range IntentionsOf(si) {
				if matchesSource(in, source.Canonical()) {
					out = append(out, in)
				}
			}
		}
	}
	SortIntentions(out)
	return out
}

func matchesSource(in *Intention, source catalog.ServiceName) bool {
	if in.SourcePeer != "" || in.SourceSamenessGroup != "" {
		return false // never a service of this cluster
	}
	return (in.SourceName == Wildcard || in.SourceName == source.Name) &&
		(in.SourceNS == Wildcard || defaulted(in.SourceNS) == source.Namespace) &&
		defaulted(in.SourcePartition) == source.Partition
}

// Decide says whether source may open a connection, and by which intention: the
// first of intentions, which are sorted, that names it. None means the default.
//
// A connection is opened before any request is seen, so an intention with
// permissions, which admit some requests only, does not allow one.
func Decide(intentions []*Intention, source catalog.ServiceName, defaultAllow bool) (allow bool, why *Intention) {
	source = source.Canonical()
	for _, in := range intentions {
		if matchesSource(in, source) {
			return len(in.Permissions) == 0 && in.Action == api.IntentionActionAllow, in
		}
	}
	return defaultAllow, nil
}

// lookup reads an entry as its type; the zero T where there is none.
func lookup[T Entry](get Get, kind, name string) (T, error) {
	var zero T
	e, err := get(kind, name)
	if err != nil {
		return zero, fmt.Errorf("read %s %q: %w", kind, name, err)
	}
	if e == nil {
		return zero, nil
	}
	t, ok := e.(T)
	if !ok {
		return zero, fmt.Errorf("read %s %q: got a %T", kind, name, e)
	}
	return t, nil
}
