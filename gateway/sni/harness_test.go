package sni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/sluicemesh/sluice/gateway"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// onEngines runs a test with each engine of this system.
func onEngines(t *testing.T, test func(t *testing.T, engine string)) {
	for _, engine := range []string{EngineNetpoll, EngineEpoll} {
		t.Run(engine, func(t *testing.T) {
			if engine == EngineEpoll && runtime.GOOS != "linux" {
				t.Skip("epoll needs Linux")
			}
			test(t, engine)
		})
	}
}

// testForwarder is a running forwarder.
type testForwarder struct {
	*Forwarder
	t     testing.TB
	stop  func()
	table *gateway.Table
}

// start runs a forwarder with a table until the test ends.
func start(t testing.TB, cfg Config, table *gateway.Table) *testForwarder {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = hclog.New(&hclog.LoggerOptions{Output: t.Output(), Level: hclog.Debug})
	}
	f := &testForwarder{Forwarder: New(cfg), t: t}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	t.Cleanup(f.stop)
	f.apply(table)
	return f
}

// until waits for a status by which ok is true.
func (f *testForwarder) until(what string, ok func(gateway.Status) bool) gateway.Status {
	f.t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		changed := f.Changed()
		s := f.Status()
		if ok(s) {
			return s
		}
		select {
		case <-changed:
		case <-deadline:
			f.t.Fatalf("%s: not after 10 s: %+v", what, s)
		}
	}
}

// apply hands over a table with the next index and waits until it is in use.
func (f *testForwarder) apply(table *gateway.Table) {
	f.t.Helper()
	next := *table
	next.Index = f.Status().Applied + 1
	f.Apply(&next)
	f.table = &next
	f.until("apply", func(s gateway.Status) bool { return s.Applied == next.Index })
}

func (f *testForwarder) addr() string {
	f.t.Helper()
	s := f.until("bind", func(s gateway.Status) bool { return len(s.Listeners) > 0 && s.Listeners[0].Bound })
	return s.Listeners[0].Address
}

// dial connects to the forwarder and sends data.
func (f *testForwarder) dial(data []byte) *net.TCPConn {
	f.t.Helper()
	c, err := net.Dial("tcp", f.addr())
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write(data); err != nil {
		f.t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

// refused reads until the forwarder closes, and returns the newest refusal.
func (f *testForwarder) refused(c net.Conn) gateway.Refusal {
	f.t.Helper()
	b, err := io.ReadAll(c)
	if len(b) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		f.t.Fatalf("want the connection closed, got %d bytes, %v", len(b), err)
	}
	// One that is shed is closed by another goroutine than the one that tells of it.
	f.untilCounted(func(s gateway.Status) bool { return len(s.Refused) > 0 })
	refused := f.Status().Refused
	for _, r := range refused {
		if r.Peer == c.LocalAddr().String() {
			return r
		}
	}
	return refused[0]
}

func (f *testForwarder) cluster(name string) gateway.ClusterStatus {
	for _, c := range f.Status().Clusters {
		if c.Name == name {
			return c
		}
	}
	return gateway.ClusterStatus{Name: name}
}

// table listens on a free port of loopback; routes are pairs of name and
// cluster.
func table(clusters []gateway.Cluster, routes ...string) *gateway.Table {
	t := &gateway.Table{
		Listeners: []gateway.Listener{{Name: "default", Network: "tcp", Address: "127.0.0.1:0", Mode: gateway.ListenSNI}},
		Clusters:  clusters,
	}
	for i := 0; i < len(routes); i += 2 {
		t.Routes = append(t.Routes, gateway.Route{Match: routes[i], Cluster: routes[i+1]})
	}
	return t
}

func endpoint1(addr string) gateway.Endpoint {
	a, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		panic(err)
	}
	return gateway.Endpoint{Address: a.IP.String(), Port: a.Port, Healthy: true, Weight: 1}
}

func clusterOf(name string, addrs ...string) gateway.Cluster {
	c := gateway.Cluster{Name: name, ConnectTimeout: 5 * time.Second}
	for _, a := range addrs {
		c.Endpoints = append(c.Endpoints, endpoint1(a))
	}
	return c
}

// backend is a TCP server; handle owns the connection until it returns.
type backend struct {
	addr string
}

func serve(t testing.TB, handle func(c *net.TCPConn)) *backend {
	t.Helper()
	return serveOn(t, "127.0.0.1:0", handle)
}

func serveOn(t testing.TB, addr string, handle func(c *net.TCPConn)) *backend {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return serveThere(t, ln, handle)
}

func serveThere(t testing.TB, ln net.Listener, handle func(c *net.TCPConn)) *backend {
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				defer func() {
					mu.Lock()
					delete(open, c)
					mu.Unlock()
					c.Close()
				}()
				c.SetDeadline(time.Now().Add(30 * time.Second))
				handle(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return &backend{addr: ln.Addr().String()}
}

// expect reads exactly want from c.
func expect(c io.Reader, want []byte) error {
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("read %d of %d bytes: %w", n, len(want), err)
	}
	if !bytes.Equal(got, want) {
		return errors.New("other bytes than were sent")
	}
	return nil
}

// greeter is a backend that reads the hello, answers with its tag, and then
// goes on with rest (nil closes).
func greeter(t testing.TB, hello []byte, tag string, rest func(c *net.TCPConn)) *backend {
	return serve(t, func(c *net.TCPConn) {
		if err := expect(c, hello); err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				t.Errorf("backend %s: hello: %v", tag, err)
			}
			return
		}
		io.WriteString(c, tag)
		if rest != nil {
			rest(c)
		}
	})
}

// closedPort returns an address on which nothing listens. It is none that the system
// gives to a connection, so that a test may listen there later.
func closedPort(t testing.TB) string {
	t.Helper()
	for {
		ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10_000+rand.IntN(20_000)))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		return ln.Addr().String()
	}
}

func expectTag(t testing.TB, c net.Conn, tag string) {
	t.Helper()
	if err := expect(c, []byte(tag)); err != nil {
		t.Fatalf("want %q of the backend: %v", tag, err)
	}
}

// untilFDs waits until no more than so many descriptors are open.
func untilFDs(t testing.TB, most int) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for i := 0; openFDs(t) > most; i++ {
		if i == 5000 {
			t.Fatalf("%d descriptors are open, want %d", openFDs(t), most)
		}
		<-tick.C
	}
}

func openFDs(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("no /proc")
	}
	n := 0
	for _, e := range d {
		if l, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(l, "/") {
			n++ // sockets, pipes and the like; not files of the test binary
		}
	}
	return n
}
