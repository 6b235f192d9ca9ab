package sni

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
)

func TestEcho(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", func(c *net.TCPConn) { io.Copy(struct{ io.Writer }{c}, c) })
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		c := f.dial(hello)
		expectTag(t, c, "H")
		const size = 64 << 20
		sent, heard := sha256.New(), sha256.New()
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() {
			src := rand.NewChaCha8([32]byte{1})
			buf := make([]byte, 97<<10)
			for left := size; left > 0; {
				n := min(left, len(buf))
				src.Read(buf[:n])
				sent.Write(buf[:n])
				if _, err := c.Write(buf[:n]); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				left -= n
			}
			c.CloseWrite()
		})
		n, err := io.Copy(heard, c)
		if err != nil || n != size {
			t.Fatalf("read %d of %d bytes: %v", n, size, err)
		}
		wg.Wait()
		if !bytes.Equal(sent.Sum(nil), heard.Sum(nil)) {
			t.Fatal("the bytes differ")
		}
		c.Close()
		f.stop()
		want := gateway.ClusterStatus{
			Name: "web", Connected: 1, BytesIn: uint64(len(hello)) + size, BytesOut: 1 + size,
			Endpoints: []gateway.EndpointStatus{{Address: b.addr, Connected: 1, BytesIn: uint64(len(hello)) + size, BytesOut: 1 + size}},
		}
		got := f.cluster("web")
		times := got.ConnectTimes
		got.ConnectTimes = nil
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("status (-want +got):\n%s", d)
		}
		if times == nil || times.Sum < 0 || times.Sum > gateway.Duration(time.Second) {
			t.Errorf("connect times: %+v", times)
		}
		if l := f.Status().Listeners[0]; l.Active != 0 || l.Accepted != 1 || l.RefusedTotal != 0 {
			t.Errorf("listener: %+v", l)
		}
	})
}

func TestHalfClose(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		// "count": the client ends first, the answer comes after its end.
		count := greeter(t, hello, "H", func(c *net.TCPConn) {
			n, err := io.Copy(io.Discard, c)
			if err != nil {
				t.Errorf("backend: %v", err)
			}
			binary.Write(c, binary.BigEndian, n)
		})
		// "end": the backend ends first, the client speaks after its end.
		heard := make(chan string, 1)
		end := greeter(t, hello, "H", func(c *net.TCPConn) {
			c.CloseWrite()
			b, err := io.ReadAll(c)
			heard <- fmt.Sprint(string(b), err)
		})
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("web", count.addr)}, "web.example", "web"))
		for _, size := range []int64{0, 6, 100_000, 16 << 20} {
			c := f.dial(hello)
			expectTag(t, c, "H")
			c.Write(make([]byte, size))
			c.CloseWrite()
			var n int64
			if err := binary.Read(c, binary.BigEndian, &n); err != nil || n != size {
				t.Fatalf("the backend counted %d of %d: %v", n, size, err)
			}
			if k, err := c.Read(make([]byte, 1)); k != 0 || err != io.EOF {
				t.Fatalf("after the answer: %d bytes, %v", k, err)
			}
		}
		f.apply(table([]gateway.Cluster{clusterOf("web", end.addr)}, "web.example", "web"))
		c := f.dial(hello)
		expectTag(t, c, "H")
		if k, err := c.Read(make([]byte, 1)); k != 0 || err != io.EOF {
			t.Fatalf("want the backend's end: %d bytes, %v", k, err)
		}
		io.WriteString(c, "still here")
		c.CloseWrite()
		if got := <-heard; got != "still here<nil>" {
			t.Errorf("the backend heard %q", got)
		}
	})
}

func TestHalfCloseTimeout(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		quiet := serve(t, func(c *net.TCPConn) {
			io.ReadAll(c)
			<-t.Context().Done()
		})
		f := start(t, Config{Engine: engine, HalfCloseTimeout: 50 * time.Millisecond},
			table([]gateway.Cluster{clusterOf("web", quiet.addr)}, "web.example", "web"))
		c := f.dial(hello)
		c.CloseWrite()
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a half-closed connection stays for ever")
		}
	})
}

func TestIdleTimeout(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		tab := table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web")
		ends := func(f *testForwarder) {
			c := f.dial(hello)
			expectTag(t, c, "H")
			if _, err := c.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("an idle connection stays for ever")
			}
		}
		ends(start(t, Config{Engine: engine, IdleTimeout: 50 * time.Millisecond}, tab))
		// That of a listener goes before.
		tab.Listeners[0].IdleTimeout = 50 * time.Millisecond
		ends(start(t, Config{Engine: engine, IdleTimeout: time.Hour}, tab))
	})
}

// What has moved bytes is not idle, however long the forwarder slept before.
func TestIdleTimeoutCountsFromTheLastByte(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", echo)
		const idle = time.Second
		f := start(t, Config{Engine: engine, IdleTimeout: idle},
			table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		c := f.dial(hello)
		expectTag(t, c, "H")
		for range 3 {
			<-time.After(idle * 6 / 10)
			alive(t, c)
		}
	})
}

func TestHelloInPieces(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		for name, data := range map[string][]byte{
			"segments of 1":     hello,
			"records of 50":     records(hello, 50),
			"records of 1":      records(hello, 1),
			"with what follows": append(bytes.Clone(hello), "early"...),
			"60 KiB":            pad(hello, 60_000),
		} {
			t.Run(name, func(t *testing.T) {
				b := greeter(t, data, "H", nil)
				f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
				step := len(data)
				if name == "segments of 1" {
					step = 1
				}
				c := f.dial(nil)
				c.SetNoDelay(true)
				for i := 0; i < len(data); i += step {
					if _, err := c.Write(data[i:min(i+step, len(data))]); err != nil {
						t.Fatal(err)
					}
				}
				expectTag(t, c, "H")
			})
		}
	})
}

func TestRefusals(t *testing.T) {
	hello := helloFor(t, "web.example")
	down := clusterOf("down", "127.0.0.1:9")
	down.Endpoints[0].Healthy, down.Endpoints[0].Why = false, "check \"service:down\" is critical"
	onEngines(t, func(t *testing.T, engine string) {
		refusing := closedPort(t)
		tab := table([]gateway.Cluster{
			clusterOf("empty"), down, clusterOf("refusing", refusing),
		}, "down.example", "down", "empty.example", "empty", "refusing.example", "refusing")
		f := start(t, Config{Engine: engine, HelloBytes: 8 << 10}, tab)
		alpn := []string{"consul~http", "h2"}
		for _, tc := range []struct {
			name string
			send []byte
			end  bool // close after sending
			want gateway.Refusal
		}{
			{name: "not tls", send: []byte("GET / HTTP/1.1\r\n\r\n"), want: gateway.Refusal{Reason: gateway.RefuseNotTLS}},
			{name: "too large", send: pad(hello, 9000)[:8<<10], want: gateway.Refusal{Reason: gateway.RefuseHelloTooLarge}},
			{name: "no name", send: withoutName(t), want: gateway.Refusal{Reason: gateway.RefuseNoServerName}},
			{name: "bad name", send: withName(t, "a..b"), want: gateway.Refusal{Reason: gateway.RefuseBadServerName, ServerName: "a..b"}},
			{name: "no route", send: hello, want: gateway.Refusal{Reason: gateway.RefuseNoRoute, ServerName: "web.example", ALPN: alpn}},
			{name: "no endpoint", send: helloFor(t, "empty.example"), want: gateway.Refusal{Reason: gateway.RefuseNoEndpoint,
				ServerName: "empty.example", ALPN: alpn, Detail: "cluster empty has no endpoint"}},
			{name: "critical", send: helloFor(t, "down.example"), want: gateway.Refusal{Reason: gateway.RefuseNoEndpoint,
				ServerName: "down.example", ALPN: alpn, Detail: "cluster down: none of 1 endpoints is healthy"}},
			{name: "refused", send: helloFor(t, "refusing.example"), want: gateway.Refusal{Reason: gateway.RefuseConnect,
				ServerName: "refusing.example", ALPN: alpn,
				Detail: "cluster refusing, attempt 1: " + refusing + ": connection refused"}},
			{name: "gone", send: hello[:100], end: true, want: gateway.Refusal{Reason: gateway.RefuseClientGone, HelloBytes: 100}},
			{name: "gone at once", end: true, want: gateway.Refusal{Reason: gateway.RefuseClientGone}},
		} {
			c := f.dial(tc.send)
			if tc.end {
				c.CloseWrite()
			}
			got := f.refused(c)
			if got.At.IsZero() || got.Peer != c.LocalAddr().String() || got.Listener != "default" {
				t.Errorf("%s: refusal %+v", tc.name, got)
			}
			if got.HelloBytes > len(tc.send) || tc.want.Reason != gateway.RefuseHelloTooLarge && got.HelloBytes != len(tc.send) {
				t.Errorf("%s: %d bytes of %d", tc.name, got.HelloBytes, len(tc.send))
			}
			tc.want.At, tc.want.Peer, tc.want.Listener, tc.want.HelloBytes = got.At, got.Peer, got.Listener, got.HelloBytes
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("%s (-want +got):\n%s", tc.name, d)
			}
		}
		if l := f.Status().Listeners[0]; l.Accepted != 10 || l.RefusedTotal != 10 {
			t.Errorf("listener: %+v", l)
		}
		if c := f.cluster("refusing"); c.Failed != 1 || c.Endpoints[0].Failed != 1 || c.Endpoints[0].LastError != "connection refused" {
			t.Errorf("cluster: %+v", c)
		}
		for range gateway.KeptRefusals {
			f.refused(f.dial(hello))
		}
		if n := len(f.Status().Refused); n != gateway.KeptRefusals {
			t.Errorf("%d refusals are kept, want %d", n, gateway.KeptRefusals)
		}
	})
}

func withoutName(t testing.TB) []byte {
	h := withName(t, "x")
	// The last extension is the name's: make it one that nobody knows.
	h[len(h)-10], h[len(h)-9] = 0xfa, 0xfa
	return h
}

func TestSlowHelloIsShed(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		f := start(t, Config{Engine: engine, HelloTimeout: 50 * time.Millisecond}, table(nil))
		for _, n := range []int{0, 1, 700} {
			begin := time.Now()
			got := f.refused(f.dial(hello[:n]))
			if got.Reason != gateway.RefuseHelloTimeout || got.HelloBytes != n {
				t.Errorf("%d bytes: %+v", n, got)
			}
			if d := time.Since(begin); d < 45*time.Millisecond {
				t.Errorf("%d bytes: shed after %s", n, d)
			}
		}
	})
}

func TestNextEndpointAfterRefusal(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", nil)
		web := clusterOf("web", closedPort(t), b.addr, closedPort(t))
		spare := clusterOf("spare", b.addr)
		lost := clusterOf("lost", closedPort(t))
		lost.Failover = []string{"missing", "spare"}
		crit := clusterOf("crit", closedPort(t))
		crit.Endpoints[0].Healthy, crit.Endpoints[0].Why = false, "critical"
		crit.Failover = []string{"spare"}
		prio := clusterOf("prio", closedPort(t), b.addr)
		prio.Endpoints[1].Priority = 1
		f := start(t, Config{Engine: engine, EjectAfter: 1000}, table([]gateway.Cluster{web, spare, lost, crit, prio}))
		for _, name := range []string{"web", "lost", "crit", "prio"} {
			next := *f.table
			next.Routes = []gateway.Route{{Match: "web.example", Cluster: name}}
			f.apply(&next)
			for range 8 {
				expectTag(t, f.dial(hello), "H")
			}
		}
		if c := f.cluster("web"); c.Connected != 8 || c.Failed != 0 {
			t.Errorf("web: %+v", c)
		}
		// The failover's endpoints are accounted to the failover.
		if c := f.cluster("spare"); c.Connected != 16 {
			t.Errorf("spare: %+v", c)
		}
		if c := f.cluster("crit"); len(c.Endpoints) > 0 && c.Endpoints[0].Failed > 0 {
			t.Errorf("a critical endpoint was dialled: %+v", c)
		}
		if c := f.cluster("prio"); c.Connected != 8 || c.Endpoints[0].Failed+c.Endpoints[1].Failed != 8 {
			t.Errorf("prio: %+v", c)
		}
	})
}

func TestSpillOver(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		near, far := greeter(t, hello, "N", nil), greeter(t, hello, "F", nil)
		tab := table(nil, "web.example", "web")
		tab.Zone = "eu/a"
		with := func(addrs ...string) *gateway.Table {
			web := clusterOf("web", addrs...)
			web.Endpoints[0].Zone, web.Endpoints[1].Zone = "eu/a", "us/b"
			web.Endpoints[1].Weight = 100
			next := *tab
			next.Clusters = []gateway.Cluster{web}
			return &next
		}
		f := start(t, Config{Engine: engine}, with(near.addr, far.addr))
		for range 10 {
			expectTag(t, f.dial(hello), "N")
		}
		f.apply(with(closedPort(t), far.addr))
		for range 10 {
			expectTag(t, f.dial(hello), "F")
		}
		next := with(near.addr, far.addr)
		next.Clusters[0].Endpoints[0].Healthy, next.Clusters[0].Endpoints[0].Why = false, "critical"
		f.apply(next)
		expectTag(t, f.dial(hello), "F")
	})
}

// blackhole is an address whose SYNs are not answered: a full backlog.
func blackhole(t testing.TB) string {
	t.Helper()
	addr, _ := blackholeOn(t, "127.0.0.1:0")
	return addr
}

// blackholeOn is a black hole until it is opened: what comes again then is answered.
func blackholeOn(t testing.TB, addr string) (bound string, open func(handle func(c *net.TCPConn))) {
	t.Helper()
	want := netip.MustParseAddrPort(addr)
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "")
	t.Cleanup(func() { file.Close() })
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrInet4{Addr: want.Addr().As4(), Port: int(want.Port())}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	bound = netip.AddrPortFrom(want.Addr(), uint16(sa.(*syscall.SockaddrInet4).Port)).String()
	open = func(handle func(c *net.TCPConn)) {
		ln, err := net.FileListener(file)
		if err != nil {
			t.Fatal(err)
		}
		serveThere(t, ln, handle)
	}
	for {
		c, err := net.DialTimeout("tcp", bound, 100*time.Millisecond)
		if err != nil {
			return bound, open
		}
		t.Cleanup(func() { c.Close() })
	}
}

func TestConnectTimeout(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", nil)
		silent := blackhole(t)
		web := clusterOf("web", silent, b.addr)
		web.Endpoints[1].Priority = 1
		web.ConnectTimeout = 50 * time.Millisecond
		alone := clusterOf("alone", silent)
		alone.ConnectTimeout = 50 * time.Millisecond
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{alone, web}, "alone.example", "alone", "web.example", "web"))
		expectTag(t, f.dial(hello), "H")
		if c := f.cluster("web"); c.Connected != 1 {
			t.Errorf("web: %+v", c)
		}
		got := f.refused(f.dial(helloFor(t, "alone.example")))
		if got.Reason != gateway.RefuseConnect || got.Detail != "cluster alone, attempt 1: "+silent+": connect timed out" {
			t.Errorf("refusal: %+v", got)
		}
	})
}

func TestEndpointResets(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", func(c *net.TCPConn) {
			c.Read(make([]byte, 1))
			c.SetLinger(0)
		})
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		c := f.dial(hello)
		expectTag(t, c, "H")
		c.Write([]byte("x"))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("want the endpoint's reset, got %v", err)
		}
	})
}

func TestClientResets(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		seen := make(chan error, 1)
		b := greeter(t, hello, "H", func(c *net.TCPConn) {
			_, err := c.Read(make([]byte, 1))
			seen <- err
		})
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		c := f.dial(hello)
		expectTag(t, c, "H")
		c.SetLinger(0)
		c.Close()
		if err := <-seen; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("want the client's reset, got %v", err)
		}
	})
}

func TestBackPressure(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		const offered = 256 << 20
		var sent atomic.Int64
		stalled := make(chan struct{})
		b := greeter(t, hello, "H", func(c *net.TCPConn) {
			buf := make([]byte, 1<<20)
			for sent.Load() < offered {
				// A write that takes so long is one that is held back.
				c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
				n, err := c.Write(buf)
				sent.Add(int64(n))
				if errors.Is(err, os.ErrDeadlineExceeded) {
					close(stalled)
					c.SetWriteDeadline(time.Now().Add(20 * time.Second))
					c.Write(bytes.Repeat([]byte("z"), 4<<20))
					sent.Add(4 << 20)
					return
				} else if err != nil {
					t.Errorf("backend: %v", err)
					return
				}
			}
			t.Error("a client that does not read is sent everything")
			close(stalled)
		})
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		c := f.dial(hello)
		expectTag(t, c, "H")
		<-stalled
		n, err := io.Copy(io.Discard, c)
		if err != nil || n != sent.Load() {
			t.Errorf("read %d of %d bytes: %v", n, sent.Load(), err)
		}
	})
}

func TestTablesUnderLoad(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		a := greeter(t, hello, "A", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		b := greeter(t, hello, "B", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		tabs := [2]*gateway.Table{
			table([]gateway.Cluster{clusterOf("web", a.addr)}, "web.example", "web"),
			table([]gateway.Cluster{clusterOf("other", b.addr), clusterOf("web", a.addr, b.addr)}, "*.example", "other"),
		}
		f := start(t, Config{Engine: engine}, tabs[0])
		addr := f.addr()
		kept := f.dial(hello)
		expectTag(t, kept, "A")

		var wg sync.WaitGroup
		var ok [256]atomic.Int64
		done := make(chan struct{})
		for range 4 {
			wg.Go(func() {
				for {
					select {
					case <-done:
						return
					default:
					}
					c, err := net.Dial("tcp", addr)
					if err != nil {
						t.Errorf("dial: %v", err)
						return
					}
					c.SetDeadline(time.Now().Add(10 * time.Second))
					c.Write(hello)
					var tag [1]byte
					if _, err := io.ReadFull(c, tag[:]); err != nil {
						t.Errorf("a connection failed: %v", err)
					}
					c.Close()
					ok[tag[0]].Add(1)
				}
			})
		}
		for i := 1; i <= 300 || ok['A'].Load() == 0 || ok['B'].Load() == 0; i++ {
			f.apply(tabs[i%2])
		}
		close(done)
		wg.Wait()
		if got := f.addr(); got != addr {
			t.Errorf("the listener moved from %s to %s", addr, got)
		}
		if _, err := kept.Write([]byte("x")); err != nil {
			t.Errorf("the open connection is gone: %v", err)
		}
		total := uint64(ok['A'].Load() + ok['B'].Load() + 1)
		if n := f.Status().Listeners[0].Accepted; n != total {
			t.Errorf("%d accepted, want %d: a counter was lost with a table", n, total)
		}
		t.Logf("%d connections over the tables", total)
	})
}

func TestWildcardByDatacenter(t *testing.T) {
	const td = "internal.11111111-2222-3333-4444-555555555555.consul"
	onEngines(t, func(t *testing.T, engine string) {
		gw := func(tag string) *backend {
			return serve(t, func(c *net.TCPConn) {
				c.Read(make([]byte, 4096))
				io.WriteString(c, tag)
			})
		}
		dc2, dc3, local := gw("2"), gw("3"), gw("L")
		f := start(t, Config{Engine: engine}, table(
			[]gateway.Cluster{clusterOf("dc2."+td, dc2.addr), clusterOf("dc3."+td, dc3.addr), clusterOf("web", local.addr)},
			"*.dc2."+td, "dc2."+td, "*.dc3."+td, "dc3."+td, "web.default.dc1."+td, "web"))
		for name, want := range map[string]string{
			"web.default.dc1." + td:    "L",
			"web.default.dc2." + td:    "2",
			"v1.web.default.dc2." + td: "2",
			"api.default.dc3." + td:    "3",
		} {
			c := f.dial(helloFor(t, name))
			if err := expect(c, []byte(want)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		for _, name := range []string{"dc2." + td, "api.default.dc1." + td, "web.default.dc4." + td} {
			if got := f.refused(f.dial(helloFor(t, name))); got.Reason != gateway.RefuseNoRoute {
				t.Errorf("%s: %+v", name, got)
			}
		}
	})
}

func TestListeners(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		base := table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web")
		taken, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer taken.Close()
		with := func(ls ...gateway.Listener) *gateway.Table {
			next := *base
			next.Listeners = ls
			return &next
		}
		l := func(name, addr string) gateway.Listener {
			return gateway.Listener{Name: name, Network: "tcp", Address: addr, Mode: gateway.ListenSNI}
		}
		f := start(t, Config{Engine: engine, DrainTimeout: 50 * time.Millisecond, BindRetryMin: time.Millisecond, BindRetryMax: 10 * time.Millisecond},
			with(l("one", "127.0.0.1:0"), l("six", "[::1]:0"), l("any", "[::]:0"), l("again", "127.0.0.1:0"),
				l("bad", "nowhere"), l("taken", taken.Addr().String()),
				gateway.Listener{Name: "public", Address: "127.0.0.1:1", Mode: gateway.ListenInbound}))
		s := f.Status()
		if len(s.Listeners) != 6 {
			t.Fatalf("listeners: %+v", s.Listeners)
		}
		for _, ls := range s.Listeners {
			wantBound := ls.Name == "one" || ls.Name == "six" || ls.Name == "any"
			if ls.Bound != wantBound || ls.Bound != (ls.Error == "") {
				t.Errorf("listener %+v", ls)
			}
		}
		_, anyPort, _ := net.SplitHostPort(s.Listeners[2].Address)
		for _, addr := range []string{s.Listeners[1].Address, "127.0.0.1:" + anyPort, "[::1]:" + anyPort} {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			c.Write(hello)
			expectTag(t, c, "H")
			c.Close()
		}

		// What was taken is bound once it is free.
		taken.Close()
		f.until("bind again", func(s gateway.Status) bool { return s.Listeners[5].Bound })

		// A name may change while the socket stays; a removed listener refuses, and
		// its connections end after the time for draining.
		kept, gone := f.dial(hello), func() *net.TCPConn {
			c, err := net.Dial("tcp", taken.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			c.SetDeadline(time.Now().Add(10 * time.Second))
			c.Write(hello)
			return c.(*net.TCPConn)
		}()
		expectTag(t, kept, "H")
		expectTag(t, gone, "H")
		addr := f.addr()
		f.apply(with(l("uno", "127.0.0.1:0")))
		if got := f.Status().Listeners; len(got) != 1 || got[0].Address != addr || got[0].Name != "uno" || got[0].Active != 1 {
			t.Errorf("listeners: %+v", got)
		}
		if c, err := net.Dial("tcp", taken.Addr().String()); err == nil {
			c.Close()
			t.Error("a removed listener accepts")
		}
		if _, err := gone.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a connection of a removed listener stays: %v", err)
		}
		if _, err := kept.Write([]byte("x")); err != nil {
			t.Errorf("a connection of the other listener is gone: %v", err)
		}
	})
}

func TestLimits(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		web := clusterOf("web", b.addr)
		web.MaxConnections = 2
		tab := table([]gateway.Cluster{web}, "web.example", "web")
		tab.Listeners[0].MaxConnections = 3
		f := start(t, Config{Engine: engine}, tab)
		for range 2 {
			expectTag(t, f.dial(hello), "H")
		}
		if got := f.refused(f.dial(hello)); got.Reason != gateway.RefuseLimit || got.Detail != "max connections of cluster web" {
			t.Errorf("refusal: %+v", got)
		}
		half := f.dial(hello[:10])
		f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 3 })
		if got := f.refused(f.dial(hello)); got.Reason != gateway.RefuseLimit || got.Detail != "max connections of the listener" {
			t.Errorf("refusal: %+v", got)
		}
		half.Close()
	})
}

// untilCounted waits for a counter, of which nothing tells when it changes.
func (f *testForwarder) untilCounted(ok func(gateway.Status) bool) {
	f.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for !ok(f.Status()) {
		select {
		case <-tick.C:
		case <-deadline:
			s := f.Status()
			f.t.Fatalf("not after 10 s: %+v, %+v", s.Listeners, s.Clusters)
		}
	}
}

func TestHostnames(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", nil)
		port := netip.MustParseAddrPort(b.addr).Port()
		var answer atomic.Pointer[[]netip.Addr]
		asked := make(chan struct{}, 1000)
		lookup := func(_ context.Context, host string) ([]netip.Addr, time.Duration, error) {
			defer func() { asked <- struct{}{} }()
			if a := answer.Load(); a != nil && host == "gw.dc2.example" {
				return *a, 0, nil
			}
			return nil, 0, errors.New("no such host")
		}
		web := clusterOf("web")
		web.Endpoints = []gateway.Endpoint{{Address: "gw.dc2.example", Port: int(port), Healthy: true, Weight: 1}}
		f := start(t, Config{Engine: engine, Lookup: lookup, LookupInterval: 5 * time.Millisecond, EjectAfter: 100},
			table([]gateway.Cluster{web}, "web.example", "web"))
		got := f.refused(f.dial(hello))
		if got.Reason != gateway.RefuseNoEndpoint || got.Detail != "cluster web: no address is known of 1 healthy endpoints" {
			t.Errorf("refusal: %+v", got)
		}
		if e := f.cluster("web").Endpoints[0].LastError; e != "resolve: no such host" {
			t.Errorf("endpoint error %q", e)
		}
		// Of several addresses the one that answers is found.
		answer.Store(&[]netip.Addr{netip.MustParseAddr("127.0.0.9"), netip.MustParseAddr("::1"), netip.MustParseAddr("127.0.0.1")})
		again := func() {
			for range len(asked) + 2 {
				<-asked
			}
		}
		again()
		for range 6 {
			expectTag(t, f.dial(hello), "H")
		}
		// The last good answer is kept.
		answer.Store(nil)
		again()
		expectTag(t, f.dial(hello), "H")
	})
}

// One of a name's addresses that swallows connections costs the first of them a
// moment, and the others nothing.
func TestAddressWithoutARoute(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		silent := netip.MustParseAddrPort(blackhole(t)) // on 127.0.0.1
		good := netip.MustParseAddr("127.0.0.3")
		serveOn(t, netip.AddrPortFrom(good, silent.Port()).String(), func(c *net.TCPConn) {
			if expect(c, hello) == nil {
				c.Write([]byte("H"))
				echo(c)
			}
		})
		lookup := func(context.Context, string) ([]netip.Addr, time.Duration, error) {
			return []netip.Addr{good, silent.Addr()}, time.Minute, nil
		}
		web := clusterOf("web")
		web.ConnectTimeout = time.Minute
		web.Endpoints = []gateway.Endpoint{{Address: "gw.dc2.example", Port: int(silent.Port()), Healthy: true, Weight: 1}}
		f := start(t, Config{Engine: engine, Lookup: lookup, ConnectDeadline: time.Minute, EjectBase: time.Hour, EjectMax: time.Hour},
			table([]gateway.Cluster{web}, "web.example", "web"))
		begin := time.Now()
		for range 20 {
			expectTag(t, f.dial(hello), "H")
		}
		if took := time.Since(begin); took > 10*time.Second {
			t.Errorf("20 connections took %s", took)
		}
		c := f.cluster("web")
		if c.Connected != 20 || c.Endpoints[0].Failed != 1 {
			t.Errorf("want one failure to find out: %+v", c)
		}
	})
}

// Of two addresses that swallow connections, the one that takes them in the end has
// them, whichever was begun with, and however late that is.
func TestAddressesRace(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		silent, _ := blackholeOn(t, "127.0.0.1:0")
		port := netip.MustParseAddrPort(silent).Port()
		slow, open := blackholeOn(t, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), port).String())
		lookup := func(context.Context, string) ([]netip.Addr, time.Duration, error) {
			return []netip.Addr{netip.MustParseAddrPort(silent).Addr(), netip.MustParseAddrPort(slow).Addr()}, time.Minute, nil
		}
		web := clusterOf("web")
		web.ConnectTimeout = time.Minute
		web.Endpoints = []gateway.Endpoint{{Address: "gw.dc2.example", Port: int(port), Healthy: true, Weight: 1}}
		f := start(t, Config{Engine: engine, Lookup: lookup, ConnectDeadline: time.Minute}, table([]gateway.Cluster{web}, "web.example", "web"))
		const n = 6
		var conns []*net.TCPConn
		for range n {
			conns = append(conns, f.dial(hello))
		}
		f.untilCounted(func(s gateway.Status) bool { return len(s.Clusters) == 1 && s.Clusters[0].Retries == n })
		open(func(c *net.TCPConn) {
			if expect(c, hello) == nil {
				c.Write([]byte("H"))
				echo(c)
			}
		})
		for _, c := range conns {
			expectTag(t, c, "H")
		}
		c := f.cluster("web")
		ep := c.Endpoints[0]
		if c.Connected != n || c.Active != n || ep.Failed > n || ep.Failures[gateway.FailTimeout] != ep.Failed || !ep.EjectedUntil.IsZero() {
			t.Errorf("want all by one address, and those told that were begun with the other: %+v", c)
		}
		for range 2 { // who did not find it out is told
			expectTag(t, f.dial(hello), "H")
		}
	})
}

func TestStopWhileAddressesRace(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		one, _ := blackholeOn(t, "127.0.0.1:0")
		port := netip.MustParseAddrPort(one).Port()
		blackholeOn(t, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.3"), port).String())
		lookup := func(context.Context, string) ([]netip.Addr, time.Duration, error) {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.0.0.3")}, time.Minute, nil
		}
		web := clusterOf("web")
		web.ConnectTimeout = time.Minute
		web.Endpoints = []gateway.Endpoint{{Address: "gw.dc2.example", Port: int(port), Healthy: true, Weight: 1}}
		before := openFDs(t)
		f := start(t, Config{Engine: engine, Lookup: lookup, ConnectDeadline: time.Minute}, table([]gateway.Cluster{web}, "web.example", "web"))
		const n = 6
		for range n {
			f.dial(hello)
		}
		f.untilCounted(func(s gateway.Status) bool { return len(s.Clusters) == 1 && s.Clusters[0].Retries == n })
		f.stop()
		if all := f.Status().Clusters; len(all) > 0 {
			t.Errorf("want none that goes on or has failed: %+v", all)
		}
		untilFDs(t, before+n) // the clients' ends
	})
}

func TestNothingIsLeft(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		silent := blackhole(t)
		before := openFDs(t)
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("dead", silent), clusterOf("web", b.addr)},
			"dead.example", "dead", "web.example", "web"))
		var conns []net.Conn
		for i := range 30 {
			c, err := net.Dial("tcp", f.addr())
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, c)
			c.SetDeadline(time.Now().Add(10 * time.Second))
			switch i % 3 {
			case 0:
				c.Write(hello)
				expectTag(t, c, "H")
			case 1:
				c.Write(hello[:i])
			case 2:
				c.Write(helloFor(t, "dead.example"))
			}
		}
		f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 30 })
		f.stop()
		for _, c := range conns {
			if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("a connection outlives the forwarder")
			}
			c.Close()
		}
		s := f.Status()
		if s.Listeners[0].Active != 0 || s.Listeners[0].Bound {
			t.Errorf("listener: %+v", s.Listeners[0])
		}
		for _, c := range s.Clusters {
			if c.Active != 0 || c.Endpoints[0].Active != 0 {
				t.Errorf("cluster: %+v", c)
			}
		}
		// The backend's ends of the connections close when their handlers see it.
		untilFDs(t, before)
	})
}

func TestRunRefusesABadConfig(t *testing.T) {
	err := New(Config{Engine: "kqueue", HelloBytes: 1 << 20, ConnectAttempts: 9}).Run(t.Context())
	want := `sni: engine "kqueue" is none of auto, epoll, netpoll
sni: hello bytes 1048576 is not from 64 to 65536
sni: connect attempts 9 is not from 1 to 8`
	if err == nil || err.Error() != want {
		t.Errorf("got %v", err)
	}
}

// TestChaos has many clients behave in every way at once, and checks that what
// they are owed arrives and that nothing is left of them.
func TestChaos(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		// The backend does as the first byte after the hello says.
		b := serve(t, func(c *net.TCPConn) {
			if expect(c, hello) != nil {
				return
			}
			var what [1]byte
			if _, err := io.ReadFull(c, what[:]); err != nil {
				return
			}
			switch what[0] {
			case 'e': // echo
				io.Copy(struct{ io.Writer }{c}, c)
			case 'r': // reset, with bytes on the way
				c.Write(make([]byte, 100_000))
				c.SetLinger(0)
			case 'f': // end at once, and take what comes
				c.CloseWrite()
				io.Copy(io.Discard, c)
			case 's': // send without end
				for buf := make([]byte, 64<<10); ; {
					if _, err := c.Write(buf); err != nil {
						return
					}
				}
			}
		})
		dead := clusterOf("dead", closedPort(t))
		f := start(t, Config{Engine: engine, EjectAfter: 1 << 20}, table([]gateway.Cluster{dead, clusterOf("web", b.addr, dead.Endpoints[0].Address+":"+fmt.Sprint(dead.Endpoints[0].Port))},
			"dead.example", "dead", "web.example", "web"))
		addr := f.addr()
		deadHello := helloFor(t, "dead.example")
		one := func(r *rand.Rand) error {
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				return err
			}
			c := conn.(*net.TCPConn)
			defer c.Close()
			c.SetDeadline(time.Now().Add(20 * time.Second))
			switch r.IntN(8) {
			case 0: // part of a hello, and gone
				c.Write(hello[:r.IntN(len(hello))])
				if r.IntN(2) == 0 {
					c.SetLinger(0)
				}
			case 1: // nowhere to go
				c.Write(deadHello)
				if n, _ := c.Read(make([]byte, 1)); n != 0 {
					return errors.New("an answer from a dead cluster")
				}
			case 2: // reset by the backend
				c.Write(append(bytes.Clone(hello), 'r'))
				if n, err := io.Copy(io.Discard, c); err == nil {
					return fmt.Errorf("a reset reads as an end after %d bytes", n)
				}
			case 3: // the backend's end comes first
				c.Write(append(bytes.Clone(hello), 'f'))
				if n, err := io.Copy(io.Discard, c); n != 0 || err != nil {
					return fmt.Errorf("want an end: %d bytes, %v", n, err)
				}
				c.Write(make([]byte, r.IntN(1<<20)))
			case 4: // goes away while it is sent to
				c.Write(append(bytes.Clone(hello), 's'))
				io.CopyN(io.Discard, c, int64(r.IntN(4<<20)))
			default: // echo of some size, split somewhere
				body := make([]byte, r.IntN(1<<(8+r.IntN(14))))
				for i := range body {
					body[i] = byte(r.Uint32())
				}
				all := append(append(bytes.Clone(hello), 'e'), body...)
				at := r.IntN(len(all))
				var wg sync.WaitGroup
				defer wg.Wait()
				wg.Go(func() {
					c.Write(all[:at])
					c.Write(all[at:])
					c.CloseWrite()
				})
				if err := expect(c, body); err != nil {
					return fmt.Errorf("echo of %d, split at %d: %w", len(body), at, err)
				}
				if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					return fmt.Errorf("after the echo: %d bytes, %v", n, err)
				}
			}
			return nil
		}
		var wg sync.WaitGroup
		for seed := range uint64(8) {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(seed, 1))
				for range 60 {
					if err := one(r); err != nil {
						t.Errorf("client %d: %v", seed, err)
						return
					}
				}
			})
		}
		wg.Wait()
		f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 0 })
		f.stop()
		s := f.Status()
		if l := s.Listeners[0]; l.Accepted != 480 {
			t.Errorf("listener: %+v", l)
		}
		for _, c := range s.Clusters {
			for _, e := range c.Endpoints {
				if c.Active != 0 || e.Active != 0 {
					t.Errorf("cluster: %+v", c)
				}
			}
		}
	})
}

func TestIPv6Endpoint(t *testing.T) {
	hello := helloFor(t, "web.example")
	ln, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6: ", err)
	}
	addr := ln.Addr().String()
	ln.Close()
	onEngines(t, func(t *testing.T, engine string) {
		b := serveOn(t, addr, func(c *net.TCPConn) {
			if err := expect(c, hello); err != nil {
				t.Error(err)
			}
			io.WriteString(c, "6")
		})
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		expectTag(t, f.dial(hello), "6")
		if got := f.cluster("web").Endpoints[0].Address; got != addr {
			t.Errorf("the endpoint is shown as %s, want %s", got, addr)
		}
	})
}
