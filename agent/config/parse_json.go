package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sort"
	"unicode/utf8"
)

// parseJSON reads one JSON object.
func parseJSON(file string, src []byte) (*node, error) {
	r := &jsonReader{file: file, src: src, dec: json.NewDecoder(bytes.NewReader(src))}
	r.dec.UseNumber()
	for i, b := range src {
		if b == '\n' {
			r.lines = append(r.lines, i)
		}
	}
	n, err := r.value(0)
	if err != nil {
		return nil, err
	}
	if n.kind != mapNode {
		return nil, syntaxErrorf(n.pos, "expected an object at the top level, got %s", n.describe())
	}
	at := r.next()
	if _, err := r.dec.Token(); !errors.Is(err, io.EOF) {
		return nil, syntaxErrorf(at, "unexpected text after the object")
	}
	return n, nil
}

type jsonReader struct {
	file  string
	src   []byte
	lines []int // offsets of newlines
	dec   *json.Decoder
}

func (r *jsonReader) at(offset int) Pos {
	offset = min(offset, len(r.src))
	line := sort.SearchInts(r.lines, offset)
	start := 0
	if line > 0 {
		start = r.lines[line-1] + 1
	}
	return Pos{r.file, line + 1, utf8.RuneCount(r.src[start:offset]) + 1}
}

// next returns where the next token begins.
func (r *jsonReader) next() Pos {
	i := int(r.dec.InputOffset())
	for i < len(r.src) && bytes.IndexByte([]byte(" \t\r\n,:"), r.src[i]) >= 0 {
		i++
	}
	return r.at(i)
}

func (r *jsonReader) token() (json.Token, Pos, error) {
	at := r.next()
	tok, err := r.dec.Token()
	if err == nil {
		return tok, at, nil
	}
	var se *json.SyntaxError
	switch {
	case errors.As(err, &se):
		// The offset is behind the offending byte.
		at = r.at(max(int(se.Offset)-1, 0))
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		at, err = r.at(len(r.src)), errors.New("unexpected end of file")
	}
	return nil, at, syntaxErrorf(at, "%v", err)
}

func (r *jsonReader) value(depth int) (*node, error) {
	tok, at, err := r.token()
	if err != nil {
		return nil, err
	}
	n := &node{pos: at}
	switch tok := tok.(type) {
	case json.Delim:
		if depth >= maxDepth {
			return nil, syntaxErrorf(at, "%v", errTooDeep)
		}
		if tok == '[' {
			n.kind = listNode
			for r.dec.More() {
				e, err := r.value(depth + 1)
				if err != nil {
					return nil, err
				}
				n.list = append(n.list, e)
			}
		} else {
			n.kind = mapNode
			for r.dec.More() {
				key, at, err := r.token()
				if err != nil {
					return nil, err
				}
				v, err := r.value(depth + 1)
				if err != nil {
					return nil, err
				}
				n.entries = append(n.entries, entry{fmt.Sprint(key), at, v})
			}
		}
		if _, _, err := r.token(); err != nil {
			return nil, err
		}
	case json.Number:
		if i, err := tok.Int64(); err == nil {
			n.scalar = i
		} else if f, err := tok.Float64(); err == nil {
			n.scalar = f
		} else {
			return nil, syntaxErrorf(at, "read %s: %v", tok, err)
		}
	default: // string, bool, nil
		n.scalar = tok
	}
	return n, nil
}
