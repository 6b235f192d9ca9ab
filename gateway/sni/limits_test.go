package sni

import (
	"io"
	"math"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

func TestRate(t *testing.T) {
	taken := func(r rate, from, to time.Duration, full *atomic.Int64) (n int) {
		for now := from; now < to; now += time.Millisecond {
			for r.take(full, int64(now)) {
				n++
			}
		}
		return n
	}
	for _, tc := range []struct {
		perSecond   float64
		burst       int
		first, next int // in the first millisecond, and in the 10 s after it
	}{
		{10, 0, 10, 100},
		{10, 1, 1, 100},
		{0.5, 0, 1, 5},
		{0.5, 3, 3, 5},
		{1000, 50, 50, 10000},
		{1e9, 1, 1, 10000}, // at most one each time it is asked
	} {
		r, full := newRate(tc.perSecond, tc.burst), &atomic.Int64{}
		if tc.perSecond < 1e9 {
			first := taken(r, 0, time.Millisecond, full)
			if next := taken(r, time.Millisecond, 10*time.Second+time.Millisecond, full); next < tc.next-1 || next > tc.next+1 {
				t.Errorf("%v a second, burst %d: %d in 10 s, want %d", tc.perSecond, tc.burst, next, tc.next)
			}
			if first != tc.first {
				t.Errorf("%v a second, burst %d: %d at once, want %d", tc.perSecond, tc.burst, first, tc.first)
			}
		}
	}
	for _, none := range []float64{0, -1, math.NaN()} {
		if r := newRate(none, 5); r != (rate{}) {
			t.Errorf("a rate of %v is %+v", none, r)
		}
	}
	// What is hardly ever is not what is always.
	r, full := newRate(1e-300, math.MaxInt), &atomic.Int64{}
	if first, second, third := r.take(full, 0), r.take(full, 0), r.take(full, 0); !first || !second || third {
		t.Errorf("%+v does not admit a burst alone", r)
	}
}

func TestSourceKey(t *testing.T) {
	key := func(s string) uint64 { return sourceKey(netip.MustParseAddr(s)) }
	for _, same := range [][2]string{
		{"10.0.0.1", "::ffff:10.0.0.1"}, {"2001:db8::1", "2001:db8::ffff:1"}, {"fe80::1%lo", "fe80::2"},
	} {
		if key(same[0]) != key(same[1]) {
			t.Errorf("%s and %s are told apart", same[0], same[1])
		}
	}
	seen := map[uint64]string{0: "nobody"}
	for _, a := range []string{"10.0.0.1", "10.0.0.2", "0.0.0.0", "::1", "2001:db8::", "2001:db8:0:1::"} {
		if other, ok := seen[key(a)]; ok {
			t.Errorf("%s counts as %s", a, other)
		}
		seen[key(a)] = a
	}
}

func TestSources(t *testing.T) {
	tab := newSources()
	const second = int64(time.Second)
	r := newRate(1, 2)
	take := func(key uint64, now int64) (*source, string) { return tab.acquire(key, now, 3, r) }
	var held []*source
	for i := range 2 {
		s, limit := take(7, 0)
		if limit != "" {
			t.Fatalf("connection %d: %s", i, limit)
		}
		held = append(held, s)
	}
	if _, limit := take(7, 0); limit != "connection rate of the source" {
		t.Errorf("a third at once: %q", limit)
	}
	s, _ := take(7, second)
	held = append(held, s)
	if _, limit := take(7, 10*second); limit != "max connections of the source" {
		t.Errorf("a fourth: %q", limit)
	}
	if _, limit := take(8, 10*second); limit != "" {
		t.Errorf("another source: %q", limit)
	}
	held[0].release()
	if s, limit := take(7, 20*second); limit != "" {
		t.Errorf("after an end: %q", limit)
	} else {
		held[0] = s
	}
	// Many others come and go; who has a connection keeps its place.
	for k := uint64(1000); k < 1000+4*sourceSets*sourceWays; k++ {
		if s, limit := take(k, 20*second); limit != "" {
			t.Fatalf("source %d: %s", k, limit)
		} else if s != nil {
			s.release()
		}
	}
	if _, limit := take(7, 20*second); limit != "max connections of the source" {
		t.Errorf("it was forgotten: %q", limit)
	}
	// Whoever has used up a part of its rate keeps its place until it is full again,
	// so now nearly all are taken; afterwards others have theirs.
	free := func(now int64) (n int) {
		for k := uint64(1 << 40); k < 1<<40+1000; k++ {
			if s, _ := take(k, now); s != nil {
				n++
				s.release()
			}
		}
		return n
	}
	if n := free(20 * second); n > 100 {
		t.Errorf("%d of 1000 new sources found a place in a full table", n)
	}
	if n := free(60 * second); n != 1000 {
		t.Errorf("%d of 1000 new sources found a place when all others had aged", n)
	}
}

func TestSourcesAtOnce(t *testing.T) {
	tab := newSources()
	var wg sync.WaitGroup
	var most atomic.Int32
	var active [64]atomic.Int32
	for g := range uint64(8) {
		wg.Go(func() {
			for i := range uint64(20000) {
				key := 1 + (i*7+g)%64
				s, limit := tab.acquire(key, int64(i), 4, rate{})
				if limit != "" || s == nil {
					continue
				}
				n := active[key-1].Add(1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				active[key-1].Add(-1)
				s.release()
			}
		})
	}
	wg.Wait()
	if most.Load() > 4+1 { // one may be counted elsewhere at the very begin
		t.Errorf("%d connections of one source, want at most 4", most.Load())
	}
	for i := range tab.sets {
		for j := range tab.sets[i] {
			if n := tab.sets[i][j].active.Load(); n != 0 {
				t.Fatalf("%d connections are left", n)
			}
		}
	}
}

// dialFrom is dial with an address of the client's own.
func (f *testForwarder) dialFrom(ip string, data []byte) *net.TCPConn {
	f.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
	c, err := d.Dial("tcp", f.addr())
	if err != nil {
		f.t.Skip("no second address of loopback: ", err)
	}
	f.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	c.Write(data)
	return c.(*net.TCPConn)
}

func TestLimitsByName(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		web := clusterOf("web", b.addr)
		tab := table([]gateway.Cluster{web}, "web.example", "web")
		f := start(t, Config{Engine: engine}, tab)
		addr := f.addr()
		with := func(l *gateway.Limits, perHour float64) {
			next := *tab
			next.Listeners = []gateway.Listener{tab.Listeners[0]}
			next.Listeners[0].Limits = l
			next.Clusters = []gateway.Cluster{web}
			next.Clusters[0].ConnectionRate, next.Clusters[0].ConnectionBurst = perHour/3600, 2
			f.apply(&next)
		}
		limited := func(c net.Conn, what string) {
			t.Helper()
			if got := f.refused(c); got.Reason != gateway.RefuseLimit || got.Detail != what || got.Peer != c.LocalAddr().String() {
				t.Errorf("want %q: %+v", what, got)
			}
		}

		with(&gateway.Limits{ConnectionRate: 0.001, ConnectionBurst: 3}, 0)
		for range 3 {
			expectTag(t, f.dial(hello), "H")
		}
		limited(f.dial(nil), "connection rate of the listener")

		with(&gateway.Limits{ConnectionRatePerSource: 0.001, ConnectionBurstPerSource: 2}, 0)
		for range 2 {
			expectTag(t, f.dialFrom("127.0.0.1", hello), "H")
		}
		limited(f.dialFrom("127.0.0.1", nil), "connection rate of the source")
		expectTag(t, f.dialFrom("127.0.0.7", hello), "H")

		with(nil, 0)
		with(&gateway.Limits{MaxConnectionsPerSource: 2}, 0)
		var open []*net.TCPConn
		for range 2 {
			c := f.dialFrom("127.0.0.1", hello)
			expectTag(t, c, "H")
			open = append(open, c)
		}
		limited(f.dialFrom("127.0.0.1", nil), "max connections of the source")
		expectTag(t, f.dialFrom("127.0.0.7", hello), "H")
		active := f.Status().Listeners[0].Active
		open[0].Close()
		f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active < active })
		expectTag(t, f.dialFrom("127.0.0.1", hello), "H")

		with(nil, 1)
		for range 2 {
			expectTag(t, f.dial(hello), "H")
		}
		if got := f.refused(f.dial(hello)); got.Detail != "connection rate of cluster web" || got.Reason != gateway.RefuseLimit {
			t.Errorf("refusal: %+v", got)
		}
		with(nil, 0)
		expectTag(t, f.dial(hello), "H")
		if f.addr() != addr {
			t.Error("a change of the limits moved the listener")
		}
	})
}

// A flood of clients that do not send their hello is shed from the oldest on, and
// whoever sends one is served meanwhile.
func TestFloodOfHalfHellos(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		f := start(t, Config{Engine: engine, Workers: 1, PendingHellos: 8, HelloTimeout: time.Minute},
			table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		waiting := func(n int64) {
			f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == n })
		}
		open := f.dial(hello)
		expectTag(t, open, "H")
		var half []*net.TCPConn
		for i := range 8 {
			half = append(half, f.dial(hello[:1+i]))
			waiting(int64(2 + i))
		}
		// One of them is a client after all, and makes room.
		half[3].Write(hello[4:])
		expectTag(t, half[3], "H")
		half = append(half, f.dial(hello[:9]))
		waiting(10)
		half = append(half, f.dial(hello[:10]))
		got := f.refused(half[0])
		if got.Reason != gateway.RefuseLimit || got.Detail != "pending hellos of the listener" {
			t.Errorf("refusal: %+v", got)
		}
		for range 200 {
			half = append(half, f.dial(nil))
		}
		expectTag(t, f.dial(hello), "H")
		for _, c := range half[1:3] {
			if got := f.refused(c); got.Reason != gateway.RefuseLimit {
				t.Errorf("refusal: %+v", got)
			}
		}
		// The three that were served, and the newest: the last that was served may have
		// been among those waited for, and have taken the place of one.
		f.untilCounted(func(s gateway.Status) bool {
			l := s.Listeners[0]
			return l.Accepted == 212 && (l.Active == 3+8 || l.Active == 3+7)
		})
		last := half[len(half)-1]
		last.Write(hello)
		expectTag(t, last, "H")
	})
}
