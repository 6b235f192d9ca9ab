package config

import (
	"bytes"
	"errors"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/hcl/ast"
	"github.com/hashicorp/hcl/hcl/parser"
	hclstrconv "github.com/hashicorp/hcl/hcl/strconv"
	"github.com/hashicorp/hcl/hcl/token"
)

// parseHCL reads HCL 1, the dialect of Consul's files.
func parseHCL(file string, src []byte) (*node, error) {
	start := Pos{file, 1, 1}
	if depth(src) > maxDepth {
		return nil, syntaxErrorf(start, "%v", errTooDeep)
	}
	f, err := parser.Parse(src)
	if err != nil {
		var pe *parser.PosError
		if errors.As(err, &pe) && pe.Pos.Line > 0 {
			return nil, syntaxErrorf(Pos{file, pe.Pos.Line, pe.Pos.Column}, "%v", pe.Err)
		}
		return nil, syntaxErrorf(start, "%v", err)
	}
	objects, ok := f.Node.(*ast.ObjectList)
	if !ok {
		return nil, syntaxErrorf(start, "expected keys and blocks at the top level")
	}
	h := hclReader{file}
	return h.object(objects, start)
}

// depth bounds how deeply brackets in src nest, without regard to strings and
// comments, where they cannot make it smaller than it is.
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

type hclReader struct{ file string }

func (h hclReader) pos(p token.Pos) Pos { return Pos{h.file, p.Line, p.Column} }

func (h hclReader) object(list *ast.ObjectList, pos Pos) (*node, error) {
	n := &node{pos: pos, kind: mapNode}
	for _, item := range list.Items {
		if len(item.Keys) == 0 {
			return nil, syntaxErrorf(pos, "expected a key")
		}
		v, err := h.value(item.Val, h.pos(item.Keys[0].Token.Pos))
		if err != nil {
			return nil, err
		}
		// The labels of a block are keys within it: a "b" {} is a { b {} }.
		for i := len(item.Keys) - 1; i >= 0; i-- {
			tok := item.Keys[i].Token
			key, err := h.key(tok)
			if err != nil {
				return nil, err
			}
			e := entry{key, h.pos(tok.Pos), v}
			if i == 0 {
				n.entries = append(n.entries, e)
				break
			}
			v = &node{pos: e.pos, kind: mapNode, entries: []entry{e}}
		}
	}
	return n, nil
}

func (h hclReader) key(tok token.Token) (string, error) {
	if tok.Type != token.STRING {
		return tok.Text, nil
	}
	s, err := hclstrconv.Unquote(tok.Text)
	if err != nil {
		return "", syntaxErrorf(h.pos(tok.Pos), "read key %s: %v", tok.Text, err)
	}
	return s, nil
}

func (h hclReader) value(v ast.Node, at Pos) (*node, error) {
	switch v := v.(type) {
	case *ast.ObjectType:
		return h.object(v.List, h.pos(v.Lbrace))
	case *ast.ListType:
		n := &node{pos: h.pos(v.Lbrack), kind: listNode}
		for _, e := range v.List {
			c, err := h.value(e, n.pos)
			if err != nil {
				return nil, err
			}
			n.list = append(n.list, c)
		}
		return n, nil
	case *ast.LiteralType:
		return h.literal(v.Token)
	}
	return nil, syntaxErrorf(at, "expected a value")
}

// literal does what [token.Token.Value] does, which panics on a number out of
// range and on a string with a bad escape.
func (h hclReader) literal(tok token.Token) (*node, error) {
	n := &node{pos: h.pos(tok.Pos)}
	var err error
	switch tok.Type {
	case token.BOOL:
		n.scalar = tok.Text == "true"
	case token.NUMBER:
		n.scalar, err = strconv.ParseInt(tok.Text, 0, 64)
	case token.FLOAT:
		n.scalar, err = strconv.ParseFloat(tok.Text, 64)
	case token.STRING:
		n.scalar, err = hclstrconv.Unquote(tok.Text)
	case token.HEREDOC:
		n.scalar, err = heredoc(tok.Text)
	default:
		err = errors.New("expected a string, a number, true or false")
	}
	if err != nil {
		return nil, syntaxErrorf(n.pos, "read %s: %v", tok.Text, err)
	}
	return n, nil
}

// heredoc returns the text between the marker lines of <<EOF or <<-EOF; the
// latter's lines lose the indentation of the closing marker.
func heredoc(text string) (string, error) {
	marker, body, ok := strings.Cut(text, "\n")
	if !ok {
		return "", errors.New("heredoc without a closing marker")
	}
	name, unindent := strings.CutPrefix(strings.TrimPrefix(marker, "<<"), "-")
	body = strings.TrimSuffix(body, "\n")
	i := strings.LastIndexByte(body, '\n') + 1
	last := body[i:]
	body = body[:i]
	prefix, ok := strings.CutSuffix(last, name)
	if !ok || strings.Trim(prefix, " \t") != "" {
		return "", errors.New("heredoc without a closing marker")
	}
	if !unindent || prefix == "" {
		return body, nil
	}
	lines := bytes.SplitAfter([]byte(body), []byte("\n"))
	for _, l := range lines {
		if len(l) > 0 && !bytes.HasPrefix(l, []byte(prefix)) {
			return body, nil
		}
	}
	var b strings.Builder
	for _, l := range lines {
		b.Write(bytes.TrimPrefix(l, []byte(prefix)))
	}
	return b.String(), nil
}
