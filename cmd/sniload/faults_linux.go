package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/gateway/sni"
)

// faults checks what comes of endpoints that fail. It runs the forwarder in this
// process, since it asks for its status.
//
// As long as an endpoint has not answered, a forwarder can send the hello to another:
// so whatever one of two does before its first byte must be seen by nobody but the
// operator, to whom the counters tell which it is, and why. One that fails so again
// and again is passed over.
type faults struct {
	*checker
	fw    *sni.Forwarder
	good  netip.AddrPort
	table *gateway.Table

	calls, cut, stalled int
	longest             time.Duration     // of the calls that one of two answered
	causes              map[string]uint64 // of failures of endpoints, by what the status calls them
}

// The times of the forwarder under test.
const (
	faultConnect = 200 * time.Millisecond
	faultAnswer  = 250 * time.Millisecond
	faultProbe   = 100 * time.Millisecond
)

var faultCases = []struct {
	name string
	run  func(f *faults, ctx context.Context) error
}{
	{"nobody listens", (*faults).nobody},
	{"no answer to connecting", (*faults).blackHole},
	{"all of them", (*faults).allBad},
	{"gone, and back", (*faults).goneAndBack},
	{"resets what it accepts", (*faults).resets},
	{"resets what it has read", (*faults).readsAndResets},
	{"closes what it has read", (*faults).closes},
	{"accepts, and stalls", (*faults).stalls},
	{"all of them reset", (*faults).allReset},
}

// running is a forwarder in this process.
type running struct {
	fw   *sni.Forwarder
	addr string
	stop func() error
}

// runForwarder returns when the first listener of the table is bound.
func runForwarder(ctx context.Context, conf sni.Config, table *gateway.Table) (*running, error) {
	fw := sni.New(conf)
	fw.Apply(table)
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- fw.Run(run) }()
	stop := func() error {
		cancel()
		return <-ended
	}
	limited, done := context.WithTimeout(ctx, 10*time.Second)
	defer done()
	for {
		changed := fw.Changed()
		if s := fw.Status(); len(s.Listeners) > 0 && s.Listeners[0].Bound {
			return &running{fw, s.Listeners[0].Address, stop}, nil
		}
		select {
		case <-changed:
		case err := <-ended:
			cancel()
			return nil, fmt.Errorf("run forwarder: it ended: %w", err)
		case <-limited.Done():
			return nil, errors.Join(fmt.Errorf("run forwarder: not bound: %w", context.Cause(limited)), stop())
		}
	}
}

// runBackendHere serves the backend in this process, on a port of its own.
func runBackendHere(ctx context.Context) (addr netip.AddrPort, stop func(), err error) {
	b, err := newBackend([]netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")})
	if err != nil {
		return addr, nil, err
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b.run(run)
	}()
	return b.addrs[0], func() {
		cancel()
		<-ended
	}, nil
}

// route adds a name that leads to a cluster of endpoints, and applies the table.
func (f *faults) route(ctx context.Context, name string, probe *gateway.Probe, endpoints ...netip.AddrPort) (hello []byte, err error) {
	c := gateway.Cluster{Name: name, ConnectTimeout: faultConnect, Probe: probe}
	for _, ep := range endpoints {
		c.Endpoints = append(c.Endpoints, gateway.Endpoint{Address: ep.Addr().String(), Port: int(ep.Port()), Healthy: true, Weight: 1})
	}
	next := *f.table
	next.Index++
	next.Clusters = append(next.Clusters[:len(next.Clusters):len(next.Clusters)], c)
	next.Routes = append(next.Routes[:len(next.Routes):len(next.Routes)], gateway.Route{Match: name, Cluster: name})
	f.table = &next
	f.fw.Apply(f.table)
	limited, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for changed := f.fw.Changed(); f.fw.Status().Applied != next.Index; changed = f.fw.Changed() {
		select {
		case <-changed:
		case <-limited.Done():
			return nil, fmt.Errorf("apply table: %w", context.Cause(limited))
		}
	}
	return newHello(name)
}

// call makes a connection; it is answered, or cut.
func (f *faults) call(ctx context.Context, hello []byte) (ok bool, took time.Duration, err error) {
	limited, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	began := time.Now()
	ok, err = f.answered(limited, hello)
	f.calls++
	return ok, time.Since(began), err
}

// endpoint is what the status says of a cluster and of one of its endpoints.
func (f *faults) endpoint(cluster string, ep netip.AddrPort) (c gateway.ClusterStatus, e gateway.EndpointStatus) {
	for _, c = range f.fw.Status().Clusters {
		if c.Name != cluster {
			continue
		}
		for _, e = range c.Endpoints {
			if e.Address == ep.String() {
				return c, e
			}
		}
	}
	return gateway.ClusterStatus{}, gateway.EndpointStatus{}
}

func (f *faults) counts() gateway.ListenerStatus { return f.fw.Status().Listeners[0] }

// until waits for something that the status is to say.
func (f *faults) until(ctx context.Context, what string, ok func() bool) error {
	limited, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for !ok() {
		if limited.Err() != nil {
			return fmt.Errorf("%s: not within 5s: %+v", what, f.fw.Status())
		}
		settle(limited, 5*time.Millisecond)
	}
	return nil
}

// untilEjected calls until an endpoint is passed over: each call must succeed.
func (f *faults) untilEjected(ctx context.Context, name string, hello []byte, bad netip.AddrPort) error {
	for i := range 200 {
		ok, took, err := f.call(ctx, hello)
		if !ok || err != nil {
			return fmt.Errorf("call %d: answered %t after %s, %w", i, ok, took, err)
		}
		if _, e := f.endpoint(name, bad); !e.EjectedUntil.IsZero() {
			return nil
		}
	}
	_, e := f.endpoint(name, bad)
	return fmt.Errorf("200 calls have not ejected the endpoint: %+v", e)
}

// passedOver calls an endpoint's cluster, whose answers must be quick.
func (f *faults) passedOver(ctx context.Context, name string, hello []byte, bad netip.AddrPort, why string) error {
	for i := range 20 {
		ok, took, err := f.call(ctx, hello)
		if !ok || err != nil || took >= faultConnect {
			return fmt.Errorf("call %d after the ejection: answered %t after %s, %w", i, ok, took, err)
		}
	}
	c, e := f.endpoint(name, bad)
	if c.Failed != 0 || c.Retries != e.Failed || e.Failed != 3 || e.Connected != 0 || !strings.Contains(e.LastError, why) {
		return fmt.Errorf("the counters do not tell: %+v", c)
	}
	if n := f.counts().RefusedTotal; n != 0 {
		return fmt.Errorf("%d connections were refused", n)
	}
	return nil
}

func (f *faults) nobody(ctx context.Context) error {
	bad, err := closedPort(ctx)
	if err != nil {
		return err
	}
	hello, err := f.route(ctx, "nobody.bench.test", nil, f.good, bad)
	if err != nil {
		return err
	}
	if err := f.untilEjected(ctx, "nobody.bench.test", hello, bad); err != nil {
		return err
	}
	return f.passedOver(ctx, "nobody.bench.test", hello, bad, "refused")
}

func (f *faults) blackHole(ctx context.Context) error {
	bad, release, err := fullBacklog(ctx)
	if err != nil {
		return err
	}
	defer release()
	hello, err := f.route(ctx, "hole.bench.test", nil, f.good, bad)
	if err != nil {
		return err
	}
	if err := f.untilEjected(ctx, "hole.bench.test", hello, bad); err != nil {
		return err
	}
	return f.passedOver(ctx, "hole.bench.test", hello, bad, "timed out")
}

// allBad leaves nothing to try: the refusal names what was tried last, and why
// that failed.
func (f *faults) allBad(ctx context.Context) error {
	shut, err := closedPort(ctx)
	if err != nil {
		return err
	}
	hole, release, err := fullBacklog(ctx)
	if err != nil {
		return err
	}
	defer release()
	const name = "all.bench.test"
	hello, err := f.route(ctx, name, nil, shut, hole)
	if err != nil {
		return err
	}
	before := f.counts()
	ok, took, err := f.call(ctx, hello)
	if ok || err != nil || took < faultConnect || took > faultConnect+slack {
		return fmt.Errorf("answered %t after %s, %w", ok, took, err)
	}
	st := f.fw.Status()
	r := st.Refused[0]
	if r.Reason != gateway.RefuseConnect || r.ServerName != name || !strings.Contains(r.Detail, name) ||
		!strings.Contains(r.Detail, shut.String()) && !strings.Contains(r.Detail, hole.String()) {
		return fmt.Errorf("the refusal does not tell: %+v", r)
	}
	if n := st.Listeners[0].Refused[gateway.RefuseConnect] - before.Refused[gateway.RefuseConnect]; n != 1 {
		return fmt.Errorf("%d refusals were counted", n)
	}
	c, a := f.endpoint(name, shut)
	_, b := f.endpoint(name, hole)
	if c.Failed != 1 || a.Failed != 1 || b.Failed != 1 || !strings.Contains(a.LastError, "refused") || !strings.Contains(b.LastError, "timed out") {
		return fmt.Errorf("the counters do not tell: %+v", c)
	}
	return nil
}

// goneAndBack is an endpoint that vanishes under load; a probe finds that it is
// back before the ejection is over.
func (f *faults) goneAndBack(ctx context.Context) error {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	addr := netip.MustParseAddrPort(ln.Addr().String())
	stop := serveHellos(ln)
	defer func() { stop() }()
	const name = "back.bench.test"
	hello, err := f.route(ctx, name, &gateway.Probe{Interval: faultProbe, Timeout: faultConnect}, f.good, addr)
	if err != nil {
		return err
	}
	reached := func() error {
		_, before := f.endpoint(name, addr)
		for i := range 200 {
			if ok, _, err := f.call(ctx, hello); !ok || err != nil {
				return fmt.Errorf("call %d: answered %t, %w", i, ok, err)
			}
			if _, e := f.endpoint(name, addr); e.Connected > before.Connected {
				return nil
			}
		}
		return errors.New("200 calls did not reach the endpoint")
	}
	if err := reached(); err != nil {
		return err
	}
	stop()
	if err := f.untilEjected(ctx, name, hello, addr); err != nil {
		return fmt.Errorf("after it has gone: %w", err)
	}
	if ln, err = new(net.ListenConfig).Listen(ctx, "tcp", addr.String()); err != nil {
		return err
	}
	stop = serveHellos(ln)
	if err := f.until(ctx, "the endpoint is back", func() bool {
		_, e := f.endpoint(name, addr)
		return e.EjectedUntil.IsZero()
	}); err != nil {
		return err
	}
	if err := reached(); err != nil {
		return fmt.Errorf("after it came back: %w", err)
	}
	return nil
}

// unwilling is one of two endpoints that does not answer what it has accepted: no
// call may notice, and the status must tell the reason.
func (f *faults) unwilling(ctx context.Context, name, reason, text string, serve func(c *net.TCPConn)) error {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	bad := netip.MustParseAddrPort(ln.Addr().String())
	stop := accepting(ln, serve)
	defer stop()
	hello, err := f.route(ctx, name, nil, f.good, bad)
	if err != nil {
		return err
	}
	before := f.counts()
	const calls = 60
	cut := 0
	for i := range calls {
		ok, took, err := f.call(ctx, hello)
		if err != nil || took > slack {
			return fmt.Errorf("call %d: after %s, %w", i, took, err)
		}
		if !ok {
			cut++
		}
		f.longest = max(f.longest, took)
	}
	if f.cut += cut; cut > 0 {
		return fmt.Errorf("%d of %d calls were cut", cut, calls)
	}
	return f.told(ctx, name, bad, reason, text, calls, before)
}

// told waits until the status tells that all calls have gone to the good endpoint, and
// of the bad one how often it failed, why, and that it is passed over.
func (f *faults) told(ctx context.Context, name string, bad netip.AddrPort, reason, text string, calls uint64, before gateway.ListenerStatus) error {
	return f.until(ctx, "the counters tell "+reason, func() bool {
		c, e := f.endpoint(name, bad)
		_, good := f.endpoint(name, f.good)
		now := f.counts()
		return good.Connected == calls && good.Failed == 0 && e.Connected == 0 && e.Active == 0 &&
			e.Failed >= 3 && e.Failures[reason] == e.Failed && strings.Contains(e.LastError, text) && !e.EjectedUntil.IsZero() &&
			c.Failed == 0 && c.Retries == e.Failed && now.RefusedTotal == before.RefusedTotal && now.Active == 0
	})
}

// resetNow ends a connection by a reset.
func resetNow(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// readHello reads until the hello is complete.
func readHello(c *net.TCPConn) {
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	b := make([]byte, 64<<10)
	for n := 0; helloLen(b[:n]) == 0; {
		k, err := c.Read(b[n:])
		if n += k; err != nil {
			return
		}
	}
}

func (f *faults) resets(ctx context.Context) error {
	return f.unwilling(ctx, "reset.bench.test", gateway.FailReset, "reset", resetNow)
}

func (f *faults) readsAndResets(ctx context.Context) error {
	return f.unwilling(ctx, "late.bench.test", gateway.FailReset, "reset", func(c *net.TCPConn) {
		readHello(c)
		resetNow(c)
	})
}

func (f *faults) closes(ctx context.Context) error {
	return f.unwilling(ctx, "closed.bench.test", gateway.FailClosed, "closed", func(c *net.TCPConn) {
		readHello(c)
		_ = c.Close()
	})
}

// stalls is one of two endpoints of which the kernel accepts and nobody reads, under
// many calls at once. How many of those may be with another endpoint at a time is
// bounded, so that some wait longer than an endpoint has for its answer.
func (f *faults) stalls(ctx context.Context) error {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer ln.Close()
	bad := netip.MustParseAddrPort(ln.Addr().String())
	const name = "stall.bench.test"
	hello, err := f.route(ctx, name, nil, f.good, bad)
	if err != nil {
		return err
	}
	before := f.counts()
	const calls = 60
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex // guards f.stalled, f.longest and problem
		problem error
	)
	for range calls {
		wg.Go(func() {
			limited, cancel := context.WithTimeout(ctx, answerLimit)
			defer cancel()
			began := time.Now()
			ok, err := f.answered(limited, hello)
			mu.Lock()
			defer mu.Unlock()
			if f.longest = max(f.longest, time.Since(began)); !ok || err != nil {
				f.stalled++
				problem = err
			}
		})
	}
	wg.Wait()
	if f.calls += calls; f.stalled > 0 {
		return fmt.Errorf("%d of %d calls stalled: %w", f.stalled, calls, problem)
	}
	return f.told(ctx, name, bad, gateway.FailNoAnswer, "no answer", calls, before)
}

// allReset leaves nothing to try: the client is cut, and the refusal names what was
// tried last, and what that did.
func (f *faults) allReset(ctx context.Context) error {
	const name = "resets.bench.test"
	var both []netip.AddrPort
	for range 2 {
		ln, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		stop := accepting(ln, func(c *net.TCPConn) {
			readHello(c)
			resetNow(c)
		})
		defer stop()
		both = append(both, netip.MustParseAddrPort(ln.Addr().String()))
	}
	hello, err := f.route(ctx, name, nil, both...)
	if err != nil {
		return err
	}
	before := f.counts()
	ok, took, err := f.call(ctx, hello)
	if ok || err != nil || took > slack {
		return fmt.Errorf("answered %t after %s, %w", ok, took, err)
	}
	return f.until(ctx, "the refusal tells", func() bool {
		st := f.fw.Status()
		if st.Listeners[0].Refused[gateway.RefuseNoAnswer] != before.Refused[gateway.RefuseNoAnswer]+1 || len(st.Refused) == 0 {
			return false
		}
		r := st.Refused[0]
		c, a := f.endpoint(name, both[0])
		_, b := f.endpoint(name, both[1])
		return r.Reason == gateway.RefuseNoAnswer && r.ServerName == name && strings.Contains(r.Detail, name) &&
			(strings.Contains(r.Detail, both[0].String()) || strings.Contains(r.Detail, both[1].String())) &&
			c.Failed == 1 && a.Failures[gateway.FailReset] == 1 && b.Failures[gateway.FailReset] == 1
	})
}

// closedPort is an address where nobody listens.
func closedPort(ctx context.Context) (netip.AddrPort, error) {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.MustParseAddrPort(ln.Addr().String()), ln.Close()
}

// fullBacklog is an address that leaves attempts to connect without an answer: as
// many wait there to be accepted as may.
func fullBacklog(ctx context.Context) (addr netip.AddrPort, release func(), err error) {
	fd, addr, err := listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		return addr, nil, err
	}
	var held []net.Conn
	release = func() {
		for _, c := range held {
			c.Close()
		}
		rawClose(fd)
	}
	if err := unix.Listen(fd, 0); err != nil {
		release()
		return addr, nil, os.NewSyscallError("listen", err)
	}
	d := net.Dialer{Timeout: 100 * time.Millisecond}
	for range 10 {
		c, err := d.DialContext(ctx, "tcp", addr.String())
		if err != nil {
			return addr, release, nil
		}
		held = append(held, c)
	}
	release()
	return addr, nil, errors.New("make a black hole: the backlog does not become full")
}

// accepting serves connections by fn, one after another, until stop is called.
func accepting(ln net.Listener, fn func(c *net.TCPConn)) (stop func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fn(c.(*net.TCPConn))
		}
	})
	return func() {
		ln.Close()
		wg.Wait()
	}
}

// serveHellos answers as the backend does, and closes.
func serveHellos(ln net.Listener) (stop func()) {
	return accepting(ln, func(c *net.TCPConn) {
		defer c.Close()
		readHello(c)
		_, _ = c.Write([]byte("H"))
	})
}

// newFaults runs a forwarder; stop ends it.
func newFaults(ctx context.Context, engine string) (f *faults, stop func() error, err error) {
	good, stopBackend, err := runBackendHere(ctx)
	if err != nil {
		return nil, nil, err
	}
	table := sni.StaticTable([]string{"127.0.0.1:0"}, &sni.Routes{})
	r, err := runForwarder(ctx, sni.Config{Engine: engine, Workers: 2, AnswerTimeout: faultAnswer, EjectBase: time.Minute}, table)
	if err != nil {
		stopBackend()
		return nil, nil, err
	}
	f = &faults{checker: &checker{target: r.addr}, fw: r.fw, good: good, table: table, causes: map[string]uint64{}}
	return f, func() error {
		defer stopBackend()
		for _, c := range r.fw.Status().Clusters {
			for _, e := range c.Endpoints {
				for cause, n := range e.Failures {
					f.causes[cause] += n
				}
			}
		}
		return r.stop()
	}, nil
}

func runFaults(ctx context.Context, fs *flag.FlagSet, args []string) (err error) {
	l := newLoad(fs, 1)
	engine := fs.String("engine", sni.EngineAuto, "`engine` of the forwarder")
	ctx, cancel, err := l.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	var all outcome
	sum := faults{causes: map[string]uint64{}}
	for _, c := range faultCases {
		err := func() error {
			f, stop, err := newFaults(ctx, *engine)
			if err != nil {
				return err
			}
			err = errors.Join(c.run(f, ctx), stop())
			sum.calls, sum.cut, sum.stalled, sum.longest = sum.calls+f.calls, sum.cut+f.cut, sum.stalled+f.stalled, max(sum.longest, f.longest)
			for cause, n := range f.causes {
				sum.causes[cause] += n
			}
			return err
		}()
		if err != nil {
			all.fail(fmt.Errorf("%s: %w", c.name, err))
		}
	}
	all.Metrics = map[string]float64{
		"cases": float64(len(faultCases)), "calls": float64(sum.calls), "cut": float64(sum.cut), "stalled": float64(sum.stalled),
		"longest": sum.longest.Seconds(),
	}
	for _, cause := range []string{gateway.FailRefused, gateway.FailTimeout, gateway.FailReset, gateway.FailClosed, gateway.FailNoAnswer} {
		all.Metrics[cause] = float64(sum.causes[cause])
	}
	return all.print()
}
