package sni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/gateway"
)

// Forwarder forwards TLS connections by server name. It implements
// [gateway.DataPlane].
type Forwarder struct {
	cfg   Config
	log   hclog.Logger
	lines *accessLog
	epoch time.Time // of the forwarder's clock

	pending atomic.Pointer[gateway.Table]
	wake    chan struct{} // capacity 1
	calls   chan func(*control)
	started atomic.Bool
	ended   chan struct{} // closed when Run has ended

	// routes is all that a connection reads of the table in use.
	routes atomic.Pointer[index]
	// view is what Status reads.
	view    atomic.Pointer[view]
	changed atomic.Pointer[chan struct{}]
	refused gateway.Refusals
	fault   atomic.Pointer[string]
	// faultLogged is when a fault was last logged, 0 for never.
	faultLogged atomic.Int64
}

var (
	_ gateway.DataPlane        = (*Forwarder)(nil)
	_ gateway.Drainer          = (*Forwarder)(nil)
	_ gateway.ConnectionLister = (*Forwarder)(nil)
)

// view is the table in use, as Status shows it. Immutable.
type view struct {
	applied   uint64
	appliedAt time.Time
	listeners []*listener
	clusters  []*cluster // by name
	probed    []*cluster // those whose endpoints are probed
	live      []*cluster // those that the table has
	failback  *gateway.Failback
	rebalance *gateway.Rebalance
}

// listener is an address that a table wants bound. It lives as long as the
// address is in the tables, whatever its name becomes.
type listener struct {
	address string // as the table says; the key
	terms   atomic.Pointer[terms]
	state   atomic.Pointer[bindState]

	active   atomic.Int64
	accepted atomic.Uint64
	full     atomic.Int64 // of the rate of connections
	sources  atomic.Pointer[sources]
	closed   [closeReasons]atomic.Uint64
	refused  [len(refuseReasons) + 1]atomic.Uint64 // the last is of reasons not listed

	// Owned by the control goroutine.
	retryAt time.Time
	backoff time.Duration
	held    bool   // bound, and takes nothing new
	tuned   string // the congestion control that its sockets were set to
}

// The sides of a connection. A direction is named by the side it comes from.
const (
	client = iota
	target
)

// closeReason is why a connection ended, as an index of closeNames.
type closeReason uint8

const (
	closeDone closeReason = iota
	closeReset
	closeIdle
	closeDrain
	closeRemoved
	closeStopped
	closeFailback
	closeRebalance
	closeReasons
)

var closeNames = [closeReasons]string{
	closeDone: gateway.CloseDone, closeReset: gateway.CloseReset, closeIdle: gateway.CloseIdle,
	closeDrain: gateway.CloseDrain, closeRemoved: gateway.CloseRemoved, closeStopped: gateway.CloseStopped,
	closeFailback: gateway.CloseFailback, closeRebalance: gateway.CloseRebalance,
}

// refuseReasons are those that are counted one by one.
var refuseReasons = [...]string{
	gateway.RefuseHelloTimeout, gateway.RefuseHelloTooLarge, gateway.RefuseNotTLS, gateway.RefuseNoServerName,
	gateway.RefuseBadServerName, gateway.RefuseNoRoute, gateway.RefuseNoEndpoint, gateway.RefuseConnect,
	gateway.RefuseLimit, gateway.RefuseClientGone, gateway.RefuseProxyHeader, gateway.RefuseNoAnswer,
}

// countRefusal counts a connection that reaches no endpoint.
func (l *listener) countRefusal(reason string) {
	for i, r := range refuseReasons {
		if r == reason {
			l.refused[i].Add(1)
			return
		}
	}
	l.refused[len(refuseReasons)].Add(1)
}

// bindState is immutable.
type bindState struct {
	address string // as bound
	bound   bool
	err     string
}

func (l *listener) name() string { return l.terms.Load().spec.Name }

// use takes the terms of a new table.
func (l *listener) use(t *terms) {
	if was := l.terms.Swap(t); was != nil && was.rate != t.rate {
		l.full.Store(0)
	}
	switch old := l.sources.Load(); {
	case !t.bySource():
		l.sources.Store(nil)
	case old == nil:
		l.sources.Store(newSources())
	}
}

// engine moves the bytes. Its methods are called by the control goroutine only.
type engine interface {
	// listen binds l and begins to accept; it returns the address as bound.
	listen(l *listener) (string, error)
	// unlisten closes l's socket, and returns when nothing more is accepted.
	unlisten(l *listener)
	// hold makes l's sockets take nothing new, while what has begun to connect may
	// still be accepted. An error means that it cannot be had.
	hold(l *listener) error
	// tune sets the algorithm of congestion control of l's sockets to that of its
	// terms. Connections that are open stay as they are.
	tune(l *listener) error
	// closeConns closes the connections that came by l.
	closeConns(l *listener, why closeReason)
	// oldest returns the connections that want is true of in the order of their ages,
	// at most limit; nil is all. want may be called on other goroutines, one at a time.
	oldest(limit int, want func(h handle) bool) []handle
	// describe tells of connections; those that have ended meanwhile are left out.
	describe(hs []handle) []gateway.Connection
	// closeThese closes connections, and returns how many there still were.
	closeThese(hs []handle, why closeReason) int
	// stop closes everything and returns when nothing is left.
	stop()
}

// New makes a forwarder. A Config that does not validate is told by Run.
func New(cfg Config) *Forwarder {
	f := &Forwarder{
		cfg: cfg.withDefaults(), epoch: time.Now(), wake: make(chan struct{}, 1),
		calls: make(chan func(*control)), ended: make(chan struct{}),
	}
	f.log = f.cfg.Logger.Named("sni")
	f.refused.Logger = f.log
	f.lines = newAccessLog(f.cfg.AccessLog)
	f.view.Store(&view{})
	ch := make(chan struct{})
	f.changed.Store(&ch)
	return f
}

// Changed returns a channel that closes when another table is in use or a
// listener's binding has changed. Who waits for a state takes the channel before
// reading Status.
func (f *Forwarder) Changed() <-chan struct{} { return *f.changed.Load() }

// notify is called by the control goroutine only.
func (f *Forwarder) notify() {
	ch := make(chan struct{})
	close(*f.changed.Swap(&ch))
}

// watch calls look until ctx ends: at once, when another table is in use, and when
// the time is over that look says. With false it says that only a table matters.
func (f *Forwarder) watch(ctx context.Context, look func(ctx context.Context) (wait time.Duration, ok bool)) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		changed := f.Changed()
		if wait, ok := look(ctx); ok {
			timer.Reset(wait)
		} else {
			timer.Stop()
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-timer.C:
		}
	}
}

// Apply implements [gateway.DataPlane].
func (f *Forwarder) Apply(t *gateway.Table) {
	f.pending.Store(t)
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// now reads the forwarder's clock, which is monotonic.
func (f *Forwarder) now() int64 { return int64(time.Since(f.epoch)) }

// faultLogInterval bounds how often faults are logged; all show in Status.
const faultLogInterval = time.Second

// fail records a fault of the data plane itself.
func (f *Forwarder) fail(err error) {
	text := err.Error()
	f.fault.Store(&text)
	now, last := f.now(), f.faultLogged.Load()
	if (last == 0 || now-last >= int64(faultLogInterval)) && f.faultLogged.CompareAndSwap(last, now) {
		f.log.Error("data plane fault", "error", err)
	}
}

// Run implements [gateway.DataPlane]. It may be called once.
func (f *Forwarder) Run(ctx context.Context) error {
	if err := f.cfg.Validate(); err != nil {
		return err
	}
	if f.started.Swap(true) {
		return errors.New("run forwarder: it has been run before")
	}
	eng, err := f.newEngine()
	if err != nil {
		return fmt.Errorf("start engine %s: %w", f.cfg.Engine, err)
	}
	c := &control{
		f: f, eng: eng,
		reg: registry{
			clusters: map[string]*cluster{},
			dns:      newResolver(ctx, f.cfg.Lookup, f.cfg.LookupInterval, f.log),
		},
		listeners: map[string]*listener{},
	}
	f.lines.start()
	var besides sync.WaitGroup
	besides.Go(func() { newProber(f).run(ctx) })
	besides.Go(func() { newMover(f).run(ctx) })
	c.run(ctx)
	close(f.ended)
	besides.Wait()
	eng.stop()
	f.lines.stop()
	c.reg.dns.stop()
	for _, l := range c.listeners {
		l.state.Store(&bindState{address: l.address, err: "stopped"})
	}
	f.notify()
	return nil
}

// newEngine starts the engine that the configuration names.
func (f *Forwarder) newEngine() (engine, error) {
	if f.cfg.Engine != EngineNetpoll {
		eng, err := newEpoll(f)
		if err == nil {
			f.log.Debug("engine started", "name", EngineEpoll)
			return eng, nil
		}
		if f.cfg.Engine == EngineEpoll {
			return nil, err
		}
		f.log.Info("epoll is not to be had, using the portable engine", "cause", err)
	}
	return newNetpoll(f), nil
}

// control applies tables: everything that changes, changes here.
type control struct {
	f         *Forwarder
	eng       engine
	reg       registry
	listeners map[string]*listener // by address
	draining  []draining
	index     *index
	stopped   bool // nothing is bound, see StopAccepting
}

// draining is a removed listener whose connections are closed at a time.
type draining struct {
	l  *listener
	at time.Time
}

func (c *control) run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.f.wake:
			if t := c.f.pending.Swap(nil); t != nil {
				c.apply(ctx, t)
			}
		case call := <-c.f.calls:
			call(c)
		case <-timer.C:
		}
		timer.Reset(c.due())
	}
}

// due does what has become due and returns the time until something will be.
func (c *control) due() time.Duration {
	now := time.Now()
	next := now.Add(time.Hour)
	for _, l := range c.listeners {
		if st := l.state.Load(); st != nil && st.bound {
			continue
		}
		if c.stopped {
			l.state.Store(&bindState{address: l.address, err: "draining"})
			continue
		}
		if !now.Before(l.retryAt) {
			c.bind(l, now)
		}
		if !l.state.Load().bound && l.retryAt.Before(next) {
			next = l.retryAt
		}
	}
	c.draining = slices.DeleteFunc(c.draining, func(d draining) bool {
		if d.l.active.Load() == 0 {
			return true
		}
		if !now.Before(d.at) {
			c.eng.closeConns(d.l, closeRemoved)
			return true
		}
		if d.at.Before(next) {
			next = d.at
		}
		return false
	})
	return max(time.Until(next), 0)
}

func (c *control) bind(l *listener, now time.Time) {
	addr, err := c.eng.listen(l)
	if err == nil {
		st := &bindState{address: addr, bound: true}
		if l.tuned = ""; l.terms.Load().spec.CongestionControl != "" {
			c.tune(l, st)
		}
		l.state.Store(st)
		l.backoff = 0
		c.f.notify()
		c.f.log.Info("listening", "listener", l.name(), "address", addr)
		return
	}
	l.backoff = min(max(2*l.backoff, c.f.cfg.BindRetryMin), c.f.cfg.BindRetryMax)
	l.retryAt = now.Add(l.backoff)
	if old := l.state.Swap(&bindState{address: l.address, err: err.Error()}); old == nil || old.err != err.Error() {
		c.f.notify()
		c.f.log.Warn("listener not bound", "listener", l.name(), "address", l.address, "error", err)
	}
}

// tune sets the sockets of a listener to its terms. What cannot be set shows in
// its state; it is bound all the same.
func (c *control) tune(l *listener, st *bindState) {
	l.tuned = l.terms.Load().spec.CongestionControl
	if err := c.eng.tune(l); err != nil {
		st.err = err.Error()
		c.f.log.Warn("congestion control not set", "listener", l.name(), "error", err)
	}
}

// apply puts a table into use: first everything is prepared, then it is swapped
// in, clusters before the routes that lead to them.
func (c *control) apply(ctx context.Context, t *gateway.Table) {
	c.reg.congestion = c.checkCongestion(t)
	p := c.reg.prepare(t)
	c.reg.dns.await(ctx, c.f.cfg.LookupWait)
	x, dangling := newIndex(c.index, t.Routes, p.clusters)
	c.reg.commit(p)
	c.index = x
	c.f.routes.Store(x)

	v := &view{applied: t.Index, appliedAt: time.Now(), failback: t.Failback, rebalance: t.Rebalance}
	for _, cl := range c.reg.clusters {
		v.clusters = append(v.clusters, cl)
	}
	slices.SortFunc(v.clusters, func(a, b *cluster) int { return strings.Compare(a.name, b.name) })
	for _, cl := range v.clusters {
		if cl.spec == nil {
			continue
		}
		v.live = append(v.live, cl)
		if cl.plan.Load().probe != nil {
			v.probed = append(v.probed, cl)
		}
	}
	v.listeners = c.applyListeners(t)
	c.due() // binds what is new, so that a table in use has said whether it could
	c.f.view.Store(v)
	c.f.notify()
	if len(dangling) > 0 {
		c.f.fail(fmt.Errorf("apply table %d: %d routes lead to no cluster, such as %q", t.Index, len(dangling), dangling[0]))
	}
}

// checkCongestion returns the algorithms of congestion control that the clusters
// of a table ask for and that can be had.
func (c *control) checkCongestion(t *gateway.Table) map[string]bool {
	ok, seen := map[string]bool{}, map[string]bool{}
	for i := range t.Clusters {
		name := t.Clusters[i].CongestionControl
		if name == "" || seen[name] {
			continue
		}
		seen[name] = true
		if err := checkCongestion(name); err != nil {
			c.f.fail(fmt.Errorf("connect to endpoints: %w", err))
			continue
		}
		ok[name] = true
	}
	return ok
}

func (c *control) applyListeners(t *gateway.Table) []*listener {
	var out []*listener
	want := map[string]bool{}
	for i := range t.Listeners {
		spec := &t.Listeners[i]
		if spec.Mode != gateway.ListenSNI {
			continue
		}
		if want[spec.Address] {
			dup := &listener{address: spec.Address}
			dup.use(c.f.newTerms(spec))
			dup.state.Store(&bindState{address: spec.Address, err: "another listener of the table has the same address"})
			out = append(out, dup)
			continue
		}
		want[spec.Address] = true
		l := c.listeners[spec.Address]
		if l == nil {
			l = &listener{address: spec.Address}
			c.listeners[spec.Address] = l
		}
		l.use(c.f.newTerms(spec))
		if st := l.state.Load(); st != nil && st.bound && l.tuned != spec.CongestionControl {
			next := &bindState{address: st.address, bound: true}
			c.tune(l, next)
			l.state.Store(next)
		}
		out = append(out, l)
	}
	for addr, l := range c.listeners {
		if want[addr] {
			continue
		}
		delete(c.listeners, addr)
		if st := l.state.Load(); st != nil && st.bound {
			c.eng.unlisten(l)
			l.state.Store(&bindState{address: addr, err: "removed"})
		}
		c.draining = append(c.draining, draining{l, time.Now().Add(max(c.f.cfg.DrainTimeout, 0))})
		c.f.log.Info("listener removed", "listener", l.name(), "address", addr, "connections", l.active.Load())
	}
	return out
}

// checkListener tells what the engines have in common to say of an address.
func checkListener(l *listener) (netip.AddrPort, error) {
	if n := l.terms.Load().spec.Network; n != "" && n != "tcp" {
		return netip.AddrPort{}, fmt.Errorf("network %q is not for listeners of mode sni", n)
	}
	a, err := netip.ParseAddrPort(l.address)
	if err != nil {
		return a, fmt.Errorf("address %q is no ip:port", l.address)
	}
	ip := a.Addr().Unmap()
	if ip == netip.IPv6Unspecified() && !hasIPv6() {
		ip = netip.IPv4Unspecified() // every address of the host is meant
	}
	return netip.AddrPortFrom(ip, a.Port()), nil
}

// hasIPv6 is false where the kernel was told to have none.
func hasIPv6() bool {
	ln, err := net.Listen("tcp6", "[::]:0")
	if err != nil {
		return false
	}
	ln.Close()
	return true
}

// Status implements [gateway.DataPlane].
func (f *Forwarder) Status() gateway.Status {
	v := f.view.Load()
	s := gateway.Status{Applied: v.applied, AppliedAt: v.appliedAt, Refused: f.refused.Newest()}
	if e := f.fault.Load(); e != nil {
		s.LastError = *e
	}
	for _, l := range v.listeners {
		ls := gateway.ListenerStatus{
			Name: l.name(), Address: l.address, Active: l.active.Load(),
			Accepted: l.accepted.Load(),
		}
		for i := range l.refused {
			n := l.refused[i].Load()
			ls.RefusedTotal += n
			if i < len(refuseReasons) {
				ls.Refused = countOf(ls.Refused, refuseReasons[i], n)
			}
		}
		for i := range l.closed {
			ls.Closed = countOf(ls.Closed, closeNames[i], l.closed[i].Load())
		}
		if st := l.state.Load(); st != nil {
			ls.Address, ls.Bound, ls.Error = st.address, st.bound, st.err
		}
		s.Listeners = append(s.Listeners, ls)
	}
	for _, c := range v.clusters {
		if cs := c.status(f); cs.Connected+cs.Failed > 0 || cs.Active > 0 {
			s.Clusters = append(s.Clusters, cs)
		}
	}
	return s
}

// countOf sets a count that is not 0.
func countOf(m map[string]uint64, name string, n uint64) map[string]uint64 {
	if n == 0 {
		return m
	}
	if m == nil {
		m = map[string]uint64{}
	}
	m[name] = n
	return m
}

func (c *cluster) status(f *Forwarder) gateway.ClusterStatus {
	s := gateway.ClusterStatus{
		Name: c.name, Active: c.active.Load(), Connected: c.connected.Load(), Failed: c.failed.Load(), Retries: c.retries.Load(),
	}
	pl := c.plan.Load()
	if pl == nil {
		return s
	}
	all := pl.past
	for _, ep := range pl.gone {
		all.add(ep)
	}
	for _, ep := range pl.endpoints {
		all.add(ep)
		var own total
		own.add(ep)
		es := gateway.EndpointStatus{
			Address: ep.key, Active: ep.active.Load(), Connected: ep.connected.Load(), Failed: ep.failed.Load(),
			BytesIn: own.in, BytesOut: own.out,
		}
		if e := ep.lastError.Load(); e != nil {
			es.LastError = *e
		}
		es.Failures = ep.reasons.Map()
		if ep.host != nil {
			if e := ep.host.err.Load(); e != nil {
				es.LastError = *e
			}
		}
		if until := ep.ejectedUntil.Load(); until > f.now() {
			es.EjectedUntil = f.epoch.Add(time.Duration(until))
		}
		s.Endpoints = append(s.Endpoints, es)
	}
	slices.SortFunc(s.Endpoints, func(a, b gateway.EndpointStatus) int { return cmp.Compare(a.Address, b.Address) })
	s.BytesIn, s.BytesOut = all.in, all.out
	for i, n := range all.took {
		if n > 0 && s.ConnectTimes == nil {
			s.ConnectTimes = &gateway.ConnectTimes{Sum: gateway.Duration(all.tookAll), Counts: make([]uint64, connectTimes)}
		}
		if n > 0 {
			s.ConnectTimes.Counts[i] = n
		}
	}
	return s
}

// refuse records a connection that reaches no endpoint. h is nil when no hello
// was read.
func (f *Forwarder) refuse(l *listener, peer netip.AddrPort, h *hello, n int, reason, detail string) {
	l.countRefusal(reason)
	r := gateway.Refusal{
		At: time.Now(), Listener: l.name(), Peer: peer.String(), HelloBytes: n, Reason: reason, Detail: detail,
	}
	if h != nil {
		r.ServerName, r.ALPN = string(h.name()), h.protocols()
	}
	f.refused.Add(r)
}
