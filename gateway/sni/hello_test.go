package sni

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
)

// clientHello records the hello that crypto/tls sends by cfg.
func clientHello(t testing.TB, cfg *tls.Config) []byte {
	t.Helper()
	cfg.InsecureSkipVerify = true
	c := &recorder{}
	if err := tls.Client(c, cfg).Handshake(); !errors.Is(err, errRecorded) {
		t.Fatalf("record a hello: %v", err)
	}
	return c.sent
}

func helloFor(t testing.TB, name string) []byte {
	return clientHello(t, &tls.Config{ServerName: name, NextProtos: []string{"consul~http", "h2"}})
}

var errRecorded = errors.New("recorded")

// recorder is a connection that keeps what is written and plays back toRead.
type recorder struct {
	net.Conn
	sent   []byte
	toRead []byte
}

func (r *recorder) Write(b []byte) (int, error) { r.sent = append(r.sent, b...); return len(b), nil }
func (r *recorder) Read(b []byte) (int, error) {
	if len(r.toRead) == 0 {
		return 0, errRecorded
	}
	n := copy(b, r.toRead)
	r.toRead = r.toRead[n:]
	return n, nil
}
func (r *recorder) SetDeadline(time.Time) error      { return nil }
func (r *recorder) SetReadDeadline(time.Time) error  { return nil }
func (r *recorder) SetWriteDeadline(time.Time) error { return nil }
func (r *recorder) Close() error                     { return nil }
func (r *recorder) LocalAddr() net.Addr              { return nil }
func (r *recorder) RemoteAddr() net.Addr             { return nil }

// records splits the message of a hello in one record over records of size.
func records(hello []byte, size int) []byte {
	var out []byte
	for body := hello[recordHeader:]; len(body) > 0; {
		n := min(size, len(body))
		out = append(out, recordHandshake, 3, 1, byte(n>>8), byte(n))
		out = append(out, body[:n]...)
		body = body[n:]
	}
	return out
}

type parsed struct {
	Name   string
	ALPN   []string
	Reason string
	Bytes  int // consumed when the decision was made
}

// read feeds data in segments, as a connection would.
func read(data []byte, segment, limit int) parsed {
	var s helloScan
	for n := 0; n < len(data); {
		// As the engines do, it takes no byte above the limit.
		n = min(n+segment, len(data), limit)
		done, reason := s.feed(data[:n], limit)
		if reason != "" {
			return parsed{Reason: reason, Bytes: n}
		}
		if done {
			var h hello
			reason := h.parse(s.message(data[:n], make([]byte, n)))
			return parsed{Name: string(h.name()), ALPN: h.protocols(), Reason: reason, Bytes: n}
		}
	}
	return parsed{Reason: "incomplete", Bytes: len(data)}
}

// readTLS is what crypto/tls makes of the same bytes.
func readTLS(data []byte) (name string, alpn []string, ok bool) {
	cfg := &tls.Config{GetConfigForClient: func(i *tls.ClientHelloInfo) (*tls.Config, error) {
		name, alpn, ok = i.ServerName, i.SupportedProtos, true
		return nil, errRecorded
	}}
	_ = tls.Server(&recorder{toRead: data}, cfg).HandshakeContext(context.Background())
	return name, alpn, ok
}

func TestHelloAsCryptoTLSReadsIt(t *testing.T) {
	long := strings.Repeat(strings.Repeat("a", 49)+".", 5) + "com"
	hellos := map[string][]byte{
		"post-quantum": clientHello(t, &tls.Config{ServerName: "web.default.dc1.internal.x.consul", NextProtos: []string{"consul~web"}}),
		"small": clientHello(t, &tls.Config{ServerName: "a.b", MaxVersion: tls.VersionTLS12,
			CurvePreferences: []tls.CurveID{tls.X25519}}),
		"upper case":    clientHello(t, &tls.Config{ServerName: "WEB.Example.COM"}),
		"long name":     clientHello(t, &tls.Config{ServerName: long}),
		"no name":       clientHello(t, &tls.Config{ServerName: "10.0.0.1"}),
		"many alpn":     clientHello(t, &tls.Config{ServerName: "web", NextProtos: []string{"h3", "h2", "http/1.1", "x"}}),
		"grease":        grease(helloFor(t, "grease.example")),
		"padded to 60k": pad(helloFor(t, "pad.example"), 60000),
	}
	if n := len(hellos["post-quantum"]); n < 1400 {
		t.Fatalf("the hello has %d bytes: no ML-KEM key share, which is what this tests", n)
	}
	for name, hello := range hellos {
		t.Run(name, func(t *testing.T) {
			wantName, wantALPN, ok := readTLS(hello)
			if !ok {
				t.Fatal("crypto/tls does not take the hello")
			}
			want := parsed{Name: strings.ToLower(wantName), ALPN: wantALPN}
			if wantName == "" {
				want.Reason = gateway.RefuseNoServerName
			}
			for _, recSize := range []int{1 << 14, 1000, 100, 7, 1} {
				data := records(hello, recSize)
				for _, segment := range []int{1 << 20, 1460, 50, 1} {
					got := read(data, segment, len(data)+1)
					got.Bytes = 0
					if d := cmp.Diff(want, got); d != "" {
						t.Fatalf("records of %d, segments of %d (-want +got):\n%s", recSize, segment, d)
					}
				}
			}
		})
	}
}

// edit rebuilds a hello in one record (or as few as it fits) with extensions
// before and after its own.
func edit(hello, before, after []byte) []byte {
	msg := bytes.Clone(hello[recordHeader:])
	at := msgHeader + 2 + 32
	at += 1 + int(msg[at])
	at += 2 + int(binary.BigEndian.Uint16(msg[at:]))
	at += 1 + int(msg[at])
	exts := msg[at+2:]
	out := append([]byte{}, msg[:at+2]...)
	out = append(out, before...)
	out = append(out, exts...)
	out = append(out, after...)
	binary.BigEndian.PutUint16(out[at:], uint16(len(out)-at-2))
	n := len(out) - msgHeader
	out[1], out[2], out[3] = byte(n>>16), byte(n>>8), byte(n)
	return records(append(make([]byte, recordHeader), out...), maxRecord)
}

func ext(typ uint16, data []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, typ)
	b = binary.BigEndian.AppendUint16(b, uint16(len(data)))
	return append(b, data...)
}

func grease(hello []byte) []byte { return edit(hello, ext(0x1a1a, nil), ext(0xdada, []byte{0})) }

func pad(hello []byte, n int) []byte { return edit(hello, nil, ext(21, make([]byte, n-len(hello)))) }

// withName is a hello whose server_name extension has the raw name.
func withName(t testing.TB, name string) []byte {
	list := append([]byte{0, byte(len(name) >> 8), byte(len(name))}, name...)
	list = append([]byte{byte(len(list) >> 8), byte(len(list))}, list...)
	return edit(clientHello(t, &tls.Config{ServerName: "10.0.0.1"}), nil, ext(extServerName, list))
}

func TestHelloNames(t *testing.T) {
	for _, tc := range []struct {
		in, name, reason string
	}{
		{"web.example", "web.example", ""},
		{"Web.EXAMPLE", "web.example", ""},
		{"web.example.", "web.example", ""},
		{"a_b-c.9", "a_b-c.9", ""},
		{strings.Repeat("a", 63) + ".b", strings.Repeat("a", 63) + ".b", ""},
		{strings.Repeat("a", 64) + ".b", strings.Repeat("a", 64) + ".b", gateway.RefuseBadServerName},
		{strings.Repeat("a.", 127) + "b", strings.Repeat("a.", 127) + "b", ""},
		{strings.Repeat("a.", 128) + "b", strings.Repeat("a.", 32), gateway.RefuseBadServerName},
		{".", "", gateway.RefuseBadServerName},
		{"..", ".", gateway.RefuseBadServerName},
		{".a", ".a", gateway.RefuseBadServerName},
		{"a..b", "a..b", gateway.RefuseBadServerName},
		{"a..", "a.", gateway.RefuseBadServerName},
		{"-a.b", "-a.b", gateway.RefuseBadServerName},
		{"a-.b", "a-.b", gateway.RefuseBadServerName},
		{"a.b-", "a.b-", gateway.RefuseBadServerName},
		{"*.a", "*.a", gateway.RefuseBadServerName},
		{"a b", "a?b", gateway.RefuseBadServerName},
		{"a\x00b", "a?b", gateway.RefuseBadServerName},
		{"ü.example", "??.example", gateway.RefuseBadServerName},
		{"[::1]", "[::1]", gateway.RefuseBadServerName},
	} {
		got := read(withName(t, tc.in), 1<<20, maxHelloBytes)
		if got.Name != tc.name || got.Reason != tc.reason {
			t.Errorf("%q: got %q, reason %q; want %q, reason %q", tc.in, got.Name, got.Reason, tc.name, tc.reason)
		}
	}
}

func TestHelloRefused(t *testing.T) {
	good := helloFor(t, "web.example")
	change := func(at int, b ...byte) []byte {
		x := bytes.Clone(good)
		copy(x[at:], b)
		return x
	}
	name := ext(extServerName, []byte{0, 4, 0, 0, 1, 'a'})
	for _, tc := range []struct {
		name   string
		data   []byte
		limit  int
		reason string
		bytes  int // at most, where segments are of one byte; 0 is any number
	}{
		{"http", []byte("GET / HTTP/1.1\r\n"), 0, gateway.RefuseNotTLS, 1},
		{"ssl 2", []byte{0x80, 0x2e, 1, 0, 2}, 0, gateway.RefuseNotTLS, 1},
		{"alert", []byte{21, 3, 1, 0, 2, 1, 0}, 0, gateway.RefuseNotTLS, 1},
		{"version 0x10", change(1, 0x10), 0, gateway.RefuseNotTLS, 2},
		{"empty record", change(3, 0, 0), 0, gateway.RefuseNotTLS, 5},
		{"record too long", change(3, 0x40, 1), 0, gateway.RefuseNotTLS, 5},
		{"server hello", change(5, 2), 0, gateway.RefuseNotTLS, 6},
		{"message of 16 MB", change(6, 0xff, 0xff, 0xff), 0, gateway.RefuseHelloTooLarge, 9},
		{"larger than the bound", good, 200, gateway.RefuseHelloTooLarge, 9},
		{"many small records", records(pad(good, 30000), 1), 0, gateway.RefuseHelloTooLarge, maxHelloBytes},
		{"extensions cut short", change(6, 0, byte((len(good)-10)>>8), byte(len(good)-10)), 0, gateway.RefuseNotTLS, 0},
		{"session id too long", change(5+4+34, 33), 0, gateway.RefuseNotTLS, 0},
		{"two names", edit(good, name, nil), 0, gateway.RefuseNotTLS, 0},
		{"two names in one", edit(clientHello(t, &tls.Config{ServerName: "10.0.0.1"}), nil,
			ext(extServerName, []byte{0, 8, 0, 0, 1, 'a', 0, 0, 1, 'b'})), 0, gateway.RefuseNotTLS, 0},
		{"name of another type", edit(clientHello(t, &tls.Config{ServerName: "10.0.0.1"}), nil,
			ext(extServerName, []byte{0, 4, 7, 0, 1, 'a'})), 0, gateway.RefuseNoServerName, 0},
		{"alpn of length 0", edit(good, nil, ext(0xaaaa, []byte{1})), 0, "", 0},
	} {
		if tc.limit == 0 {
			tc.limit = maxHelloBytes
		}
		for _, segment := range []int{1, 1 << 20} {
			got := read(tc.data, segment, tc.limit)
			if got.Reason != tc.reason || segment == 1 && tc.bytes > 0 && got.Bytes > tc.bytes {
				t.Errorf("%s in segments of %d: got %q after %d bytes, want %q after %d",
					tc.name, segment, got.Reason, got.Bytes, tc.reason, tc.bytes)
			}
		}
	}
}

func TestHelloAllocatesNothing(t *testing.T) {
	data := helloFor(t, "web.default.dc1.internal.x.consul")
	split := records(data, 100)
	scratch := make([]byte, len(split))
	var h hello
	got := testing.AllocsPerRun(100, func() {
		for _, d := range [][]byte{data, split} {
			var s helloScan
			if done, _ := s.feed(d, maxHelloBytes); !done || h.parse(s.message(d, scratch)) != "" {
				t.Fatal("not taken")
			}
		}
	})
	if got != 0 {
		t.Errorf("%v allocations, want none", got)
	}
}

func FuzzHello(f *testing.F) {
	good := helloFor(f, "web.example")
	f.Add(good, uint16(100))
	f.Add(grease(good), uint16(1460))
	f.Add(records(good, 9), uint16(1))
	f.Add(withName(f, "a..b"), uint16(3))
	f.Add([]byte("GET / HTTP/1.1\r\n"), uint16(3))
	f.Fuzz(func(t *testing.T, data []byte, segment uint16) {
		whole := read(data, 1<<20, maxHelloBytes)
		pieces := read(data, max(1, int(segment)), maxHelloBytes)
		if whole.Name != pieces.Name || whole.Reason != pieces.Reason && len(data) < maxHelloBytes || !cmp.Equal(whole.ALPN, pieces.ALPN) {
			t.Fatalf("in one segment %+v, in segments of %d %+v", whole, segment, pieces)
		}
		name, alpn, ok := readTLS(data)
		if !ok {
			return
		}
		// What crypto/tls takes we may refuse for its size or its name's form, but
		// never read otherwise.
		switch whole.Reason {
		case "":
			if whole.Name != strings.ToLower(name) {
				t.Fatalf("name %q, crypto/tls has %q", whole.Name, name)
			}
			if len(alpn) < 8 && len(whole.ALPN) != len(alpn) {
				t.Fatalf("alpn %q, crypto/tls has %q", whole.ALPN, alpn)
			}
		case gateway.RefuseNoServerName:
			if name != "" {
				t.Fatalf("no name, crypto/tls has %q", name)
			}
		case gateway.RefuseBadServerName, gateway.RefuseHelloTooLarge, "incomplete":
		default:
			t.Fatalf("refused as %s, crypto/tls has %q", whole.Reason, name)
		}
	})
}

func BenchmarkHello(b *testing.B) {
	data := helloFor(b, "web.default.dc1.internal.11111111-2222-3333-4444-555555555555.consul")
	var h hello
	b.ReportAllocs()
	for b.Loop() {
		var s helloScan
		if done, _ := s.feed(data, maxHelloBytes); !done || h.parse(s.message(data, nil)) != "" {
			b.Fatal("not taken")
		}
	}
}
