package sni

import (
	"hash/maphash"
	"maps"
	"math/bits"
	"strings"

	"github.com/sluicemesh/sluice/gateway"
)

// index finds the cluster of a server name. It is immutable: a change makes
// another index, which shares the large part with the one before.
type index struct {
	exact, suffix *names
}

// lookup returns the cluster of a lower-case server name: by its exact name, or
// by the longest suffix that one or more labels precede. It allocates nothing.
func (x *index) lookup(name []byte) *cluster {
	if x == nil {
		return nil
	}
	if c := x.exact.get(name); c != nil {
		return c
	}
	if x.suffix.size == 0 {
		return nil
	}
	for i, c := range name {
		if c == '.' {
			if cl := x.suffix.get(name[i+1:]); cl != nil {
				return cl
			}
		}
	}
	return nil
}

// names maps names to clusters: a large base, which several generations of the
// index share, and the few names that differ from it.
type names struct {
	base *nameTable
	// over overrides the base; nil stands for a name that is gone.
	over map[string]*cluster
	size int
}

func (n *names) get(name []byte) *cluster {
	if len(n.over) > 0 {
		if c, ok := n.over[string(name)]; ok {
			return c
		}
	}
	return n.base.get(name)
}

// nameTable is a hash table with open addressing: 4 bytes a slot, at most half
// full, and 24 bytes a name. A Go map of the same takes twice the memory.
type nameTable struct {
	seed    maphash.Seed
	mask    uint64
	slots   []uint32 // index into entries, plus one
	entries []nameEntry
}

type nameEntry struct {
	name string
	c    *cluster
}

// newNameTable takes ownership of entries, whose names differ from one another.
func newNameTable(entries []nameEntry) *nameTable {
	size := 8
	if n := len(entries); n > 4 {
		size = 1 << bits.Len(uint(2*n-1))
	}
	t := &nameTable{seed: maphash.MakeSeed(), mask: uint64(size - 1), slots: make([]uint32, size), entries: entries}
	for i := range entries {
		at := maphash.String(t.seed, entries[i].name) & t.mask
		for t.slots[at] != 0 {
			at = (at + 1) & t.mask
		}
		t.slots[at] = uint32(i + 1)
	}
	return t
}

func (t *nameTable) get(name []byte) *cluster {
	if t == nil {
		return nil
	}
	for at := maphash.Bytes(t.seed, name) & t.mask; ; at = (at + 1) & t.mask {
		s := t.slots[at]
		if s == 0 {
			return nil
		}
		if e := &t.entries[s-1]; e.name == string(name) {
			return e.c
		}
	}
}

// update returns names for want. Where want differs from n in little, the base
// is kept, and the cost of the change is that of comparing.
func (n *names) update(want []nameEntry) *names {
	if n != nil {
		if m := n.patch(want); m != nil {
			return m
		}
	}
	return &names{base: newNameTable(want), size: len(want)}
}

func (n *names) patch(want []nameEntry) *names {
	most := max(64, len(want)/16)
	over := maps.Clone(n.over)
	if over == nil {
		over = map[string]*cluster{}
	}
	changed := false
	kept := 0 // names of want that n has too, whatever their cluster
	for _, e := range want {
		// The conversion does not copy: get keeps no reference to its argument.
		had := n.getString(e.name)
		if had != nil {
			kept++
		}
		if had != e.c {
			over[e.name] = e.c
			changed = true
			if len(over) > most {
				return nil
			}
		}
	}
	if kept < n.size {
		wanted := make(map[string]struct{}, len(want))
		for _, e := range want {
			wanted[e.name] = struct{}{}
		}
		drop := func(name string) bool {
			if _, ok := wanted[name]; !ok {
				over[name] = nil
				changed = true
			}
			return len(over) <= most
		}
		for _, e := range n.base.entries {
			if !drop(e.name) {
				return nil
			}
		}
		for name := range n.over {
			if !drop(name) {
				return nil
			}
		}
	}
	if !changed {
		return n
	}
	return &names{base: n.base, over: over, size: len(want)}
}

func (n *names) getString(name string) *cluster {
	if c, ok := n.over[name]; ok {
		return c
	}
	t := n.base
	if t == nil {
		return nil
	}
	for at := maphash.String(t.seed, name) & t.mask; ; at = (at + 1) & t.mask {
		s := t.slots[at]
		if s == 0 {
			return nil
		}
		if e := &t.entries[s-1]; e.name == name {
			return e.c
		}
	}
}

// newIndex makes the index of routes, reusing what it can of old, which may be
// nil. A route to a cluster that the table does not have is left out and
// returned in dangling.
func newIndex(old *index, routes []gateway.Route, clusters map[string]*cluster) (x *index, dangling []string) {
	wild := 0
	for i := range routes {
		if strings.HasPrefix(routes[i].Match, "*.") {
			wild++
		}
	}
	exact := make([]nameEntry, 0, len(routes)-wild)
	suffix := make([]nameEntry, 0, wild)
	last := ""
	for i := range routes {
		r := &routes[i]
		c := clusters[r.Cluster]
		name := strings.ToLower(r.Match)
		if c == nil {
			dangling = append(dangling, name)
			continue
		}
		if i > 0 && name == last {
			continue // sorted, so that equal names follow each other; the first wins
		}
		last = name
		if s, ok := strings.CutPrefix(name, "*."); ok {
			suffix = append(suffix, nameEntry{s, c})
		} else {
			exact = append(exact, nameEntry{name, c})
		}
	}
	var oe, os *names
	if old != nil {
		oe, os = old.exact, old.suffix
	}
	return &index{exact: oe.update(exact), suffix: os.update(suffix)}, dangling
}
