package config

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/hcl/scanner"
	hclstrconv "github.com/hashicorp/hcl/hcl/strconv"
	"github.com/hashicorp/hcl/hcl/token"
)

// parseHCL reads HCL 1, the dialect of Consul's files.
//
// The scanner is the library's. Its parser is not used, because it drops an
// error that a closing brace follows: of a list that is not closed it reports
// the end of the file, and of a key without a value nothing at all.
func parseHCL(file string, src []byte) (*node, error) {
	src = bytes.ReplaceAll(src, []byte("\r\n"), []byte("\n"))
	p := &hclParser{file: file, scan: scanner.New(src)}
	p.scan.Error = func(pos token.Pos, msg string) {
		if p.err == nil {
			p.err = syntaxErrorf(p.pos(pos), "%s", msg)
		}
	}
	p.next()
	n := &node{pos: Pos{file, 1, 1}, kind: mapNode}
	err := p.object(n, 0)
	if p.err != nil {
		err = p.err // what the scanner met first explains the rest
	}
	if err != nil {
		return nil, err
	}
	return n, nil
}

type hclParser struct {
	file string
	scan *scanner.Scanner
	tok  token.Token // the next one
	err  error       // of the scanner
	// open are the brackets that are not closed yet.
	open []token.Token
}

func (p *hclParser) pos(at token.Pos) Pos { return Pos{p.file, max(at.Line, 1), max(at.Column, 1)} }

// next steps to the next token that is no comment.
func (p *hclParser) next() {
	for {
		p.tok = p.scan.Scan()
		if p.tok.Type != token.COMMENT {
			return
		}
	}
}

// unexpected is the error that the next token is not what it should be.
func (p *hclParser) unexpected(expected string) error {
	at := p.pos(p.tok.Pos)
	var open string
	if n := len(p.open); n > 0 {
		o := p.open[n-1]
		open = fmt.Sprintf("; the %q of line %d is open", o.Text, o.Pos.Line)
	}
	switch p.tok.Type {
	case token.EOF:
		return syntaxErrorf(at, "expected %s, got the end of the file%s", expected, open)
	case token.RBRACE, token.RBRACK, token.LBRACE, token.LBRACK, token.ASSIGN, token.COMMA:
		return syntaxErrorf(at, "expected %s, got %q%s", expected, p.tok.Text, open)
	}
	return syntaxErrorf(at, "expected %s, got %s", expected, p.tok.Text)
}

// enter steps over an opening bracket, and leave over its closing one.
func (p *hclParser) enter() error {
	if len(p.open) >= maxDepth {
		return syntaxErrorf(p.pos(p.tok.Pos), "%v", errTooDeep)
	}
	p.open = append(p.open, p.tok)
	p.next()
	return nil
}

func (p *hclParser) leave() {
	p.open = p.open[:len(p.open)-1]
	p.next()
}

// object reads keys and their values into n, up to a closing brace, which is
// left, or to the end of the file.
func (p *hclParser) object(n *node, depth int) error {
	for {
		switch {
		case p.tok.Type == token.EOF && depth == 0, p.tok.Type == token.RBRACE && depth > 0:
			return nil
		}
		if err := p.item(n, depth); err != nil {
			return err
		}
		if p.tok.Type == token.COMMA {
			p.next()
		}
	}
}

// item reads a key, its labels and its value.
func (p *hclParser) item(n *node, depth int) error {
	var keys []entry
	for p.tok.Type == token.IDENT || p.tok.Type == token.STRING {
		key := p.tok.Text
		if p.tok.Type == token.STRING {
			s, err := hclstrconv.Unquote(key)
			if err != nil {
				return syntaxErrorf(p.pos(p.tok.Pos), "read key %s: %v", key, err)
			}
			key = s
		}
		if len(keys)+len(p.open) >= maxDepth {
			return syntaxErrorf(p.pos(p.tok.Pos), "%v", errTooDeep)
		}
		keys = append(keys, entry{key: key, pos: p.pos(p.tok.Pos)})
		p.next()
	}
	var v *node
	var err error
	switch {
	case len(keys) == 0:
		if depth > 0 {
			return p.unexpected(`a key or "}"`)
		}
		return p.unexpected("a key")
	case p.tok.Type == token.LBRACE:
		v, err = p.block(depth)
	case p.tok.Type == token.ASSIGN && len(keys) == 1:
		p.next()
		v, err = p.value(depth)
	case len(keys) == 1:
		return p.unexpected(fmt.Sprintf("%q or %q after the key %s", "=", "{", keys[0].key))
	default:
		return p.unexpected(fmt.Sprintf("%q after the labels of %s", "{", keys[0].key))
	}
	if err != nil {
		return err
	}
	// The labels of a block are keys within it: a "b" {} is a { b {} }.
	for i := len(keys) - 1; i > 0; i-- {
		keys[i].value = v
		v = &node{pos: keys[i].pos, kind: mapNode, entries: []entry{keys[i]}}
	}
	keys[0].value = v
	n.entries = append(n.entries, keys[0])
	return nil
}

func (p *hclParser) block(depth int) (*node, error) {
	n := &node{pos: p.pos(p.tok.Pos), kind: mapNode}
	if err := p.enter(); err != nil {
		return nil, err
	}
	if err := p.object(n, depth+1); err != nil {
		return nil, err
	}
	p.leave()
	return n, nil
}

func (p *hclParser) value(depth int) (*node, error) {
	switch p.tok.Type {
	case token.LBRACE:
		return p.block(depth)
	case token.LBRACK:
		return p.list(depth)
	case token.BOOL, token.NUMBER, token.FLOAT, token.STRING, token.HEREDOC:
		return p.literal()
	case token.IDENT:
		return nil, syntaxErrorf(p.pos(p.tok.Pos), "expected a value, got %s; write strings in quotes", p.tok.Text)
	}
	return nil, p.unexpected("a value")
}

func (p *hclParser) list(depth int) (*node, error) {
	n := &node{pos: p.pos(p.tok.Pos), kind: listNode}
	if err := p.enter(); err != nil {
		return nil, err
	}
	for p.tok.Type != token.RBRACK {
		v, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		n.list = append(n.list, v)
		if p.tok.Type == token.COMMA {
			p.next()
		} else if p.tok.Type != token.RBRACK {
			return nil, p.unexpected(`"," or "]"`)
		}
	}
	p.leave()
	return n, nil
}

func (p *hclParser) literal() (*node, error) {
	n := &node{pos: p.pos(p.tok.Pos)}
	var err error
	switch text := p.tok.Text; p.tok.Type {
	case token.BOOL:
		n.scalar = text == "true"
	case token.NUMBER:
		n.scalar, err = strconv.ParseInt(text, 0, 64)
	case token.FLOAT:
		n.scalar, err = strconv.ParseFloat(text, 64)
	case token.STRING:
		n.scalar, err = hclstrconv.Unquote(text)
	default:
		n.scalar, err = heredoc(text)
	}
	if err != nil {
		var ne *strconv.NumError
		if errors.As(err, &ne) {
			err = ne.Err
		}
		return nil, syntaxErrorf(n.pos, "read %s: %v", p.tok.Text, err)
	}
	p.next()
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
	lines := strings.SplitAfter(body, "\n")
	for _, l := range lines {
		if l != "" && !strings.HasPrefix(l, prefix) {
			return body, nil
		}
	}
	for i, l := range lines {
		lines[i] = strings.TrimPrefix(l, prefix)
	}
	return strings.Join(lines, ""), nil
}
