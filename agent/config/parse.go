package config

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// Formats that a source can be written in.
const (
	formatHCL  = "hcl"
	formatJSON = "json"
	formatYAML = "yaml"
)

// formatOf returns the format that a file's name says it has, or "".
func formatOf(path string) string {
	switch strings.ToLower(filepath.Ext(path)) {
	case ".hcl":
		return formatHCL
	case ".json":
		return formatJSON
	case ".yaml", ".yml":
		return formatYAML
	}
	return ""
}

// syntaxError is what a parser returns. It always has a position.
type syntaxError struct {
	pos Pos
	msg string
}

func (e *syntaxError) Error() string { return e.pos.String() + ": " + e.msg }

func syntaxErrorf(pos Pos, format string, args ...any) error {
	return &syntaxError{pos, fmt.Sprintf(format, args...)}
}

var errTooDeep = errors.New("nested too deeply")

// parse reads one source into its documents: one, but that YAML may hold
// several, and an empty source holds none. The error is a [*syntaxError].
func parse(file, format string, src []byte) ([]*node, error) {
	src = []byte(strings.TrimPrefix(string(src), "\ufeff"))
	if strings.TrimSpace(string(src)) == "" {
		return nil, nil
	}
	switch format {
	case formatJSON:
		n, err := parseJSON(file, src)
		if err != nil {
			return nil, err
		}
		return []*node{n}, nil
	case formatYAML:
		return parseYAML(file, src)
	default:
		n, err := parseHCL(file, src)
		if err != nil {
			return nil, err
		}
		return []*node{n}, nil
	}
}
