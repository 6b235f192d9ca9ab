package config

import (
	"crypto/tls"
	"fmt"
	"os"
	"slices"
	"strings"
)

// tls resolves what each endpoint uses: its own block, then the defaults, then
// the keys of before the tls block.
func (b *builder) tls() TLS {
	s, l := &b.s.TLS, &b.s.legacyTLS
	first := func(ps ...*string) string {
		for _, p := range ps {
			if p != nil {
				return *p
			}
		}
		return ""
	}
	firstBool := func(ps ...*bool) bool {
		for _, p := range ps {
			if p != nil {
				return *p
			}
		}
		return false
	}
	for _, x := range []struct {
		name  string
		block *tlsBlock
	}{{"https", &s.HTTPS}, {"grpc", &s.GRPC.tlsBlock}} {
		if x.block.VerifyServerHostname != nil {
			b.bad("tls."+x.name+".verify_server_hostname", "verify_server_hostname is only valid in the tls.defaults and tls.internal_rpc stanzas")
		}
	}
	end := func(name string, t *tlsBlock, in, hostname *bool) TLSEndpoint {
		d := &s.Defaults
		path := "tls." + name
		e := TLSEndpoint{
			CAFile:   first(t.CAFile, d.CAFile, l.CAFile),
			CAPath:   first(t.CAPath, d.CAPath, l.CAPath),
			CertFile: first(t.CertFile, d.CertFile, l.CertFile),
			KeyFile:  first(t.KeyFile, d.KeyFile, l.KeyFile),

			VerifyIncoming:       firstBool(t.VerifyIncoming, d.VerifyIncoming, in),
			VerifyOutgoing:       firstBool(t.VerifyOutgoing, d.VerifyOutgoing, l.VerifyOutgoing),
			VerifyServerHostname: firstBool(hostname),
			MinVersion:           b.tlsVersion(path+".tls_min_version", first(t.MinVersion, d.MinVersion, l.MinVersion)),
			CipherSuites:         b.cipherSuites(path+".tls_cipher_suites", first(t.CipherSuites, d.CipherSuites, l.CipherSuites)),
		}
		if e.VerifyServerHostname {
			e.VerifyOutgoing = true
		}
		ca := e.CAFile != "" || e.CAPath != ""
		if e.VerifyIncoming && !ca {
			b.bad(path+".verify_incoming", "tls.%s: verify_incoming needs ca_file or ca_path", name)
		}
		if e.VerifyIncoming && e.CertFile == "" && name == "internal_rpc" {
			b.bad(path+".verify_incoming", "tls.%s: verify_incoming needs cert_file and key_file", name)
		}
		if e.VerifyOutgoing && !ca && name == "internal_rpc" {
			b.bad(path+".verify_outgoing", "tls.%s: verify_outgoing needs ca_file or ca_path", name)
		}
		if (e.CertFile == "") != (e.KeyFile == "") {
			b.bad(path+".cert_file", "tls.%s: cert_file and key_file must be set together", name)
		}
		return e
	}
	t := TLS{ServerName: or(l.ServerName, "")}
	hostname := s.InternalRPC.VerifyServerHostname
	for _, p := range []*bool{s.Defaults.VerifyServerHostname, l.VerifyServerHostname} {
		if hostname == nil {
			hostname = p
		}
	}
	legacyIn := func(own *bool) *bool {
		if own != nil {
			return own
		}
		return l.VerifyIncoming
	}
	t.InternalRPC = end("internal_rpc", &s.InternalRPC, legacyIn(l.VerifyIncomingRPC), hostname)
	t.HTTPS = end("https", &s.HTTPS, legacyIn(l.VerifyIncomingHTTPS), nil)
	t.GRPC = end("grpc", &s.GRPC.tlsBlock, nil, nil)
	t.GRPC.UseAutoCert = or(s.GRPC.UseAutoCert, false)

	// One file is often named for all: it is looked for, and missed, once.
	seen := map[string]bool{}
	for _, e := range []TLSEndpoint{t.InternalRPC, t.HTTPS, t.GRPC} {
		for _, f := range []struct{ key, path string }{
			{"ca_file", e.CAFile}, {"ca_path", e.CAPath}, {"cert_file", e.CertFile}, {"key_file", e.KeyFile},
		} {
			if f.path == "" || seen[f.path] {
				continue
			}
			seen[f.path] = true
			if _, err := os.Stat(f.path); err != nil {
				b.problems = append(b.problems, Problem{Pos: b.tlsAt(f.key, f.path), Text: fmt.Sprintf("%s %q: %v", f.key, f.path, cause(err))})
			}
		}
	}
	return t
}

// tlsAt returns where a file of TLS was named.
func (b *builder) tlsAt(key, path string) Pos {
	at := func(prefix string, t *tlsBlock) (Pos, bool) {
		p := map[string]*string{"ca_file": t.CAFile, "ca_path": t.CAPath, "cert_file": t.CertFile, "key_file": t.KeyFile}[key]
		return b.at(prefix + key), p != nil && *p == path
	}
	s, l := &b.s.TLS, &b.s.legacyTLS
	for _, x := range []struct {
		prefix string
		block  *tlsBlock
	}{
		{"tls.defaults.", &s.Defaults}, {"tls.internal_rpc.", &s.InternalRPC}, {"tls.https.", &s.HTTPS}, {"tls.grpc.", &s.GRPC.tlsBlock},
		{"", &tlsBlock{CAFile: l.CAFile, CAPath: l.CAPath, CertFile: l.CertFile, KeyFile: l.KeyFile}},
	} {
		if pos, ok := at(x.prefix, x.block); ok {
			return pos
		}
	}
	return Pos{}
}

func (b *builder) tlsVersion(path, s string) uint16 {
	versions := map[string]uint16{
		"": tls.VersionTLS12, "TLSv1_0": tls.VersionTLS10, "TLSv1_1": tls.VersionTLS11, "TLSv1_2": tls.VersionTLS12, "TLSv1_3": tls.VersionTLS13,
		// The spelling of before the tls block.
		"tls10": tls.VersionTLS10, "tls11": tls.VersionTLS11, "tls12": tls.VersionTLS12, "tls13": tls.VersionTLS13,
	}
	v, ok := versions[s]
	if !ok {
		b.badTLS(path, "tls_min_version = %q: expected TLSv1_0, TLSv1_1, TLSv1_2 or TLSv1_3", s)
		return tls.VersionTLS12
	}
	return v
}

func (b *builder) cipherSuites(path, s string) []uint16 {
	var ids []uint16
	for _, name := range strings.Split(s, ",") {
		if name = strings.TrimSpace(name); name == "" {
			continue
		}
		i := slices.IndexFunc(tls.CipherSuites(), func(c *tls.CipherSuite) bool { return c.Name == name })
		if i < 0 {
			b.badTLS(path, "tls_cipher_suites: unknown or insecure cipher suite %q", name)
			continue
		}
		ids = append(ids, tls.CipherSuites()[i].ID)
	}
	return ids
}

// badTLS reports a problem once, though three endpoints may share the value, and
// where the value that they share was written.
func (b *builder) badTLS(path, format string, args ...any) {
	key := path[strings.LastIndexByte(path, '.')+1:]
	p := Problem{Text: fmt.Sprintf(format, args...)}
	for _, at := range []string{path, "tls.defaults." + key, key} {
		if pos, ok := b.pos[at]; ok {
			p.Pos = pos
			break
		}
	}
	if !slices.Contains(b.problems, p) {
		b.problems = append(b.problems, p)
	}
}
