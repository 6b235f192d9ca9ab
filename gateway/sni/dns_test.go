package sni

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// nameServer answers on UDP and TCP of one port of loopback.
type nameServer struct {
	t       *testing.T
	records map[string][]dnsmessage.Resource // by name
	cut     bool                             // answers by UDP are truncated
}

func (s *nameServer) answer(query []byte) []byte {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil || len(m.Questions) != 1 {
		s.t.Errorf("query: %v", err)
		return nil
	}
	m.Response, m.Authoritative, m.Additionals = true, true, nil
	name, typ := m.Questions[0].Name.String(), m.Questions[0].Type
	all, ok := s.records[name]
	if !ok {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, rr := range all {
		if rr.Header.Type == typ || rr.Header.Type == dnsmessage.TypeCNAME {
			m.Answers = append(m.Answers, rr)
		}
	}
	b, err := m.Pack()
	if err != nil {
		s.t.Errorf("answer: %v", err)
	}
	return b
}

func (s *nameServer) start() (dial dialFunc) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	pc, err := net.ListenPacket("udp", ln.Addr().String())
	if err != nil {
		s.t.Fatal(err)
	}
	var wg sync.WaitGroup
	s.t.Cleanup(func() { ln.Close(); pc.Close(); wg.Wait() })
	wg.Go(func() {
		b := make([]byte, 4096)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			out := s.answer(b[:n])
			if s.cut {
				var m dnsmessage.Message
				m.Unpack(out)
				m.Truncated, m.Answers = true, nil
				out, _ = m.Pack()
			}
			pc.WriteTo(out, from)
		}
	})
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				var size [2]byte
				if _, err := io.ReadFull(c, size[:]); err != nil {
					return
				}
				b := make([]byte, binary.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(c, b); err != nil {
					return
				}
				out := s.answer(b)
				binary.BigEndian.PutUint16(size[:], uint16(len(out)))
				for _, x := range append(size[:], out...) { // one byte at a time
					c.Write([]byte{x})
				}
			})
		}
	})
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, ln.Addr().String())
	}
}

func record(name string, ttl uint32, to string) dnsmessage.Resource {
	r := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Class: dnsmessage.ClassINET, TTL: ttl}}
	switch ip, err := netip.ParseAddr(to); {
	case err != nil:
		r.Header.Type, r.Body = dnsmessage.TypeCNAME, &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(to)}
	case ip.Is4():
		r.Header.Type, r.Body = dnsmessage.TypeA, &dnsmessage.AResource{A: ip.As4()}
	default:
		r.Header.Type, r.Body = dnsmessage.TypeAAAA, &dnsmessage.AAAAResource{AAAA: ip.As16()}
	}
	return r
}

func TestLookupTellsTheTTL(t *testing.T) {
	const name = "gw.example."
	for what, tc := range map[string]struct {
		records []dnsmessage.Resource
		cut     bool
		want    string
		ttl     time.Duration
	}{
		"one":           {[]dnsmessage.Resource{record(name, 60, "10.0.0.1")}, false, "[10.0.0.1]", time.Minute},
		"the least":     {[]dnsmessage.Resource{record(name, 60, "10.0.0.1"), record(name, 50, "10.0.0.2"), record(name, 40, "2001:db8::1")}, false, "[10.0.0.1 10.0.0.2 2001:db8::1]", 40 * time.Second},
		"of an alias":   {[]dnsmessage.Resource{record(name, 30, "lb.example."), record("lb.example.", 60, "10.0.0.1")}, false, "[10.0.0.1]", 30 * time.Second},
		"by a stream":   {[]dnsmessage.Resource{record(name, 60, "10.0.0.1")}, true, "[10.0.0.1]", time.Minute},
		"none":          {[]dnsmessage.Resource{record(name, 0, "10.0.0.1")}, false, "[10.0.0.1]", leastTTL},
		"days":          {[]dnsmessage.Resource{record(name, 200_000, "10.0.0.1")}, false, "[10.0.0.1]", mostTTL},
		"more than any": {[]dnsmessage.Resource{record(name, 1<<31, "10.0.0.1")}, false, "[10.0.0.1]", leastTTL},
	} {
		t.Run(what, func(t *testing.T) {
			s := &nameServer{t: t, records: map[string][]dnsmessage.Resource{name: tc.records}, cut: tc.cut}
			got, ttl, err := lookupThrough(t.Context(), s.start(), name)
			if err != nil {
				t.Fatal(err)
			}
			var text []string
			for _, a := range got {
				text = append(text, a.Unmap().String())
			}
			slices.Sort(text)
			if fmt.Sprint(text) != tc.want || ttl != tc.ttl {
				t.Errorf("%v for %s, want %s for %s", text, ttl, tc.want, tc.ttl)
			}
		})
	}
	// Without an answer, and without a name server, there is none.
	s := &nameServer{t: t}
	if _, ttl, err := lookupThrough(t.Context(), s.start(), name); err == nil || ttl != 0 {
		t.Errorf("a name that there is not: %v, %s", err, ttl)
	}
	if got, ttl, err := systemLookup(t.Context(), "127.0.0.1"); err != nil || ttl != 0 || len(got) != 1 {
		t.Errorf("an address: %v, %s, %v", got, ttl, err)
	}
}

// A malformed message is the resolver's business.
func TestTTLOfRubbish(t *testing.T) {
	s := &nameServer{t: t, records: map[string][]dnsmessage.Resource{"a.": {record("a.", 7, "10.0.0.1")}}}
	var q dnsmessage.Message
	q.Questions = []dnsmessage.Question{{Name: dnsmessage.MustNewName("a."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}
	query, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	whole := s.answer(query)
	for n := range whole {
		tap := &ttlTap{}
		tap.take(whole[:n])
		tap.take(query)
		if got := tap.ttl(); got != 0 {
			t.Errorf("%s of the first %d bytes of %d", got, n, len(whole))
		}
	}
	tap := &ttlTap{}
	tap.take(whole)
	if got := tap.ttl(); got != 7*time.Second {
		t.Errorf("%s, want 7 s", got)
	}
}
