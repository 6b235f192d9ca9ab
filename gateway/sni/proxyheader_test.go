package sni

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/sluicemesh/sluice/gateway"
)

func v2(command, family byte, body string) string {
	return proxyV2 + string([]byte{command, family, byte(len(body) >> 8), byte(len(body))}) + body
}

const body4 = "\x0a\x00\x00\x01\x0a\x00\x00\x02\x04\xd2\x01\xbb" // 10.0.0.1:1234 to 10.0.0.2:443

func TestProxyHeader(t *testing.T) {
	body6 := string(netip.MustParseAddr("2001:db8::1").AsSlice()) + string(netip.MustParseAddr("::ffff:10.0.0.2").AsSlice()) + body4[8:]
	for _, tc := range []struct {
		name, in string
		want     headerState
		src, dst string
	}{
		{"v1", "PROXY TCP4 10.0.0.1 10.0.0.2 1234 443\r\n", headerDone, "10.0.0.1:1234", "10.0.0.2:443"},
		{"v1 of IPv6", "PROXY TCP6 2001:db8::1 ::ffff:10.0.0.2 1234 443\r\n", headerDone, "[2001:db8::1]:1234", "10.0.0.2:443"},
		{"v1 of somebody", "PROXY UNKNOWN\r\n", headerDone, "", ""},
		{"v1 of somebody, in words", "PROXY UNKNOWN ::1 ::1 1 1\r\n", headerDone, "", ""},
		{"v1 at its longest", "PROXY UNKNOWN " + strings.Repeat("f", 91) + "\r\n", headerDone, "", ""},
		{"v1 longer", "PROXY UNKNOWN " + strings.Repeat("f", 92) + "\r\n", headerBad, "", ""},
		{"v1 without an end", "PROXY " + strings.Repeat("x", 200), headerBad, "", ""},
		{"v1 without a line feed", "PROXY TCP4 10.0.0.1 10.0.0.2 1234 443\r.", headerBad, "", ""},
		{"v1 of families that differ", "PROXY TCP4 10.0.0.1 ::1 1234 443\r\n", headerBad, "", ""},
		{"v1 of the other family", "PROXY TCP6 10.0.0.1 10.0.0.2 1234 443\r\n", headerBad, "", ""},
		{"v1 with a zone", "PROXY TCP6 fe80::1%eth0 ::1 1234 443\r\n", headerBad, "", ""},
		{"v1 with a port too high", "PROXY TCP4 10.0.0.1 10.0.0.2 65536 443\r\n", headerBad, "", ""},
		{"v1 with an odd port", "PROXY TCP4 10.0.0.1 10.0.0.2 +80 443\r\n", headerBad, "", ""},
		{"v1 with zeros", "PROXY TCP4 10.0.0.1 10.0.0.2 0080 443\r\n", headerBad, "", ""},
		{"v1 with two spaces", "PROXY TCP4  10.0.0.1 10.0.0.2 80 443\r\n", headerBad, "", ""},
		{"v1 of nothing", "PROXY \r\n", headerBad, "", ""},
		{"v1 of UDP", "PROXY UDP4 10.0.0.1 10.0.0.2 80 443\r\n", headerBad, "", ""},
		{"v2", v2(0x21, 0x11, body4), headerDone, "10.0.0.1:1234", "10.0.0.2:443"},
		{"v2 of IPv6", v2(0x21, 0x21, body6), headerDone, "[2001:db8::1]:1234", "10.0.0.2:443"},
		{"v2 with more", v2(0x21, 0x11, body4+"\x04\x00\x03abc"), headerDone, "10.0.0.1:1234", "10.0.0.2:443"},
		{"v2 at its longest", v2(0x21, 0x11, body4+strings.Repeat("x", maxProxyHeader-16-12)), headerDone, "10.0.0.1:1234", "10.0.0.2:443"},
		{"v2 longer", v2(0x21, 0x11, body4+strings.Repeat("x", maxProxyHeader-16-11)), headerBad, "", ""},
		{"v2 of itself", v2(0x20, 0x00, ""), headerDone, "", ""},
		{"v2 of itself, with addresses", v2(0x20, 0x11, body4), headerDone, "", ""},
		{"v2 of nobody", v2(0x21, 0x00, "xyz"), headerDone, "", ""},
		{"v2 of UDP", v2(0x21, 0x12, body4), headerDone, "", ""},
		{"v2 of a unix socket", v2(0x21, 0x31, strings.Repeat("x", 216)), headerDone, "", ""},
		{"v2 too short", v2(0x21, 0x11, body4[:11]), headerBad, "", ""},
		{"v2 of IPv6, too short", v2(0x21, 0x21, body6[:35]), headerBad, "", ""},
		{"v2 with another command", v2(0x22, 0x11, body4), headerBad, "", ""},
		{"v2 of another version", v2(0x11, 0x11, body4), headerBad, "", ""},
		{"v2 of another family", v2(0x21, 0x41, body4), headerBad, "", ""},
		{"v2 of another transport", v2(0x21, 0x13, body4), headerBad, "", ""},
		{"TLS", "\x16\x03\x01", headerNone, "", ""},
		{"something else", "PROXIMITY", headerNone, "", ""},
	} {
		const rest = "\x16\x03\x01 and what follows"
		var h proxyHeader
		if got := h.parse([]byte(tc.in + rest)); got != tc.want {
			t.Errorf("%s: state %d, want %d", tc.name, got, tc.want)
			continue
		}
		show := func(a netip.AddrPort) string {
			if !a.IsValid() {
				return ""
			}
			return a.String()
		}
		if tc.want == headerDone && (h.size != len(tc.in) || show(h.src) != tc.src || show(h.dst) != tc.dst) {
			t.Errorf("%s: %+v", tc.name, h)
		}
		for n := range len(tc.in) {
			if got := h.parse([]byte(tc.in[:n])); got != headerMore && (got != tc.want || tc.want == headerDone) {
				t.Errorf("%s: state %d of the first %d bytes", tc.name, got, n)
			}
		}
	}
}

func TestProxyHeaderRoundTrip(t *testing.T) {
	four, six := netip.MustParseAddrPort("10.0.0.1:1234"), netip.MustParseAddrPort("[2001:db8::1]:443")
	for _, version := range []gateway.ProxyVersion{gateway.ProxyV1, gateway.ProxyV2} {
		for _, pair := range [][2]netip.AddrPort{{four, four}, {six, six}, {four, six}, {six, four}, {}, {four, {}}} {
			b := appendProxyHeader(nil, version, pair[0], pair[1])
			want := proxyHeader{size: len(b), src: pair[0], dst: pair[1]}
			if !pair[1].IsValid() {
				want.src = netip.AddrPort{}
			}
			var h proxyHeader
			if got := h.parse(b); got != headerDone || h != want {
				t.Errorf("%s of %v: %q is %d, %+v", version, pair, b, got, h)
			}
			if len(b) > maxProxyV1 {
				t.Errorf("%s of %v takes %d bytes", version, pair, len(b))
			}
		}
	}
}

func FuzzProxyHeader(f *testing.F) {
	f.Add([]byte("PROXY TCP4 10.0.0.1 10.0.0.2 1234 443\r\n\x16"), 3)
	f.Add([]byte("PROXY UNKNOWN\r\n"), 9)
	f.Add([]byte(v2(0x21, 0x11, body4)+"\x16"), 14)
	f.Add([]byte(v2(0x20, 0x00, "")), 16)
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		var whole, part proxyHeader
		state := whole.parse(b)
		if state == headerDone {
			if whole.size <= 0 || whole.size > len(b) || whole.size > maxProxyHeader || whole.src.IsValid() != whole.dst.IsValid() {
				t.Fatalf("%q: %+v", b, whole)
			}
			// What was understood can be said again.
			again := appendProxyHeader(nil, gateway.ProxyV2, whole.src, whole.dst)
			if part.parse(again) != headerDone || part.src != whole.src || part.dst != whole.dst {
				t.Fatalf("%q: %+v, said again %+v", b, whole, part)
			}
		}
		if state == headerMore && len(b) >= maxProxyHeader {
			t.Fatalf("%d bytes are not enough", len(b))
		}
		// What is found of a part is found of the whole.
		if n < 0 || n > len(b) {
			return
		}
		if got := part.parse(b[:n]); got != headerMore && (got != state || got == headerDone && part != whole) {
			t.Fatalf("%q: state %d, of %d bytes %d", b, state, n, got)
		}
	})
}

func TestProxyProtocolIn(t *testing.T) {
	hello := helloFor(t, "web.example")
	const v1 = "PROXY TCP4 192.0.2.7 192.0.2.8 1234 443\r\n"
	bin := v2(0x21, 0x11, "\xc0\x00\x02\x07\xc0\x00\x02\x08\x04\xd2\x01\xbb")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", echo)
		tab := table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web")
		with := func(accept gateway.ProxyAccept, trusted string, lim *gateway.Limits) {
			tab.Listeners = []gateway.Listener{tab.Listeners[0]}
			tab.Listeners[0].ProxyProtocol = &gateway.ProxyProtocol{Accept: accept, Trusted: []string{trusted}}
			tab.Listeners[0].Limits = lim
		}
		with(gateway.ProxyOptional, "127.0.0.0/8", nil)
		f := start(t, Config{Engine: engine, HelloBytes: 2 << 10}, tab)
		closed := func(c net.Conn, reason, detail, peer string) {
			t.Helper()
			if got := f.refused(c); got.Reason != reason || got.Detail != detail || got.Peer != peer {
				t.Errorf("want %s (%s) of %s: %+v", reason, detail, peer, got)
			}
		}
		for _, head := range []string{"", v1, bin, "PROXY UNKNOWN\r\n", v2(0x20, 0, ""), v2(0x21, 0x11, body4+strings.Repeat("x", 3000))} {
			whole := append([]byte(head), hello...)
			c := f.dial(whole)
			expectTag(t, c, "H")
			alive(t, c)
			want := c.LocalAddr().String()
			switch head {
			case v1, bin:
				want = "192.0.2.7:1234"
			}
			cs := f.Connections(100)
			if got := cs[len(cs)-1].Client; got != want && len(head) < 1000 {
				t.Errorf("with %q the client is %s, want %s", head, got, want)
			}
			c.Close()
			f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 0 })
			for _, cut := range []int{1, 5, len(head) - 1, len(head), len(head) + 1, len(head) + 300} {
				if cut < 1 {
					continue
				}
				c := f.dial(nil)
				c.SetNoDelay(true)
				c.Write(whole[:cut])
				f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 1 })
				c.Write(whole[cut:])
				expectTag(t, c, "H")
				c.Close()
				f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 0 })
			}
		}
		for range 2 {
			c := f.dial(nil) // byte for byte
			c.SetNoDelay(true)
			for _, x := range []byte(bin) {
				c.Write([]byte{x})
			}
			c.Write(hello)
			expectTag(t, c, "H")
		}
		other := "192.0.2.7:1234"
		closed(f.dial(append([]byte(v1), "GET /"...)), gateway.RefuseNotTLS, "", other)
		closed(f.dial(append([]byte(bin), helloFor(t, "no.example")...)), gateway.RefuseNoRoute, "", other)
		c := f.dial([]byte("PROXY TCP4 127.0.0.1\r\n"))
		closed(c, gateway.RefuseProxyHeader, "malformed", c.LocalAddr().String())
		c = f.dial([]byte(v1 + v1)) // one is enough
		closed(c, gateway.RefuseNotTLS, "", other)

		with(gateway.ProxyStrict, "127.0.0.1/32", &gateway.Limits{MaxConnectionsPerSource: 1})
		f.apply(tab)
		c = f.dial(hello)
		closed(c, gateway.RefuseProxyHeader, "missing", c.LocalAddr().String())
		c = f.dialFrom("127.0.0.7", append([]byte(v1), hello...))
		closed(c, gateway.RefuseProxyHeader, "not from a trusted network", c.LocalAddr().String())
		expectTag(t, f.dial(append([]byte(v1), hello...)), "H")
		closed(f.dial(append([]byte(v1), hello...)), gateway.RefuseLimit, "max connections of the source", other)
		expectTag(t, f.dial(append([]byte(strings.Replace(v1, "2.7", "2.9", 1)), hello...)), "H")

		with(gateway.ProxyOptional, "10.0.0.0/8", nil)
		f.apply(tab)
		c = f.dial(append([]byte(v1), hello...))
		closed(c, gateway.RefuseNotTLS, "", c.LocalAddr().String())
		expectTag(t, f.dial(hello), "H")
	})
}

// fronted is a backend that reads a PROXY header and the hello, tells of the
// header, and echoes.
func fronted(t *testing.T, hello []byte, seen chan<- proxyHeader) *backend {
	return serve(t, func(c *net.TCPConn) {
		var h proxyHeader
		var got []byte
		for one := make([]byte, 1); h.parse(got) == headerMore; got = append(got, one[0]) {
			if _, err := io.ReadFull(c, one); err != nil {
				t.Errorf("backend: header: %v", err)
				return
			}
		}
		if err := expect(c, hello); h.size != len(got) || err != nil {
			t.Errorf("backend: header %q, %+v; then %v", got, h, err)
			return
		}
		h.size = 0
		seen <- h
		io.WriteString(c, "H")
		echo(c)
	})
}

func TestProxyProtocolOut(t *testing.T) {
	onEngines(t, func(t *testing.T, engine string) {
		for _, version := range []gateway.ProxyVersion{gateway.ProxyV1, gateway.ProxyV2} {
			for _, hello := range [][]byte{helloFor(t, "web.example"), pad(helloFor(t, "web.example"), 63_000)} {
				seen := make(chan proxyHeader, 1)
				b := fronted(t, hello, seen)
				// The first that is tried is one that fails.
				web := clusterOf("web", closedPort(t), b.addr)
				web.Endpoints[1].Priority = 1
				web.SendProxy = version
				f := start(t, Config{Engine: engine}, table([]gateway.Cluster{web}, "web.example", "web"))
				c := f.dial(hello)
				expectTag(t, c, "H")
				alive(t, c)
				want := proxyHeader{src: addrPort(c.LocalAddr()), dst: addrPort(c.RemoteAddr())}
				if got := <-seen; got != want {
					t.Errorf("%s: the endpoint is told %+v, want %+v", version, got, want)
				}
				// Bytes are counted once they are passed on, those of the header are not.
				f.untilCounted(func(gateway.Status) bool { return f.cluster("web").BytesIn == uint64(len(hello))+1 })

				// Through a second gateway, which passes on what it was told.
				through := clusterOf("web", f.addr())
				through.SendProxy = gateway.ProxyV2
				tab := *f.table
				tab.Listeners = []gateway.Listener{tab.Listeners[0]}
				tab.Listeners[0].ProxyProtocol = &gateway.ProxyProtocol{Accept: gateway.ProxyStrict, Trusted: []string{"127.0.0.0/8"}}
				f.apply(&tab)
				first := start(t, Config{Engine: engine}, table([]gateway.Cluster{through}, "web.example", "web"))
				c = first.dial(hello)
				expectTag(t, c, "H")
				want = proxyHeader{src: addrPort(c.LocalAddr()), dst: addrPort(c.RemoteAddr())}
				if got := <-seen; got != want {
					t.Errorf("%s: the endpoint behind two gateways is told %+v, want %+v", version, got, want)
				}
			}
		}
	})
}

// The header waits with the hello for an endpoint that takes its time, and what
// the kernel does not take at once follows.
func TestProxyHeaderBeforeALargeHello(t *testing.T) {
	hello := pad(helloFor(t, "web.example"), 65_000)
	onEngines(t, func(t *testing.T, engine string) {
		var got bytes.Buffer
		read := make(chan error, 1)
		b := serve(t, func(c *net.TCPConn) {
			c.SetReadBuffer(4 << 10)
			_, err := io.CopyN(&got, c, int64(52-24+len(hello)+7))
			read <- err
		})
		web := clusterOf("web", b.addr)
		web.SendProxy = gateway.ProxyV2
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{web}, "web.example", "web"))
		c := f.dial(hello)
		c.Write([]byte("follows"))
		if err := <-read; err != nil {
			t.Fatal(err)
		}
		var h proxyHeader
		if h.parse(got.Bytes()) != headerDone || !bytes.Equal(got.Bytes()[h.size:], append(hello, "follows"...)) {
			t.Errorf("%d bytes with the header %+v", got.Len(), h)
		}
	})
}
