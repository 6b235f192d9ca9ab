package sni

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// netpoll is the portable engine: goroutines on the runtime's poller.
type netpoll struct {
	f      *Forwarder
	ctx    context.Context // ends with stop; a dial under way ends with it
	cancel context.CancelFunc
	wg     sync.WaitGroup
	bufs   sync.Pool

	socks map[*listener]*netpollListener // control goroutine only

	mu    sync.Mutex // guards what follows
	conns map[*netpollConn]struct{}
	// hellos are the connections of a listener whose hello is waited for, by age.
	hellos map[*listener]*list.List
	ended  bool
}

type netpollListener struct {
	*net.TCPListener
	last atomic.Bool   // the deadline is the end
	done chan struct{} // closed when its accept loop has ended
}

// netpollConn is one connection, from accepting to the end of both directions.
type netpollConn struct {
	l        *listener
	client   *net.TCPConn
	endpoint *net.TCPConn // guarded by the engine's mutex until it is set

	born       int64     // on the forwarder's clock
	owner      *cluster  // guarded by the engine's mutex until it is set
	ep         *endpoint // with owner
	via        uint32    // the number of the cluster it was routed to, with owner
	count      *byteCount
	bytes      [2]atomic.Uint64 // that were passed on, from the client and to it
	lastActive atomic.Int64     // on the forwarder's clock
	halves     atomic.Int32     // directions that have ended
	why        atomic.Int32     // closeReason of the end; the first that is set counts
	shed       atomic.Bool      // closed because others wait too
	source     *source          // accounts the connection; nil where sources are not limited
	served     func()           // ends the wait for the hello

	// peer is the source, as the kernel or a PROXY header says; local the address it
	// connected to. Guarded by the engine's mutex once serve has begun.
	peer, local netip.AddrPort
	name        string // kept where the end is to be told
}

// cause sets why the connection ends, unless something ended it before.
func (c *netpollConn) cause(why closeReason) { c.why.CompareAndSwap(0, int32(why)) }

// copyChunk is after how many bytes a direction is accounted: io.Copy would
// tell only at its end.
const copyChunk = 1 << 20

func newNetpoll(f *Forwarder) engine {
	e := &netpoll{f: f, socks: map[*listener]*netpollListener{}, conns: map[*netpollConn]struct{}{}, hellos: map[*listener]*list.List{}}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.bufs.New = func() any { b := make([]byte, 4<<10); return &b }
	return e
}

func (e *netpoll) keepalive(k gateway.Keepalive) net.KeepAliveConfig {
	k = e.f.cfg.keepalive(k)
	return net.KeepAliveConfig{Enable: true, Idle: k.Idle, Interval: k.Interval, Count: k.Probes}
}

func (e *netpoll) listen(l *listener) (string, error) {
	addr, err := checkListener(l)
	if err != nil {
		return "", err
	}
	// "tcp" for [::], which then serves IPv4 too; an address of a family is of
	// that family.
	network := "tcp"
	if addr.Addr().Is4() {
		network = "tcp4"
	}
	lc := net.ListenConfig{KeepAliveConfig: e.keepalive(gateway.Keepalive{})}
	lc.SetMultipathTCP(false) // it cannot be held off, see hold
	ln, err := lc.Listen(e.ctx, network, addr.String())
	if err != nil {
		return "", err
	}
	s := &netpollListener{TCPListener: ln.(*net.TCPListener), done: make(chan struct{})}
	e.socks[l] = s
	e.wg.Go(func() {
		defer close(s.done)
		e.accept(l, s)
	})
	return ln.Addr().String(), nil
}

// lastAccept is how long a socket that is to be closed accepts what waits there:
// closing would reset it.
const lastAccept = 10 * time.Millisecond

func (e *netpoll) unlisten(l *listener) {
	if s := e.socks[l]; s != nil {
		s.last.Store(true)
		s.SetDeadline(time.Now().Add(lastAccept))
		<-s.done
		s.Close()
		delete(e.socks, l)
	}
}

func (e *netpoll) tune(l *listener) error {
	raw, err := e.socks[l].SyscallConn()
	if err != nil {
		return err
	}
	var terr error
	if err := raw.Control(func(fd uintptr) { terr = setCongestion(int(fd), l.terms.Load().spec.CongestionControl) }); err != nil {
		return err
	}
	return terr
}

func (e *netpoll) hold(l *listener) error { return gateway.HoldOffConn(e.socks[l]) }

func (e *netpoll) closeConns(l *listener, why closeReason) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for c := range e.conns {
		if c.l == l {
			c.cause(why)
			c.close()
		}
	}
}

func (e *netpoll) oldest(limit int, want func(h handle) bool) []handle {
	e.mu.Lock()
	defer e.mu.Unlock()
	var hs []handle
	for c := range e.conns {
		if h := (handle{born: c.born, via: c.via, ep: c.ep, conn: c}); want == nil || want(h) {
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
		c := h.conn
		if _, ok := e.conns[c]; !ok {
			continue
		}
		out = append(out, c.connection(e.f))
	}
	return out
}

// connection tells of the connection. The engine's mutex must be held, or serve
// be over.
func (c *netpollConn) connection(f *Forwarder) gateway.Connection {
	x := gateway.Connection{
		Listener: c.l.name(), Client: c.peer.String(), ServerName: c.name, Since: f.at(c.born),
		BytesIn: c.bytes[client].Load(), BytesOut: c.bytes[target].Load(),
	}
	if c.owner != nil {
		x.Cluster, x.Endpoint = c.owner.name, c.ep.key
	}
	return x
}

func (e *netpoll) closeThese(hs []handle, why closeReason) (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, h := range hs {
		if _, ok := e.conns[h.conn]; ok && h.conn.why.Load() == 0 {
			h.conn.cause(why)
			h.conn.close()
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
	for c := range e.conns {
		c.cause(closeStopped)
		c.close()
	}
	e.mu.Unlock()
	e.wg.Wait()
}

// close makes every read and write of the connection fail. The owner frees it.
func (c *netpollConn) close() {
	c.client.Close()
	if c.endpoint != nil {
		c.endpoint.Close()
	}
}

func (e *netpoll) accept(l *listener, ln *netpollListener) {
	const pauseMin, pauseMax = 5 * time.Millisecond, time.Second
	pause := pauseMin
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) || ln.last.Load() && err != nil {
			return
		}
		if err != nil {
			// Such as no more file descriptors: wait until some are closed.
			e.f.fail(err)
			t := time.NewTimer(pause)
			select {
			case <-t.C:
			case <-e.ctx.Done():
				t.Stop()
			}
			pause = min(2*pause, pauseMax)
			continue
		}
		pause = pauseMin
		p := &netpollConn{
			l: l, client: c.(*net.TCPConn), born: e.f.now(), peer: addrPort(c.RemoteAddr()), local: addrPort(c.LocalAddr()),
		}
		e.mu.Lock()
		e.conns[p] = struct{}{}
		ended := e.ended
		e.mu.Unlock()
		if ended {
			p.cause(closeStopped)
			p.close()
		}
		// Here and not in its goroutine: they are not run in the order in which their
		// connections came, and the one that has waited longest is to be shed.
		p.served = e.wait(p, l.terms.Load().hellos)
		e.wg.Go(func() { e.serve(p) })
	}
}

func (e *netpoll) serve(p *netpollConn) {
	f := e.f
	logged := f.lines.sampled()
	refuse := func(h *hello, n int, reason, detail string) {
		f.refuse(p.l, p.peer, h, n, reason, detail)
		if logged {
			x := p.connection(f)
			if h != nil {
				x.ServerName = string(h.name())
			}
			f.lines.add(x, reason)
		}
	}
	defer func() {
		p.l.active.Add(-1)
		if p.source != nil {
			p.source.release()
		}
		e.mu.Lock()
		delete(e.conns, p)
		p.close()
		e.mu.Unlock()
	}()
	t := p.l.terms.Load()
	if limit := p.l.admit(t, p.born); limit != "" {
		p.served()
		refuse(nil, 0, gateway.RefuseLimit, limit)
		return
	}
	bp := e.bufs.Get().(*[]byte)
	var h hello
	n, reason, detail := e.readHello(p, t, bp, &h)
	p.served()
	if p.shed.Load() && reason == gateway.RefuseClientGone {
		reason, detail = gateway.RefuseLimit, "pending hellos of the listener"
	}
	if reason != "" {
		hp := &h
		if reason != gateway.RefuseNoServerName && reason != gateway.RefuseBadServerName {
			hp = nil
		}
		refuse(hp, n, reason, detail)
		e.bufs.Put(bp)
		return
	}
	cl := f.routes.Load().lookup(h.name())
	if cl == nil {
		refuse(&h, n, gateway.RefuseNoRoute, "")
		e.bufs.Put(bp)
		return
	}
	var d dial
	d.begin(f, cl, f.now())
	if ok, err := e.connect(p, &d); !ok {
		var reason, detail string
		switch {
		case e.ctx.Err() != nil:
			reason, detail = gateway.RefuseClientGone, "shutting down"
		case err != nil:
			f.fail(fmt.Errorf("connect to %s: socket: %w", d.addr, err))
			reason, detail = gateway.RefuseLimit, "socket: "+err.Error()
		default:
			reason, detail = d.refusal()
		}
		refuse(&h, n, reason, detail)
		e.bufs.Put(bp)
		return
	}
	owner, ep := d.done()
	e.mu.Lock()
	p.owner, p.ep, p.via = owner, ep, cl.number
	if logged {
		p.name = string(h.name())
	}
	e.mu.Unlock()
	defer func() {
		closed(owner, ep)
		why := closeReason(p.why.Load())
		p.l.closed[why].Add(1)
		if logged {
			f.lines.add(p.connection(f), closeNames[why])
		}
	}()
	if f.log.IsTrace() {
		f.log.Trace("connected", "listener", p.l.name(), "peer_addr", p.peer, "server_name", string(h.name()),
			"cluster", owner.name, "endpoint", ep.key)
	}
	p.count = owner.counter(0, 1)
	p.lastActive.Store(f.now())
	data := (*bp)[:n]
	if d.tier.send != "" {
		data = append(appendProxyHeader(make([]byte, 0, maxProxyV1+n), d.tier.send, p.peer, p.local), data...)
	}
	_, err := p.endpoint.Write(data)
	p.count.in.Add(uint64(n))
	p.bytes[client].Add(uint64(n))
	e.bufs.Put(bp)
	if err != nil {
		p.cause(closeReset)
		p.reset(p.client)
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { e.copy(p, p.client, p.endpoint, &p.count.out, &p.bytes[target]) })
	e.copy(p, p.endpoint, p.client, &p.count.in, &p.bytes[client])
	wg.Wait()
}

// admitSource accounts the connection to its source, or names the limit that the
// source has reached.
func (c *netpollConn) admitSource(t *terms) (limit string) {
	if t.bySource() {
		c.source, limit = c.l.admitSource(t, c.peer.Addr(), c.born)
	}
	return limit
}

// wait counts a connection whose hello is waited for, until done is called. When
// there are too many it sheds the one that has waited longest.
func (e *netpoll) wait(p *netpollConn, most int) (done func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	q := e.hellos[p.l]
	if q == nil {
		q = list.New()
		e.hellos[p.l] = q
	}
	at := q.PushBack(p)
	if q.Len() > most {
		old := q.Remove(q.Front()).(*netpollConn)
		old.shed.Store(true)
		old.close()
	}
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		q.Remove(at)
		if q.Len() == 0 && e.hellos[p.l] == q {
			delete(e.hellos, p.l)
		}
	}
}

// readHello reads into *bp, which it may replace by a larger one, until the
// ClientHello is complete.
func (e *netpoll) readHello(p *netpollConn, t *terms, bp *[]byte, h *hello) (n int, reason, detail string) {
	f := e.f
	var scan helloScan
	expect, reason, detail := t.expects(p.peer.Addr())
	if reason != "" {
		return 0, reason, detail
	}
	if !expect {
		if limit := p.admitSource(t); limit != "" {
			return 0, gateway.RefuseLimit, limit
		}
	}
	p.client.SetReadDeadline(time.Now().Add(f.cfg.HelloTimeout))
	for {
		most := f.cfg.HelloBytes
		if expect {
			most = max(most, maxProxyHeader)
		}
		if n == len(*bp) {
			// Twice as much, but only once the client has sent as much as fits.
			b := make([]byte, min(2*len(*bp), most))
			copy(b, *bp)
			*bp = b
		}
		k, err := p.client.Read((*bp)[n:min(len(*bp), most)])
		n += k
		if k > 0 && expect {
			ph, more, reason, detail := t.header((*bp)[:n])
			if reason != "" {
				return 0, reason, detail
			}
			if expect = more; !more {
				n = copy(*bp, (*bp)[ph.size:n])
				if ph.src.IsValid() {
					e.mu.Lock()
					p.peer, p.local = ph.src, ph.dst
					e.mu.Unlock()
				}
				if limit := p.admitSource(t); limit != "" {
					return 0, gateway.RefuseLimit, limit
				}
			}
		}
		if k > 0 && !expect && n > 0 {
			done, reason := scan.feed((*bp)[:n], f.cfg.HelloBytes)
			if reason != "" {
				return n, reason, ""
			}
			if done {
				break
			}
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return n, gateway.RefuseHelloTimeout, f.cfg.HelloTimeout.String()
		case err != nil:
			return n, gateway.RefuseClientGone, ""
		}
	}
	p.client.SetReadDeadline(time.Time{})
	var scratch []byte
	if scan.recs > 1 {
		scratch = make([]byte, n)
	}
	return n, h.parse(scan.message((*bp)[:n], scratch)), ""
}

// connect tries endpoints until one is connected. An error is ours, and no
// endpoint's.
func (e *netpoll) connect(p *netpollConn, d *dial) (bool, error) {
	for now := e.f.now(); d.next(now); now = e.f.now() {
		dialer := net.Dialer{Timeout: d.timeout(now), KeepAliveConfig: e.keepalive(d.tier.keepalive)}
		if cc := d.tier.congestion; cc != "" {
			dialer.Control = func(_, _ string, c syscall.RawConn) error {
				return c.Control(func(fd uintptr) { setCongestion(int(fd), cc) }) // that it can be had was seen before
			}
		}
		c, err := dialer.DialContext(e.ctx, "tcp", d.addr.String())
		if err != nil {
			cause := connectError(err)
			if e.ctx.Err() != nil || ownFault(cause) {
				d.abandon()
				return false, cause
			}
			d.failed(e.f.now(), cause)
			continue
		}
		e.mu.Lock()
		p.endpoint = c.(*net.TCPConn)
		ended := e.ended
		e.mu.Unlock()
		if ended {
			d.abandon()
			return false, net.ErrClosed
		}
		return true, nil
	}
	return false, nil
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

// copy moves one direction until its end, and passes the end on. Both ends are
// bare TCP connections, so that the bytes need not pass through the process.
func (e *netpoll) copy(p *netpollConn, dst, src *net.TCPConn, count, own *atomic.Uint64) {
	f := e.f
	lim := io.LimitedReader{R: src}
	for {
		idle := p.l.terms.Load().idleLimit(p.halves.Load() > 0)
		if idle > 0 {
			src.SetReadDeadline(time.Now().Add(idle))
		}
		lim.N = copyChunk
		n, err := dst.ReadFrom(&lim)
		if n > 0 {
			count.Add(uint64(n))
			own.Add(uint64(n))
			p.lastActive.Store(f.now())
		}
		switch {
		case err == nil && n == copyChunk:
			continue
		case err == nil:
			// The end of what src sends; dst may go on sending.
			if p.halves.Add(1) == 1 {
				dst.CloseWrite()
				if d := p.l.terms.Load().idleLimit(true); d > 0 {
					dst.SetReadDeadline(time.Now().Add(d))
				}
			}
			return
		case errors.Is(err, os.ErrDeadlineExceeded):
			idle = p.l.terms.Load().idleLimit(p.halves.Load() > 0)
			if n > 0 || idle == 0 || f.now()-p.lastActive.Load() < int64(idle) {
				continue
			}
			p.cause(closeIdle)
			p.client.Close()
			p.endpoint.Close()
			return
		}
		// One of the two was reset, or both are being closed: the other learns the
		// same way.
		p.cause(closeReset)
		p.reset(src)
		p.reset(dst)
		return
	}
}

// reset closes a connection so that the peer sees that not all was well.
func (p *netpollConn) reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
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
