package sni

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
)

// ends reads until the end, which must come before the deadline.
func ends(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the connection stays open")
	}
}

// alive sends a byte and wants it back.
func alive(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	expectTag(t, c, "x")
}

func echo(c *net.TCPConn) { io.Copy(struct{ io.Writer }{c}, c) }

func TestDrainInOrder(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", echo)
		tab := table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web")
		f := start(t, Config{Engine: engine}, tab)
		addr := f.addr()
		var conns []net.Conn
		for range 6 {
			c := f.dial(hello)
			expectTag(t, c, "H")
			conns = append(conns, c)
			// Ages are known by the tick: the next is to be in another.
			for at, t := f.now(), time.NewTicker(time.Millisecond); f.now()-at < 20e6; <-t.C {
			}
		}
		cs := f.Connections(2)
		if len(cs) != 2 || cs[0].Client != conns[0].LocalAddr().String() || cs[1].Client != conns[1].LocalAddr().String() {
			t.Fatalf("the oldest connections: %+v", cs)
		}
		want := gateway.Connection{
			Listener: "default", Client: cs[0].Client, Cluster: "web", Endpoint: b.addr, Since: cs[0].Since,
			BytesIn: uint64(len(hello)), BytesOut: 1,
		}
		if d := cmp.Diff(want, cs[0]); d != "" {
			t.Errorf("connection (-want +got):\n%s", d)
		}
		if age := time.Since(cs[0].Since); age < 0 || age > 10*time.Second {
			t.Errorf("it is %s old", age)
		}

		d := &drain{f: f.Forwarder}
		if err := d.StopAccepting(t.Context()); err != nil {
			t.Fatal(err)
		}
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			t.Error("a connection is accepted while draining")
		}
		if l := f.Status().Listeners[0]; l.Bound || l.Error != "draining" {
			t.Errorf("listener: %+v", l)
		}
		f.apply(tab) // binds nothing
		if l := f.Status().Listeners[0]; l.Bound {
			t.Errorf("a table opened a listener that drains: %+v", l)
		}
		if n := d.Open(); n != 6 {
			t.Errorf("%d are open, want 6", n)
		}
		if n := d.CloseOldest(2); n != 2 {
			t.Errorf("%d were closed, want 2", n)
		}
		ends(t, conns[0])
		ends(t, conns[1])
		for _, c := range conns[2:] {
			alive(t, c)
		}
		conns[2].Close()
		f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 3 })
		if n := d.CloseOldest(100); n != 3 {
			t.Errorf("%d were closed, want the 3 that were left", n)
		}
		for _, c := range conns[3:] {
			ends(t, c)
		}
		f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 0 })
		wantClosed := map[string]uint64{gateway.CloseDrain: 5, gateway.CloseDone: 1}
		if d := cmp.Diff(wantClosed, f.Status().Listeners[0].Closed); d != "" {
			t.Errorf("closed (-want +got):\n%s", d)
		}
		d.Resume()
		c := f.dial(hello)
		expectTag(t, c, "H")
		alive(t, c)
	})
}

func TestDrain(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", echo)
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		open := f.dial(hello)
		expectTag(t, open, "H")
		half := f.dial(hello[:10])
		f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 2 })
		ctx, cancel := context.WithCancel(t.Context())
		drained, ended := make(chan gateway.Progress, 1), make(chan error, 1)
		go func() {
			ended <- f.Drain(ctx, gateway.Plan{Timeout: 10 * time.Millisecond}, func(p gateway.Progress) {
				if p.Phase == gateway.DrainDrained {
					drained <- p
				}
			})
		}()
		if p := <-drained; p.Open != 0 || p.Closed != 2 {
			t.Errorf("progress: %+v", p)
		}
		ends(t, open)
		ends(t, half)
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("drain: %v", err)
		}
		alive(t, func() net.Conn { c := f.dial(hello); expectTag(t, c, "H"); return c }())

		// It ends with the forwarder.
		go func() { ended <- f.Drain(t.Context(), gateway.Plan{Timeout: time.Hour}, func(gateway.Progress) {}) }()
		f.stop()
		if err := <-ended; !errors.Is(err, gateway.ErrStopped) {
			t.Errorf("drain of a forwarder that ended: %v", err)
		}
		if err := New(Config{}).Drain(t.Context(), gateway.Plan{}, nil); !errors.Is(err, gateway.ErrStopped) {
			t.Errorf("drain of a forwarder that never ran: %v", err)
		}
		if cs := f.Connections(1); cs != nil {
			t.Errorf("connections of a forwarder that ended: %+v", cs)
		}
	})
}

// What waits to be accepted when a drain begins, or a listener is removed, is
// served: closing the socket over it would reset it.
func TestNothingInTheQueueIsReset(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", nil)
		tab := table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web")
		f := start(t, Config{Engine: engine}, tab)
		for range 10 {
			addr := f.addr()
			served := make(chan error, 20)
			for range cap(served) {
				go func() {
					served <- func() error {
						c, err := net.Dial("tcp", addr)
						if errors.Is(err, os.ErrDeadlineExceeded) || err != nil {
							return nil // never got so far
						}
						defer c.Close()
						c.SetDeadline(time.Now().Add(20 * time.Second))
						c.Write(hello)
						return expect(c, []byte("H"))
					}()
				}()
			}
			d := &drain{f: f.Forwarder}
			if err := d.StopAccepting(t.Context()); err != nil {
				t.Fatal(err)
			}
			for range cap(served) {
				if err := <-served; err != nil {
					t.Errorf("a connection that was made is not served: %v", err)
				}
			}
			d.Resume()
		}
	})
}

// Every connection that was accepted is open, refused for one reason, or closed
// for one.
func TestBooksBalance(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", echo)
		dead := closedPort(t)
		f := start(t, Config{Engine: engine, EjectAfter: 2, EjectBase: time.Minute, IdleTimeout: 50 * time.Millisecond},
			table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		c := f.dial(hello) // idle
		expectTag(t, c, "H")
		ends(t, c)
		c = f.dial(hello) // done
		expectTag(t, c, "H")
		c.CloseWrite()
		ends(t, c)
		f.refused(f.dial(helloFor(t, "no.example")))
		f.refused(f.dial([]byte("GET /")))
		reset := f.dial(hello)
		expectTag(t, reset, "H")
		reset.SetLinger(0)
		reset.Close()
		f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 0 })
		l := f.Status().Listeners[0]
		if d := cmp.Diff(map[string]uint64{gateway.RefuseNoRoute: 1, gateway.RefuseNotTLS: 1}, l.Refused); d != "" || l.RefusedTotal != 2 {
			t.Errorf("refused, %d in all (-want +got):\n%s", l.RefusedTotal, d)
		}
		if d := cmp.Diff(map[string]uint64{gateway.CloseDone: 1, gateway.CloseIdle: 1, gateway.CloseReset: 1}, l.Closed); d != "" || l.Accepted != 5 {
			t.Errorf("closed, of %d accepted (-want +got):\n%s", l.Accepted, d)
		}
		// Retries, and until when an endpoint is passed over.
		hello2 := helloFor(t, "two.example")
		b2 := greeter(t, hello2, "H", nil)
		two := clusterOf("two", dead, b2.addr)
		two.Policy = gateway.PolicyRoundRobin
		f.apply(table([]gateway.Cluster{two}, "two.example", "two"))
		for range 6 {
			expectTag(t, f.dial(hello2), "H")
		}
		cs := f.cluster("two")
		if cs.Connected != 6 || cs.Retries != 2 {
			t.Errorf("cluster: %+v", cs)
		}
		for _, e := range cs.Endpoints {
			left := time.Until(e.EjectedUntil)
			if e.Address == dead && (left < 50*time.Second || left > time.Minute) || e.Address != dead && !e.EjectedUntil.IsZero() {
				t.Errorf("endpoint: %+v", e)
			}
		}
	})
}
