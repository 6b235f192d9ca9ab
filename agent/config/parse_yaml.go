package config

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// parseYAML reads the documents of a YAML file; empty ones are left out.
//
// COMPAT: Consul's agent reads no YAML; its documentation shows it.
func parseYAML(file string, src []byte) ([]*node, error) {
	start := Pos{file, 1, 1}
	if depth(src) > maxDepth {
		return nil, syntaxErrorf(start, "%v", errTooDeep)
	}
	var docs []*node
	line := 0
	for _, text := range documents(src) {
		y := &yamlReader{file: file, line: line, anchors: map[string]*node{}}
		line += bytes.Count(text, []byte("\n"))
		n, err := y.document(text)
		if err != nil {
			return nil, err
		}
		if n != nil {
			docs = append(docs, n)
		}
	}
	return docs, nil
}

// documents splits a source before each line that begins a document. The library
// would read several, but drops all that follow an empty one.
func documents(src []byte) [][]byte {
	var docs [][]byte
	start, begun := 0, false // begun: more than comments and directives since start
	for i := 0; i < len(src); {
		end := bytes.IndexByte(src[i:], '\n') + i + 1
		if end == i {
			end = len(src)
		}
		line := src[i:end]
		rest, ok := bytes.CutPrefix(line, []byte("---"))
		if ok && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0) {
			if begun {
				docs = append(docs, src[start:i])
				start = i
			}
			begun = true
		} else if line = bytes.TrimSpace(line); len(line) > 0 && line[0] != '#' && line[0] != '%' {
			begun = true
		}
		i = end
	}
	return append(docs, src[start:])
}

// document reads one document; nil is an empty one.
func (y *yamlReader) document(text []byte) (*node, error) {
	start := Pos{y.file, y.line + 1, 1}
	f, err := parser.ParseBytes(text, 0)
	if err != nil {
		var ye yaml.Error
		if errors.As(err, &ye) {
			return nil, syntaxErrorf(y.at(ye.GetToken(), start), "%s", ye.GetMessage())
		}
		return nil, syntaxErrorf(start, "%v", err)
	}
	var doc *node
	for _, d := range f.Docs {
		if d == nil || d.Body == nil {
			continue
		}
		switch d.Body.(type) {
		case *ast.CommentGroupNode, *ast.CommentNode, *ast.DirectiveNode:
			continue
		}
		n, err := y.value(d.Body, start, 0)
		switch {
		case err != nil:
			return nil, err
		case n.isNull():
			continue
		case n.kind != mapNode:
			return nil, syntaxErrorf(n.pos, "expected keys at the top level, got %s", n.describe())
		case doc != nil:
			return nil, syntaxErrorf(n.pos, "expected a line \"---\" before a second document")
		}
		doc = n
	}
	return doc, nil
}

type yamlReader struct {
	file    string
	line    int // how many lines are before the document
	anchors map[string]*node
	// nodes counts what aliases stand for, not what is written.
	nodes int
}

func (y *yamlReader) at(tok *token.Token, fallback Pos) Pos {
	if tok == nil || tok.Position == nil || tok.Position.Line < 1 {
		return fallback
	}
	return Pos{y.file, y.line + tok.Position.Line, max(tok.Position.Column, 1)}
}

func (y *yamlReader) value(v ast.Node, fallback Pos, depth int) (*node, error) {
	if v == nil {
		return &node{pos: fallback}, nil
	}
	at := y.at(v.GetToken(), fallback)
	if depth > maxDepth {
		return nil, syntaxErrorf(at, "%v", errTooDeep)
	}
	if y.nodes++; y.nodes > maxNodes {
		return nil, syntaxErrorf(at, "more than %d values", maxNodes)
	}
	n := &node{pos: at}
	switch v := v.(type) {
	case *ast.NullNode:
	case *ast.BoolNode:
		n.scalar = v.Value
	case *ast.IntegerNode:
		switch i := v.Value.(type) {
		case int64:
			n.scalar = i
		case uint64:
			n.scalar = float64(i)
			if i <= 1<<63-1 {
				n.scalar = int64(i)
			}
		default:
			return nil, syntaxErrorf(at, "read %s: expected a number", v)
		}
	case *ast.FloatNode:
		n.scalar = v.Value
	case *ast.StringNode:
		n.scalar = v.Value
	case *ast.LiteralNode:
		n.scalar = ""
		if v.Value != nil {
			n.scalar = v.Value.Value
		}
	case *ast.TagNode:
		return y.value(v.Value, at, depth+1)
	case *ast.AnchorNode:
		c, err := y.value(v.Value, at, depth+1)
		if err != nil {
			return nil, err
		}
		if v.Name != nil && v.Name.GetToken() != nil {
			y.anchors[v.Name.GetToken().Value] = c
		}
		return c, nil
	case *ast.AliasNode:
		name := ""
		if v.Value != nil && v.Value.GetToken() != nil {
			name = v.Value.GetToken().Value
		}
		c, ok := y.anchors[name]
		if !ok {
			return nil, syntaxErrorf(at, "unknown alias %q", name)
		}
		if y.nodes += c.size(); y.nodes > maxNodes {
			return nil, syntaxErrorf(at, "more than %d values", maxNodes)
		}
		return c, nil
	case *ast.SequenceNode:
		n.kind = listNode
		for _, e := range v.Values {
			c, err := y.value(e, at, depth+1)
			if err != nil {
				return nil, err
			}
			n.list = append(n.list, c)
		}
	case *ast.MappingNode:
		n.kind = mapNode
		for _, e := range v.Values {
			if err := y.entry(n, e, depth); err != nil {
				return nil, err
			}
		}
		if len(n.entries) > 0 {
			n.pos = n.entries[0].pos
		}
	case *ast.MappingValueNode:
		n.kind = mapNode
		if err := y.entry(n, v, depth); err != nil {
			return nil, err
		}
		if len(n.entries) > 0 {
			n.pos = n.entries[0].pos
		}
	default:
		return nil, syntaxErrorf(at, "expected a value, got %s", v.Type())
	}
	return n, nil
}

func (y *yamlReader) entry(n *node, e *ast.MappingValueNode, depth int) error {
	if e.Key == nil {
		return syntaxErrorf(n.pos, "expected a key")
	}
	at := y.at(e.Key.GetToken(), n.pos)
	v, err := y.value(e.Value, at, depth+1)
	if err != nil {
		return err
	}
	if e.Key.IsMergeKey() {
		maps, ok := v.maps()
		if !ok {
			return syntaxErrorf(at, "expected a block to merge, got %s", v.describe())
		}
		for _, m := range maps {
			for _, c := range m.entries {
				if !n.has(c.key) {
					n.entries = append(n.entries, c)
				}
			}
		}
		return nil
	}
	key, err := y.value(ast.Node(e.Key), at, depth+1)
	if err != nil {
		return err
	}
	if key.kind != scalarNode || key.scalar == nil {
		return syntaxErrorf(at, "expected a key, got %s", key.describe())
	}
	name, ok := key.scalar.(string)
	if !ok {
		name = fmt.Sprint(key.scalar)
	}
	// What is written beside a merge beats what is merged, in either order.
	for i, old := range n.entries {
		if old.key == name {
			n.entries[i] = entry{name, at, v}
			return nil
		}
	}
	n.entries = append(n.entries, entry{name, at, v})
	return nil
}

func (n *node) has(key string) bool {
	for _, e := range n.entries {
		if e.key == key {
			return true
		}
	}
	return false
}

// size is the number of nodes in n.
func (n *node) size() int {
	s := 1
	for _, e := range n.list {
		s += e.size()
	}
	for _, e := range n.entries {
		s += e.value.size()
	}
	return s
}

// depth bounds how deeply brackets in src nest, whatever strings and comments
// hold: the library's parser has no bound of its own.
func depth(src []byte) int {
	d, most := 0, 0
	for _, b := range src {
		switch b {
		case '{', '[':
			d++
			most = max(most, d)
		case '}', ']':
			d = max(d-1, 0)
		}
	}
	return most
}
