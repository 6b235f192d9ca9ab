package config

import (
	"fmt"
	"strconv"
)

// Pos is where a value was written. Line and Column count from 1, columns in
// characters; both are 0 where the source has no lines, as a flag.
type Pos struct {
	File         string
	Line, Column int
}

// String returns file:line:column, as far as it is known.
func (p Pos) String() string {
	if p.Line == 0 {
		return p.File
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
}

type nodeKind uint8

const (
	scalarNode nodeKind = iota
	mapNode
	listNode
)

// node is one value of a source, whatever the format it was written in.
type node struct {
	pos  Pos
	kind nodeKind
	// scalar is a string, int64, float64, bool or nil.
	scalar any
	list   []*node
	// entries keep the order of the source. A key may come more than once, as a
	// repeated block does.
	entries []entry
}

type entry struct {
	key   string
	pos   Pos
	value *node
}

// maxDepth bounds the nesting of a source, and maxNodes how large the aliases of
// a YAML file may make it, so that a hostile file costs an error and no more.
const (
	maxDepth = 200
	maxNodes = 1 << 20
)

// describe names n for an error text.
func (n *node) describe() string {
	switch n.kind {
	case mapNode:
		return "a block"
	case listNode:
		return "a list"
	}
	switch v := n.scalar.(type) {
	case nil:
		return "null"
	case string:
		return strconv.Quote(v)
	case float64:
		return strconv.FormatFloat(v, 'g', -1, 64)
	default:
		return fmt.Sprint(v)
	}
}

// maps returns the maps that n holds where one is meant: itself, or the elements
// of a list of maps, which is how YAML and JSON write a repeated block. It
// returns false when n is something else.
func (n *node) maps() ([]*node, bool) {
	switch n.kind {
	case mapNode:
		return []*node{n}, true
	case listNode:
		var all []*node
		for _, e := range n.list {
			if e.isNull() {
				continue
			}
			if e.kind != mapNode {
				return nil, false
			}
			all = append(all, e)
		}
		return all, true
	}
	return nil, false
}

func (n *node) isNull() bool { return n.kind == scalarNode && n.scalar == nil }

// value returns n as JSON would decode it: maps, slices, strings, float64, bool
// and nil. Repeated keys become a list when they hold blocks; else the last one
// counts.
func (n *node) value() any {
	switch n.kind {
	case mapNode:
		m := make(map[string]any, len(n.entries))
		for _, e := range n.entries {
			v := e.value.value()
			if old, ok := m[e.key]; ok && e.value.kind == mapNode {
				switch old := old.(type) {
				case []any:
					v = append(old, v)
				case map[string]any:
					v = []any{old, v}
				}
			}
			m[e.key] = v
		}
		return m
	case listNode:
		l := make([]any, len(n.list))
		for i, e := range n.list {
			l[i] = e.value()
		}
		return l
	}
	if i, ok := n.scalar.(int64); ok {
		return float64(i)
	}
	return n.scalar
}
