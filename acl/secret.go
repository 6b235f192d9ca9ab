// Package acl holds the token model of the access-control system. It does no
// I/O and imports nothing of this module.
package acl

// Secret is a token's secret ID or another value that must not reach a log, an
// error text or an API response. Every way of printing it, encoding included,
// yields a placeholder; Reveal is the only way to the value.
type Secret string

const redacted = "<redacted>"

// Reveal returns the secret itself.
func (s Secret) Reveal() string { return string(s) }

// String implements [fmt.Stringer].
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return redacted
}

// GoString implements [fmt.GoStringer], for %#v.
func (s Secret) GoString() string { return `acl.Secret("` + s.String() + `")` }

// MarshalText implements [encoding.TextMarshaler], for JSON and for loggers.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (s *Secret) UnmarshalText(b []byte) error { *s = Secret(b); return nil }
