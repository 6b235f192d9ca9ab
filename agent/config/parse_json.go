package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// parseJSON reads one JSON object.
func parseJSON(file string, src []byte) (*node, error) {
	r := &jsonReader{file: file, src: src, dec: json.NewDecoder(bytes.NewReader(src)), pos: Pos{file, 1, 1}}
	r.dec.UseNumber()
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
	file string
	src  []byte
	dec  *json.Decoder
	pos  Pos // of src[last]
	last int
}

// at returns the position of an offset. Offsets are asked for in ascending order,
// so a file of one line is counted through once.
func (r *jsonReader) at(offset int) Pos {
	offset = min(offset, len(r.src))
	if offset < r.last {
		r.last, r.pos = 0, Pos{r.file, 1, 1}
	}
	for r.last < offset {
		c, n := utf8.DecodeRune(r.src[r.last:])
		r.last += n
		r.pos.Column++
		if c == '\n' {
			r.pos.Line, r.pos.Column = r.pos.Line+1, 1
		}
	}
	return r.pos
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
	// The offset in the library's error counts from the value it was reading.
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
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
