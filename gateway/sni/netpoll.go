package sni

import (
	"container/list"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// netpoll is the portable engine: goroutines on the runtime's poller. What is
// done with sockets is in a file for each kind of system; where bytes are moved
// by system calls on descriptors that do not block, a goroutine that waits has
// hardly anything but its stack.
//
// A connection's sockets are closed once, by the last that works for it: until
// then their descriptors are its own, whoever asks for its end. Who does so makes
// its waits fail, see abort.
type netpoll struct {
	f      *Forwarder
	ctx    context.Context // ends with stop; a dial under way ends with it
	cancel context.CancelFunc
	wg     sync.WaitGroup // of what accepts, and of connections
	blocks blockPools
	setups sync.Pool
	pipes  sharedPipes

	socks map[*listener]*netpollListener // control goroutine only

	mu sync.Mutex // guards what follows
	// conns are the connections that can be told of and closed: those that wait for
	// something.
	conns map[*netpollConn]struct{}
	// hellos are the connections of a listener whose hello is waited for, by age.
	hellos map[*listener]*list.List
	ended  bool
}

// netpollConn is one connection, from accepting to the end of both directions.
type netpollConn struct {
	e      *netpoll
	l      *listener
	side   [2]wire
	halves [2]half // by the side they come from

	born       int64     // on the forwarder's clock
	owner      *cluster  // guarded by the engine's mutex until it is settled
	ep         *endpoint // with owner
	via        uint32    // the number of the cluster it was routed to, with owner
	count      *traffic
	bytes      [2]atomic.Uint64 // that were passed on, by the side they came from
	lastActive atomic.Int64     // on the forwarder's clock
	running    atomic.Int32     // halves whose goroutines have not ended
	ends       atomic.Int32     // directions whose end was passed on
	why        atomic.Int32     // closeReason of the end; the first that is set counts
	aborted    atomic.Bool
	kept       atomic.Bool // both sockets have keepalive
	logged     bool
	source     *source // accounts the connection; nil where sources are not limited

	// answering is held while it is settled that the endpoint is the one, or another is
	// asked in its place, for which a half that would write to it has to wait. It
	// guards setup, and the socket to the endpoint until it is settled.
	answering sync.Mutex
	setup     *setup      // nil once it is settled
	settled   atomic.Bool // no other endpoint can be asked any more
	refused   bool        // no endpoint answered; with setup
	answerBy  int64       // on the forwarder's clock, 0 is never; of the target's half

	// peer is the source, as the kernel or a PROXY header says; local the address it
	// connected to, valid where a header said so. Guarded by the engine's mutex once
	// others can see the connection.
	peer, local netip.AddrPort
	name        string // kept where the end is to be told

	// giveUp ends the attempts to connect that are under way; nil where there are none
	// but that of the target's socket. Guarded by the engine's mutex.
	giveUp context.CancelFunc
}

// setup is what a connection needs until its endpoint has answered and not after.
type setup struct {
	p       *netpollConn
	t       *terms
	block   *block
	data    []byte // what was read, at the start of block
	scan    helloScan
	expect  bool // a header of the PROXY protocol may come, and was not seen
	scratch []byte
	hello   hello
	moved   bool // data is elsewhere than when hello was read in it
	dial    dial
	header  [maxProxyV1]byte
	head    []byte // the PROXY header that is sent before the hello, in header
	sent    int    // bytes of head and data that the endpoint has
	sentAt  int64  // when it had all, on the forwarder's clock

	// While the hello is waited for: the queue it is in, and its place there.
	queue *list.List
	at    *list.Element
	shed  bool // guarded by the engine's mutex
}

// cause sets why the connection ends, unless something ended it before.
func (p *netpollConn) cause(why closeReason) { p.why.CompareAndSwap(0, int32(why)) }

func newNetpoll(f *Forwarder) engine {
	e := &netpoll{f: f, socks: map[*listener]*netpollListener{}, conns: map[*netpollConn]struct{}{}, hellos: map[*listener]*list.List{}}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	return e
}

func (e *netpoll) unlisten(l *listener) {
	if s := e.socks[l]; s != nil {
		s.close()
		delete(e.socks, l)
	}
}

func (e *netpoll) closeConns(l *listener, why closeReason) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for p := range e.conns {
		if p.l == l {
			p.cause(why)
			p.abort()
		}
	}
}

func (e *netpoll) oldest(limit int, want func(h handle) bool) []handle {
	e.mu.Lock()
	defer e.mu.Unlock()
	var hs []handle
	for p := range e.conns {
		h := handle{born: p.born, conn: p}
		if p.settled.Load() {
			h.via, h.ep = p.via, p.ep
		}
		if want == nil || want(h) {
			hs = append(hs, h)
		}
	}
	return firstOf(hs, limit)
}

func (e *netpoll) describe(hs []handle) []gateway.Connection {
	e.mu.Lock()
	defer e.mu.Unlock()
	out := make([]gateway.Connection, 0, len(hs))
	for _, h := range hs {
		if _, ok := e.conns[h.conn]; ok {
			out = append(out, h.conn.connection())
		}
	}
	return out
}

// connection tells of the connection. The engine's mutex must be held, or nobody
// else know of it.
func (p *netpollConn) connection() gateway.Connection {
	x := gateway.Connection{
		Listener: p.l.name(), Client: p.peer.String(), ServerName: p.name, Since: p.e.f.at(p.born),
		BytesIn: p.bytes[client].Load(), BytesOut: p.bytes[target].Load(),
	}
	if p.owner != nil {
		x.Cluster, x.Endpoint = p.owner.name, p.ep.key
	}
	return x
}

func (e *netpoll) closeThese(hs []handle, why closeReason) (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, h := range hs {
		if _, ok := e.conns[h.conn]; ok && !h.conn.aborted.Load() {
			h.conn.cause(why)
			h.conn.abort()
			n++
		}
	}
	return n
}

func (e *netpoll) stop() {
	e.cancel()
	for l := range e.socks {
		e.unlisten(l)
	}
	e.mu.Lock()
	e.ended = true
	for p := range e.conns {
		p.cause(closeStopped)
		p.abort()
	}
	e.mu.Unlock()
	e.wg.Wait()
	e.pipes.free()
}

// past is a time that makes every wait for a socket fail.
var past = time.Unix(1, 0)

// abort makes whatever waits for the connection give up. The engine's mutex must
// be held, or the caller be one of its halves.
func (p *netpollConn) abort() {
	p.aborted.Store(true)
	for i := range p.side {
		p.side[i].setDeadline(past)
	}
	if p.giveUp != nil {
		p.giveUp()
	}
}

// see makes the connection visible to others, with what set sets. It returns
// false when it is to end.
func (e *netpoll) see(p *netpollConn, set func()) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if set != nil {
		set()
	}
	e.conns[p] = struct{}{}
	if e.ended && !p.aborted.Load() {
		p.cause(closeStopped)
		p.abort()
	}
	return !p.aborted.Load()
}

func (e *netpoll) newSetup() *setup {
	if s, ok := e.setups.Get().(*setup); ok {
		return s
	}
	return &setup{}
}

// drop gives back what the connection needed to be opened.
func (e *netpoll) drop(s *setup) {
	if s.block != nil {
		e.blocks.put(s.block)
	}
	*s = setup{}
	e.setups.Put(s)
}

// begin accounts a connection that was accepted. It returns false when it is
// refused.
func (e *netpoll) begin(s *setup, p *netpollConn) bool {
	f := e.f
	p.e = e
	s.p, s.t = p, p.l.terms.Load()
	s.scan, s.expect, s.data = helloScan{}, false, s.data[:0]
	p.logged = f.lines.sampled()
	limit := p.l.admit(s.t, p.born)
	if limit != "" {
		e.tell(s, nil, gateway.RefuseLimit, limit)
		return false
	}
	expect, reason, detail := s.t.expects(p.peer.Addr())
	if s.expect = expect; !expect && reason == "" {
		reason, detail = e.admitSource(s)
	}
	if reason != "" {
		e.tell(s, nil, reason, detail)
		return false
	}
	return true
}

// admitSource accounts the connection to its source, or gives the reason to
// refuse it.
func (e *netpoll) admitSource(s *setup) (reason, detail string) {
	if s.t.bySource() {
		p := s.p
		if p.source, detail = p.l.admitSource(s.t, p.peer.Addr(), p.born); detail != "" {
			return gateway.RefuseLimit, detail
		}
	}
	return "", ""
}

// tell tells of a connection that reaches no endpoint.
func (e *netpoll) tell(s *setup, h *hello, reason, detail string) {
	p, f := s.p, e.f
	if h != nil && s.moved {
		s.parse()
	}
	f.refuse(p.l, p.peer, h, len(s.data), reason, detail)
	if p.logged {
		x := p.connection()
		if h != nil {
			x.ServerName = string(h.name())
		}
		f.lines.add(x, reason)
	}
}

// cut tells of a connection that was to end before an endpoint answered.
func (e *netpoll) cut(s *setup) {
	e.tell(s, nil, gateway.RefuseClientGone, "cut: "+closeNames[s.p.why.Load()])
}

// end closes a connection for which nothing runs any more.
func (e *netpoll) end(p *netpollConn) {
	if p.source != nil {
		p.source.release()
	}
	p.l.active.Add(-1)
	e.mu.Lock()
	delete(e.conns, p)
	e.mu.Unlock()
	for i := range p.side {
		p.side[i].close()
	}
	e.wg.Done()
}

// wait puts a connection among those whose hello is waited for. When there are
// too many it sheds the one that has waited longest.
func (e *netpoll) wait(s *setup) {
	p := s.p
	p.side[client].setReadDeadline(time.Now().Add(e.f.cfg.HelloTimeout - time.Duration(e.f.now()-p.born)))
	e.mu.Lock()
	defer e.mu.Unlock()
	q := e.hellos[p.l]
	if q == nil {
		q = list.New()
		e.hellos[p.l] = q
	}
	s.queue, s.at = q, q.PushBack(s)
	if q.Len() > s.t.hellos {
		old := q.Remove(q.Front()).(*setup)
		old.at, old.shed = nil, true
		old.p.abort()
	}
}

// waited ends wait.
func (e *netpoll) waited(s *setup) (shed bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if s.at != nil {
		s.queue.Remove(s.at)
		s.at = nil
	}
	if s.queue.Len() == 0 && e.hellos[s.p.l] == s.queue {
		delete(e.hellos, s.p.l)
	}
	return s.shed
}

// serve goes on with a connection whose hello has not all come, until it is open
// or refused.
func (e *netpoll) serve(s *setup) {
	p := s.p
	reason, detail := "", ""
	if e.see(p, nil) {
		reason, detail = e.readHello(s)
	}
	shed := e.waited(s)
	switch {
	case p.aborted.Load() && (reason == "" || reason == gateway.RefuseHelloTimeout):
		if shed {
			e.tell(s, nil, gateway.RefuseLimit, "pending hellos of the listener")
		} else {
			e.cut(s)
		}
	case reason != "":
		e.tell(s, nil, reason, detail)
	default:
		p.side[client].setReadDeadline(time.Time{})
		if e.route(s) && e.reach(s) {
			e.open(s)
			return
		}
	}
	e.end(p)
	e.drop(s)
}

// room returns where to read more of the hello.
func (e *netpoll) room(s *setup) []byte {
	most := e.f.cfg.HelloBytes
	if s.expect {
		most = max(most, maxProxyHeader)
	}
	n := len(s.data)
	if s.block == nil || n == cap(s.data) {
		// Twice as much, but only once the client has sent as much as fits.
		b := e.blocks.get(min(max(2*n, 1), maxHelloBytes))
		copy(b.buf, s.data)
		if s.block != nil {
			e.blocks.put(s.block)
		}
		s.block, s.data = b, b.buf[:n]
	}
	return s.data[n:min(cap(s.data), most)]
}

// fit moves what was read so far to as small a block as holds it: it waits for
// more.
func (e *netpoll) fit(s *setup) {
	n := len(s.data)
	if s.block == nil || n > 0 && blockClass(n) == blockClass(cap(s.block.buf)) {
		return
	}
	b := s.block
	s.block, s.data, s.moved = nil, nil, true
	if n > 0 {
		s.block = e.blocks.get(n)
		s.data = s.block.buf[:copy(s.block.buf, b.buf[:n])]
	}
	e.blocks.put(b)
}

// take looks at n more bytes of the hello. It returns true when it is complete,
// or a reason to refuse it.
func (e *netpoll) take(s *setup, n int) (done bool, reason, detail string) {
	p := s.p
	s.data = s.data[:len(s.data)+n]
	if s.expect {
		h, more, reason, detail := s.t.header(s.data)
		if reason != "" {
			s.data = s.data[:0]
			return false, reason, detail
		}
		if more {
			return false, "", ""
		}
		s.expect = false
		s.data = s.data[:copy(s.data, s.data[h.size:])]
		if h.src.IsValid() {
			e.mu.Lock()
			p.peer, p.local = h.src, h.dst
			e.mu.Unlock()
		}
		if reason, detail := e.admitSource(s); reason != "" {
			s.data = s.data[:0]
			return false, reason, detail
		}
	}
	if len(s.data) == 0 {
		return false, "", ""
	}
	done, reason = s.scan.feed(s.data, e.f.cfg.HelloBytes)
	return done, reason, ""
}

// route finds the cluster of a complete hello. It returns false when it is refused.
func (e *netpoll) route(s *setup) bool {
	f := e.f
	h := &s.hello
	if reason := s.parse(); reason != "" {
		if reason == gateway.RefuseNotTLS {
			h = nil
		}
		e.tell(s, h, reason, "")
		return false
	}
	cl := f.routes.Load().lookup(h.name())
	if cl == nil {
		e.tell(s, h, gateway.RefuseNoRoute, "")
		return false
	}
	s.dial.begin(f, cl, f.now())
	return true
}

// parse reads a complete hello.
func (s *setup) parse() (reason string) {
	if s.moved = false; s.scan.recs > 1 && len(s.scratch) < len(s.data) {
		s.scratch = make([]byte, len(s.data))
	}
	return s.hello.parse(s.scan.message(s.data, s.scratch))
}

// unreached tells of a connection that no endpoint took.
func (e *netpoll) unreached(s *setup) {
	reason, detail := s.dial.refusal()
	e.tell(s, &s.hello, reason, detail)
}

// ownFault says that a failure to connect is ours, and no endpoint's.
func ownFault(cause error) bool {
	return errors.Is(cause, syscall.EMFILE) || errors.Is(cause, syscall.ENFILE) || errors.Is(cause, syscall.ENOBUFS)
}

// connectError takes the addresses off an error of net, which repeat what is
// said beside it.
func connectError(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		if op.Timeout() {
			return errConnectTimeout
		}
		err = op.Err
	}
	var sys *os.SyscallError
	if errors.As(err, &sys) {
		return sys.Err
	}
	return err
}

var errConnectTimeout = errors.New("connect timed out")

// connector connects to the address of an attempt. It gives up when ctx ends.
type connector func(ctx context.Context, a attempt) (wire, error)

// race connects to an endpoint by the attempt under way, and by others of its
// addresses beside it, each some time after the one before (RFC 8305 5). It returns
// the first that is connected, which is then the attempt under way, or else why the
// last failed. first is asked for the first attempt, more for the others; late says
// that the first has had its time.
func (e *netpoll) race(s *setup, first, more connector, late bool) (wire, error) {
	type outcome struct {
		attempt
		w   wire
		err error
	}
	f, p, d := e.f, s.p, &s.dial
	ctx, cancel := context.WithCancel(context.Background()) // whoever ends the connection gives it up
	if !e.see(p, func() { p.giveUp = cancel }) {
		cancel()
	}
	var under []attempt // way
	results := make(chan outcome)
	begin := func(connect connector) {
		a := d.attempt
		under = append(under, a)
		go func() {
			w, err := connect(ctx, a)
			results <- outcome{a, w, err}
		}()
	}
	defer func() {
		cancel()
		for range under {
			if r := <-results; r.err == nil {
				r.w.close()
			}
		}
		e.mu.Lock()
		p.giveUp = nil
		e.mu.Unlock()
	}()
	begin(first)
	wait := d.timeout(f.now())
	if late {
		wait = 0
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	for {
		failed := false
		select {
		case r := <-results:
			under = slices.DeleteFunc(under, func(a attempt) bool { return a == r.attempt })
			switch {
			case r.err == nil:
				d.won(r.attempt, under, f.now())
				return r.w, nil
			case len(under) == 0 || ctx.Err() != nil:
				d.attempt = r.attempt
				return wire{}, r.err
			case !ownFault(r.err):
				d.lost(r.attempt, f.now(), r.err)
			}
			failed = true
		case <-t.C:
		}
		switch now := f.now(); {
		case d.beside(now):
			begin(more)
			t.Reset(d.timeout(now))
		case d.left(now) > 0:
			if !failed {
				t.Reset(d.left(now))
			}
		default:
			for _, a := range under[1:] {
				d.lost(a, now, errConnectTimeout)
			}
			d.attempt = under[0]
			return wire{}, errConnectTimeout
		}
	}
}

// greet prepares to send the hello to the endpoint that is being tried, behind the
// PROXY header that it wants.
func (s *setup) greet() {
	s.head, s.sent = s.header[:0], 0
	if s.dial.tier.send == "" {
		return
	}
	p := s.p
	local := p.local
	if !local.IsValid() {
		local = p.side[client].local()
	}
	s.head = appendProxyHeader(s.head, s.dial.tier.send, p.peer, local)
}

// open begins to wait for the answer to the hello.
func (e *netpoll) open(s *setup) {
	p := s.p
	p.setup = s
	p.running.Store(int32(len(p.halves)))
	for i := range p.halves {
		p.halves[i].p, p.halves[i].src = p, uint8(i)
	}
	e.asked(s)
	if s.scan.more(s.data) {
		p.answering.Lock()
		p.settle(false) // early data, which is not to be sent twice
		p.answering.Unlock()
	}
	// Each has a goroutine of its own, and none has this one's stack.
	go p.halves[target].run()
	go p.halves[client].run()
}

// asked notes that an endpoint has the hello.
func (e *netpoll) asked(s *setup) {
	p, d := s.p, &s.dial
	s.sentAt, p.answerBy = e.f.now(), 0
	d.connected(s.sentAt)
	if limit := d.answerTimeout(); limit > 0 {
		p.answerBy = s.sentAt + int64(limit)
	}
	e.see(p, func() {
		p.owner, p.ep, p.via = d.tier.owner, d.ep, d.cluster.number
		if p.logged {
			p.name = string(s.hello.name())
		}
	})
}

// unset closes a socket whose connection goes on.
func (e *netpoll) unset(w *wire) {
	e.mu.Lock()
	old := *w
	*w = wire{}
	e.mu.Unlock()
	old.close()
}

// set is where a connection gets its socket to an endpoint.
func (e *netpoll) set(p *netpollConn, w wire) {
	e.mu.Lock()
	p.side[target] = w
	e.mu.Unlock()
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

func endpointKey(e *gateway.Endpoint) string {
	if e.Network == "unix" {
		return e.Address
	}
	return net.JoinHostPort(e.Address, strconv.Itoa(e.Port))
}
