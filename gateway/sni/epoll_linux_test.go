package sni

import (
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/sluicemesh/sluice/gateway"
)

// A connection that is idle is this and its two sockets.
func TestConnIsSmall(t *testing.T) {
	if n := unsafe.Sizeof(conn{}); n > 128 {
		t.Errorf("a connection takes %d bytes, want at most 128", n)
	}
}

// idleLoop is a loop that does not run.
func idleLoop(t *testing.T) *loop {
	l, err := newLoop(&epoll{f: New(Config{HalfCloseTimeout: -1})}, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.free)
	l.now, l.clock, l.tick = 0, 0, 0
	return l
}

func TestWheel(t *testing.T) {
	l := idleLoop(t)
	r := rand.New(rand.NewPCG(1, 2))
	const tick = int64(1) << tickShift
	due := map[*conn]int64{}
	var all []*conn
	ln := &listener{}
	ln.use(l.f.newTerms(&gateway.Listener{}))
	for range 300 {
		c := l.newConn()
		c.l, c.owner, c.ep, c.fd, c.phase = ln, &cluster{}, &endpoint{}, [2]int32{-1, -1}, phaseOpen
		all = append(all, c)
	}
	// A timer that has fired shows by the keepalive that it sets.
	fired := func(c *conn) bool { return c.flags[target]&flagKeep != 0 }
	for step := range 20000 {
		c := all[r.IntN(len(all))]
		switch {
		case c.linked && r.IntN(3) == 0:
			l.unschedule(c)
			delete(due, c)
		case !c.linked:
			at := l.now + r.Int64N(int64(1)<<(10+r.IntN(26))) // up to 69 s, most of them soon
			l.schedule(c, at)
			due[c] = at
		default: // only an earlier time counts
			at := l.now + r.Int64N(int64(10*time.Second))
			l.schedule(c, at)
			due[c] = min(due[c], at)
		}
		// The loop sleeps no longer than until the first.
		next := l.nextTimer()
		if (next < 0) != (len(due) == 0) {
			t.Fatalf("step %d: next in %d ms with %d timers", step, next, len(due))
		}
		first := int64(1) << 62
		for _, at := range due {
			first = min(first, at)
		}
		if len(due) > 0 && next*1e6 > max(0, first-l.now)+3*tick {
			t.Fatalf("step %d: sleeps %d ms, the first is due in %d", step, next, (first-l.now)/1e6)
		}
		l.now += r.Int64N(int64(1) << (15 + r.IntN(14)))
		if r.IntN(2000) == 0 {
			l.now += int64(20 * time.Second) // a suspended machine
		}
		l.clock = tickOf(l.now)
		l.advance()
		for len(l.over) > 0 {
			l.fireSome()
		}
		for c, at := range due {
			switch {
			case fired(c) && at > l.now:
				t.Fatalf("step %d: fired %d ms early", step, (at-l.now)/1e6)
			case !fired(c) && at+2*tick <= l.now:
				t.Fatalf("step %d: not fired %d ms after its time", step, (l.now-at)/1e6)
			case fired(c):
				delete(due, c)
				c.flags[target] = 0
			}
		}
	}
}

// Hellos that came one after the other and are late are shed one after the other, to
// the millisecond, even once nothing is listened to any more.
func TestLateHellosAreShedInTurn(t *testing.T) {
	l := idleLoop(t)
	ln := &listener{}
	ln.use(l.f.newTerms(&gateway.Listener{}))
	l.addListener(ln, -1)
	s := l.socks[0]
	const n = 100
	for i := range n {
		c := l.newConn()
		c.l, c.fd, c.phase = ln, [2]int32{-1, -1}, phaseHello
		ln.active.Add(1)
		c.begun = l.newBegun()
		c.begun.id, c.begun.due = c.id, int64(time.Second)+int64(i)*int64(time.Millisecond)
		s.wait.add(c.begun)
	}
	if ms := l.sleep(); ms < 1000 || ms > 1001 {
		t.Errorf("sleeps %d ms, want 1000 or a little more", ms)
	}
	for i := range n / 2 {
		l.now = int64(time.Second) + int64(i)*int64(time.Millisecond)
		l.shed()
		if left := n - 1 - i; s.wait.n != left || ln.active.Load() != int64(left) {
			t.Fatalf("%d are left %d ms after the first was due, want %d", s.wait.n, i, left)
		}
		if ms := l.sleep(); ms < 1 || ms > 2 {
			t.Fatalf("sleeps %d ms, want 1 or a little more", ms)
		}
	}
	l.removeListener(ln)
	l.now += int64(time.Second)
	for turns := 0; len(l.waits) > 0; turns++ {
		if want := n/2 - turns*maxFired; s.wait.n != want {
			t.Fatalf("%d are left after %d turns, want %d", s.wait.n, turns, want)
		}
		l.shed()
	}
	if s.wait.n != 0 || ln.active.Load() != 0 || l.sleep() >= 0 {
		t.Errorf("%d are left, and %d ms to sleep", s.wait.n, l.sleep())
	}
}

func TestBlocks(t *testing.T) {
	l := idleLoop(t)
	for _, n := range []int{0, 1, 2048, 2049, 5000, maxHelloBytes} {
		b := l.block(n)
		if len(b) != 0 || cap(b) < n || cap(b) > max(2*n, 2048) {
			t.Errorf("a block for %d bytes has %d of %d", n, len(b), cap(b))
		}
		l.unblock(append(b, make([]byte, n)...))
		if again := l.block(n); unsafe.SliceData(again) != unsafe.SliceData(b) || len(again) != 0 {
			t.Errorf("a block for %d bytes is not used again", n)
		}
	}
}

// A busy loop must leave the processors to the rest of the program, and give
// back what it took when it ends.
func TestProcsAreLent(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	a := start(t, Config{Engine: EngineEpoll, Workers: 3}, table(nil))
	b := start(t, Config{Engine: EngineEpoll}, table(nil))
	if n := runtime.GOMAXPROCS(0); n != before+3+before {
		t.Errorf("%d processors with 3 and %d loops, want %d", n, before, before+3+before)
	}
	a.stop()
	b.stop()
	if n := runtime.GOMAXPROCS(0); n != before {
		t.Errorf("%d processors when all have ended, want %d", n, before)
	}
}

// A port that another process listens on with SO_REUSEPORT could be shared with
// it; a second agent would silently take half of the connections.
func TestPortIsNotShared(t *testing.T) {
	a := start(t, Config{Engine: EngineEpoll}, table(nil))
	tab := table(nil)
	tab.Listeners[0].Address = a.addr()
	b := start(t, Config{Engine: EngineEpoll}, tab)
	if l := b.Status().Listeners[0]; l.Bound || l.Error == "" {
		t.Errorf("listener: %+v", l)
	}
}

// Every loop has its own socket: connections come to all of them.
func TestLoopsShareTheWork(t *testing.T) {
	hello := helloFor(t, "web.example")
	b := greeter(t, hello, "H", func(c *net.TCPConn) { c.Read(make([]byte, 1)) })
	f := start(t, Config{Engine: EngineEpoll, Workers: 2}, table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
	var wg sync.WaitGroup
	for range 64 {
		c := f.dial(hello)
		wg.Go(func() {
			if err := expect(c, []byte("H")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	f.stop()
	counts := *f.view.Load().clusters[0].plan.Load().endpoints[0].traffic.Load()
	if len(counts) != 2 || counts[0].in.Load() == 0 || counts[1].in.Load() == 0 {
		t.Errorf("%d loops; by the first %d bytes, by the last %d", len(counts), counts[0].in.Load(), counts[len(counts)-1].in.Load())
	}
}
