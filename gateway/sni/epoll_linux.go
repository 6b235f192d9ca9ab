package sni

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/gateway"
)

// epoll is the engine of Linux: loops that share nothing but the table and the
// counters. Each has a thread, an epoll set, and its own socket of every
// listener (SO_REUSEPORT), so that a connection stays on one core.
type epoll struct {
	f     *Forwarder
	loops []*loop
	wg    sync.WaitGroup
	socks map[*listener]bool
}

func newEpoll(f *Forwarder) (engine, error) {
	e := &epoll{f: f, socks: map[*listener]bool{}}
	workers := f.cfg.Workers
	if workers == 0 {
		workers = ownProcs()
	}
	for i := range workers {
		l, err := newLoop(e, i)
		if err != nil {
			for _, l := range e.loops {
				l.free()
			}
			return nil, err
		}
		e.loops = append(e.loops, l)
	}
	lendProcs(len(e.loops))
	for _, l := range e.loops {
		e.wg.Go(l.run)
	}
	return e, nil
}

func (e *epoll) listen(l *listener) (string, error) {
	addr, err := checkListener(l)
	if err != nil {
		return "", err
	}
	if addr.Port() != 0 {
		// SO_REUSEPORT would share the port with another process of this user: a
		// second agent by mistake would take half of the connections in silence.
		fd, _, err := listenSocket(addr, false)
		if err != nil {
			return "", err
		}
		rawClose(fd)
	}
	var fds []int32
	for range e.loops {
		fd, bound, err := listenSocket(addr, true)
		if err != nil {
			for _, fd := range fds {
				rawClose(fd)
			}
			return "", err
		}
		fds = append(fds, fd)
		addr = bound // the port that the first was given
	}
	for i, lp := range e.loops {
		lp.do(func() { lp.addListener(l, fds[i]) })
	}
	e.socks[l] = true
	return addr.String(), nil
}

func (e *epoll) unlisten(l *listener) {
	for _, lp := range e.loops {
		lp.do(func() { lp.removeListener(l) })
	}
	delete(e.socks, l)
}

func (e *epoll) closeConns(l *listener) {
	for _, lp := range e.loops {
		lp.do(func() { lp.closeConns(l) })
	}
}

func (e *epoll) stop() {
	for _, lp := range e.loops {
		lp.do(func() { lp.stopping = true })
	}
	e.wg.Wait()
	returnProcs(len(e.loops))
}

// The phases of a connection.
const (
	phaseFree = iota
	phaseHello
	phaseConnecting
	phaseOpen

	// doomed marks a connection that the timer is to end: events cannot be had.
	doomed = 0x80
)

// The sides of a connection. A direction is named by the side it comes from.
const (
	client = iota
	target
)

// The flags of a side.
const (
	flagAdded   = 1 << iota // in the epoll set
	flagOut                 // with EPOLLOUT
	flagHup                 // has said that it sends no more, maybe behind data
	flagEOF                 // the end was read, and passed on
	flagBulk                // sends so much that it is spliced
	flagNoDelay             // the target's socket has TCP_NODELAY; the client's has it by inheritance
	flagKeep                // both sockets have keepalive; a flag of the target
	flagQueued              // waits in the run queue
)

// conn is one connection with both its sockets: all there is of it while it is
// idle. It is known by its index, and by a generation that tells it from others
// that had the index before.
type conn struct {
	fd    [2]int32
	flags [2]uint8
	full  [2]uint8 // reads in a row that filled the buffer
	phase uint8
	gen   int32
	id    uint32

	// Timer wheel: neighbours, the tick of the deadline, and whether linked.
	next, prev uint32
	deadline   uint32
	active     uint32 // the tick of the last byte
	linked     bool

	l     *listener
	owner *cluster
	ep    *endpoint
	count *byteCount
	held  [2]*held // what was read of a side and could not be written yet
	begun *begun   // until the connection is open
}

// held is what waits for the other side: bytes, or a pipe with bytes.
type held struct {
	buf  []byte // to be given back
	data []byte // the part of buf still to be written
	pipe pipe
	n    int // bytes in the pipe
}

type pipe struct{ r, w int32 }

// begun is what a connection needs before it is open and not after.
type begun struct {
	peer netip.AddrPort
	buf  []byte // the hello so far; its capacity is a class of blocks
	scan helloScan
	dial dial
}

const (
	readBuffer = 64 << 10
	pipeSize   = 256 << 10
	leastPipe  = 64 << 10
	// burst bounds what is moved for one connection before others have their
	// turn.
	burst = 2 << 20
	// bulkLeast is what a splice must have moved for the next to be worth it.
	bulkLeast  = 32 << 10
	maxPipes   = 256 // in use by one loop: 512 descriptors, 64 MiB when all are full
	keepPipes  = 32  // unused in its pool
	keepBlocks = 64  // of each size

	tickShift  = 23 // a tick is 8.4 ms
	wheelSlots = 1024

	// rawWaitMS is how long a loop that has just had work waits for more without
	// giving its processor back to the scheduler.
	rawWaitMS = 4
	// acceptPause is how long a loop that ran out of descriptors accepts nothing.
	acceptPause = 50 * time.Millisecond
	maxAccept   = 64

	connChunk = 512
)

// sock is a loop's socket of a listener.
type sock struct {
	l     *listener
	fd    int32
	batch int // connections to accept at one time, see accept
}

type loop struct {
	e      *epoll
	f      *Forwarder
	worker int
	ep, ev int32 // epoll set; eventfd that wakes it

	mu       sync.Mutex // guards todo
	todo     []func()
	stopping bool // the loop's own

	now  int64 // of this turn, on the forwarder's clock
	tick uint32
	busy bool

	events [256]unix.EpollEvent
	buf    []byte
	spare  []byte // to put a hello of several records together
	hello  hello
	dial   dial
	sa     unix.RawSockaddrAny

	chunks [][]conn
	unused []uint32
	socks  []*sock // by the number in their events; nil where removed
	paused int64   // when to accept again; 0 is now

	queue  []ref
	turn   []ref
	wheel  [wheelSlots]uint32
	filled [wheelSlots / 64]uint64

	blocks  [blockClasses][][]byte
	helds   []*held
	begins  []*begun
	pipes   []pipe
	pipesIn int // in use
	noPipes bool
}

type ref struct {
	id  uint32
	gen int32
	src uint8
}

func newLoop(e *epoll, worker int) (*loop, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	ev, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(ep)
		return nil, os.NewSyscallError("eventfd", err)
	}
	l := &loop{
		e: e, f: e.f, worker: worker, ep: int32(ep), ev: int32(ev),
		buf: make([]byte, readBuffer),
	}
	if errno := rawEpollCtl(l.ep, unix.EPOLL_CTL_ADD, l.ev, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: wakeEvent}); errno != 0 {
		l.free()
		return nil, os.NewSyscallError("epoll_ctl", errno)
	}
	l.now = l.f.now()
	l.tick = tickOf(l.now)
	return l, nil
}

func (l *loop) free() {
	for _, p := range l.pipes {
		rawClose(p.r)
		rawClose(p.w)
	}
	rawClose(l.ev)
	rawClose(l.ep)
}

// Events of connections carry id<<1|side and the generation; others are
// negative: -1 is the eventfd, -2 the first listener.
const (
	wakeEvent     = -1
	listenerEvent = -2
)

// do runs fn on the loop's goroutine and returns when it has.
func (l *loop) do(fn func()) {
	done := make(chan struct{})
	l.mu.Lock()
	l.todo = append(l.todo, func() { fn(); close(done) })
	l.mu.Unlock()
	one := binary.NativeEndian.AppendUint64(nil, 1)
	unix.Write(int(l.ev), one)
	<-done
}

func (l *loop) commands() {
	var b [8]byte
	unix.Read(int(l.ev), b[:])
	l.mu.Lock()
	todo := l.todo
	l.todo = nil
	l.mu.Unlock()
	for _, fn := range todo {
		fn()
	}
}

func (l *loop) run() {
	// A thread of its own keeps the loop on its core and its wait from moving
	// goroutines about.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for !l.stopping {
		n := l.wait()
		l.now = l.f.now()
		for i := range n {
			ev := &l.events[i]
			switch {
			case ev.Fd >= 0:
				l.event(uint32(ev.Fd), ev.Pad, ev.Events)
			case ev.Fd == wakeEvent:
				l.commands()
			default:
				if s := l.socks[listenerEvent-ev.Fd]; s != nil {
					l.accept(s)
				}
			}
		}
		l.advance()
		l.runQueue()
	}
	l.closeConns(nil)
	for i, s := range l.socks {
		if s != nil {
			rawClose(s.fd)
			l.socks[i] = nil
		}
	}
	l.free()
}

// wait returns the number of events.
func (l *loop) wait() int {
	ms := l.sleep()
	if l.busy || ms == 0 {
		short := rawWaitMS
		if ms >= 0 {
			short = min(short, ms)
		}
		if n, e := rawEpollWait(l.ep, l.events[:], short); e == 0 && (n > 0 || short == ms) {
			return n
		}
		// Nothing came, or the scheduler wants the processor (EINTR).
		l.busy = false
	}
	n, err := unix.EpollWait(int(l.ep), l.events[:], ms)
	if err != nil {
		return 0
	}
	l.busy = n > 0
	return n
}

// sleep is how many milliseconds the loop may wait; -1 is for ever.
func (l *loop) sleep() int {
	if len(l.queue) > 0 {
		return 0
	}
	ms := -1
	if t := l.nextTimer(); t >= 0 {
		ms = int(t)
	}
	if l.paused != 0 {
		p := int(max(0, l.paused-l.now)/1e6) + 1
		if ms < 0 || p < ms {
			ms = p
		}
	}
	return ms
}

// ---- listeners

func (l *loop) addListener(ln *listener, fd int32) {
	s := &sock{l: ln, fd: fd, batch: 1}
	i := slices.Index(l.socks, nil)
	if i < 0 {
		i = len(l.socks)
		l.socks = append(l.socks, nil)
	}
	l.socks[i] = s
	l.watchListener(i, unix.EPOLL_CTL_ADD)
}

func (l *loop) watchListener(i, op int) {
	rawEpollCtl(l.ep, op, l.socks[i].fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(listenerEvent - i)})
}

func (l *loop) removeListener(ln *listener) {
	for i, s := range l.socks {
		if s != nil && s.l == ln {
			rawClose(s.fd)
			l.socks[i] = nil
		}
	}
}

// accept takes connections in batches whose size follows the load: a batch that
// was full is doubled, so that a busy listener costs no more waits, and a quiet
// one no call that finds nothing. The socket is level-triggered; what is left
// shows in the next wait.
func (l *loop) accept(s *sock) {
	for k := 0; k < s.batch; k++ {
		fd, e := rawAccept(s.fd, &l.sa)
		switch e {
		case 0:
			l.begin(s.l, fd)
		case unix.EAGAIN:
			s.batch = max(1, k)
			return
		case unix.EINTR, unix.ECONNABORTED, unix.EPROTO, unix.ENETDOWN, unix.ENOPROTOOPT,
			unix.EHOSTDOWN, unix.ENONET, unix.EHOSTUNREACH, unix.EOPNOTSUPP, unix.ENETUNREACH, unix.EPERM:
			// Of the one connection (accept(2)): there may be others.
		default:
			l.f.fail(fmt.Errorf("accept on %s: %w", s.l.address, e))
			l.pause()
			return
		}
	}
	s.batch = min(2*s.batch, maxAccept)
}

// pause stops accepting for a while: without descriptors every wait would
// return at once for nothing.
func (l *loop) pause() {
	if l.paused == 0 {
		for i, s := range l.socks {
			if s != nil {
				l.watchListener(i, unix.EPOLL_CTL_DEL)
			}
		}
	}
	l.paused = l.now + int64(acceptPause)
}

// resume also adds listeners that came while it was paused, a second time; that
// is refused by the kernel and no harm.
func (l *loop) resume() {
	l.paused = 0
	for i, s := range l.socks {
		if s != nil {
			l.watchListener(i, unix.EPOLL_CTL_ADD)
		}
	}
}

// ---- connections

func (l *loop) conn(id uint32) *conn { return &l.chunks[id/connChunk][id%connChunk] }

func (l *loop) newConn() *conn {
	if len(l.unused) == 0 {
		base := uint32(len(l.chunks)) * connChunk
		l.chunks = append(l.chunks, make([]conn, connChunk))
		for i := connChunk - 1; i >= 0; i-- {
			if id := base + uint32(i); id != 0 { // 0 is no connection
				l.conn(id).id = id
				l.unused = append(l.unused, id)
			}
		}
	}
	id := l.unused[len(l.unused)-1]
	l.unused = l.unused[:len(l.unused)-1]
	return l.conn(id)
}

// begin starts with an accepted connection. Its hello is most often here
// already, and then nothing is kept or waited for.
func (l *loop) begin(ln *listener, fd int32) {
	c := l.newConn()
	c.l, c.phase = ln, phaseHello
	c.fd = [2]int32{fd, -1}
	peer := getSockaddr(&l.sa)
	if ln.full() {
		l.refuse(c, peer, nil, nil, gateway.RefuseLimit, "max connections of the listener")
		return
	}
	var scan helloScan
	limit := l.f.cfg.HelloBytes
	n, e := rawRecv(fd, l.buf[:min(limit, len(l.buf))])
	switch {
	case e == unix.EAGAIN:
		n = 0
	case e != 0 || n == 0:
		l.refuse(c, peer, nil, nil, gateway.RefuseClientGone, "")
		return
	default:
		done, reason := scan.feed(l.buf[:n], limit)
		if reason != "" {
			l.refuse(c, peer, nil, l.buf[:n], reason, "")
			return
		}
		if done {
			l.route(c, peer, l.buf[:n], &scan)
			return
		}
	}
	b := l.newBegun()
	b.peer, b.scan = peer, scan
	if n > 0 {
		b.buf = append(l.block(n), l.buf[:n]...)
	}
	c.begun = b
	l.schedule(c, l.now+int64(l.f.cfg.HelloTimeout))
	l.watch(c, client, 0)
}

// moreHello goes on with a hello that did not come in one piece.
func (l *loop) moreHello(c *conn) {
	b := c.begun
	limit := l.f.cfg.HelloBytes
	for {
		if len(b.buf) == cap(b.buf) {
			bigger := append(l.block(min(max(2*len(b.buf), 1), maxHelloBytes)), b.buf...)
			l.unblock(b.buf)
			b.buf = bigger
		}
		room := b.buf[len(b.buf):min(cap(b.buf), limit)]
		n, e := rawRecv(c.fd[client], room)
		switch {
		case e == unix.EAGAIN:
			return
		case e != 0 || n == 0:
			l.refuse(c, b.peer, nil, b.buf, gateway.RefuseClientGone, "")
			return
		}
		b.buf = b.buf[:len(b.buf)+n]
		done, reason := b.scan.feed(b.buf, limit)
		if reason != "" {
			l.refuse(c, b.peer, nil, b.buf, reason, "")
			return
		}
		if done {
			l.route(c, b.peer, b.buf, &b.scan)
			return
		}
		if n < len(room) && c.flags[client]&flagHup == 0 {
			return
		}
	}
}

// route finds the cluster of a complete hello, whose bytes (and maybe some that
// follow) are data, and begins to connect.
func (l *loop) route(c *conn, peer netip.AddrPort, data []byte, scan *helloScan) {
	if reason := l.parse(data, scan); reason != "" {
		h := &l.hello
		if reason == gateway.RefuseNotTLS {
			h = nil
		}
		l.refuse(c, peer, h, data, reason, "")
		return
	}
	cl := l.f.routes.Load().lookup(l.hello.name())
	if cl == nil {
		l.refuse(c, peer, &l.hello, data, gateway.RefuseNoRoute, "")
		return
	}
	l.dial.begin(l.f, cl, l.now)
	l.connect(c, peer, data, scan, &l.dial)
}

// connect tries endpoints until one takes the hello, or one lets us wait.
func (l *loop) connect(c *conn, peer netip.AddrPort, data []byte, scan *helloScan, d *dial) {
	for d.next(l.now) {
		fd, e := rawSocket(family(d.addr.Addr()))
		if e != 0 {
			d.abandon()
			l.f.fail(fmt.Errorf("connect to %s: socket: %w", d.addr, e))
			l.parse(data, scan)
			l.refuse(c, peer, &l.hello, data, gateway.RefuseLimit, "socket: "+e.Error())
			return
		}
		if e = rawConnect(fd, d.addr); e == 0 {
			// On loopback it is connected by now; elsewhere this asks and is told
			// to wait.
			var n int
			if n, e = rawSend(fd, data); e == 0 {
				c.fd[target] = fd
				l.open(c, peer, data, n, d)
				return
			}
			if e == unix.EAGAIN {
				c.fd[target] = fd
				l.await(c, peer, data, scan, d)
				return
			}
		}
		rawClose(fd)
		d.failed(l.now, e)
	}
	reason, detail := d.refusal()
	l.parse(data, scan)
	l.refuse(c, peer, &l.hello, data, reason, detail)
}

// await keeps what a connection needs while its endpoint has not answered.
func (l *loop) await(c *conn, peer netip.AddrPort, data []byte, scan *helloScan, d *dial) {
	b := c.begun
	if b == nil {
		b = l.newBegun()
		b.peer, b.scan = peer, *scan
		b.buf = append(l.block(len(data)), data...)
		c.begun = b
	}
	if d != &b.dial {
		b.dial = *d
	}
	c.phase = phaseConnecting
	l.unschedule(c)
	l.schedule(c, l.now+int64(d.timeout(l.now)))
	l.watch(c, target, unix.EPOLLOUT)
	if c.flags[client]&flagAdded == 0 {
		l.watch(c, client, 0)
	}
}

// answered is called when something has happened to a connection under way.
func (l *loop) answered(c *conn, events uint32) {
	b, gen := c.begun, c.gen
	n, e := rawSend(c.fd[target], b.buf)
	switch e {
	case 0:
		l.open(c, b.peer, b.buf, n, &b.dial)
		if events&^uint32(unix.EPOLLOUT) != 0 && c.gen == gen && c.phase == phaseOpen {
			l.pump(c, target) // it spoke first; the edge was this one
		}
	case unix.EAGAIN:
	default:
		l.nextEndpoint(c, e)
	}
}

func (l *loop) nextEndpoint(c *conn, cause error) {
	b := c.begun
	rawClose(c.fd[target])
	c.fd[target], c.flags[target] = -1, 0
	b.dial.failed(l.now, cause)
	l.connect(c, b.peer, b.buf, &b.scan, &b.dial)
}

// parse reads a complete hello into l.hello: once to route it, and again to tell
// of it when other hellos may have been read since.
func (l *loop) parse(data []byte, scan *helloScan) (reason string) {
	if scan.recs > 1 && l.spare == nil {
		l.spare = make([]byte, maxHelloBytes)
	}
	return l.hello.parse(scan.message(data, l.spare))
}

// open begins to move bytes. sent of data, the hello, are with the endpoint.
func (l *loop) open(c *conn, peer netip.AddrPort, data []byte, sent int, d *dial) {
	c.owner, c.ep = d.done()
	c.count = c.owner.counter(l.worker, len(l.e.loops))
	add(&c.count.in, sent)
	c.phase = phaseOpen
	c.active = l.tick
	if l.f.log.IsTrace() {
		var scan helloScan
		if scan.feed(data, maxHelloBytes+1); scan.need > 0 && scan.msg == scan.need {
			l.parse(data, &scan)
		}
		l.f.log.Trace("connected", "listener", c.l.name(), "peer_addr", peer, "server_name", string(l.hello.name()),
			"cluster", c.owner.name, "endpoint", c.ep.key)
	}
	var out uint32
	if sent < len(data) {
		h := l.newHeld()
		h.buf = append(l.block(len(data)-sent), data[sent:]...)
		h.data = h.buf
		c.held[client] = h
		out = unix.EPOLLOUT
	}
	// Keepalive is for connections that last: set then, it costs the short ones
	// nothing.
	wait := min(l.f.cfg.Keepalive.Idle/2, l.f.cfg.keepalive(d.tier.keepalive).Idle/2, 10*time.Second)
	if idle := l.f.cfg.idleLimit(false); idle > 0 {
		wait = min(wait, idle)
	}
	waited := c.begun != nil
	if waited {
		l.dropBegun(c)
		l.unschedule(c)
	}
	l.schedule(c, l.now+int64(wait))
	l.watch(c, target, out)
	if c.flags[client]&flagAdded == 0 {
		l.watch(c, client, 0)
	} else {
		// Edges that came before are gone.
		l.pump(c, client)
	}
}

// watch puts a side into the epoll set, or adds EPOLLOUT to what is watched.
func (l *loop) watch(c *conn, side int, out uint32) {
	op := unix.EPOLL_CTL_ADD
	switch {
	case c.flags[side]&flagAdded == 0:
	case out == 0 || c.flags[side]&flagOut != 0:
		return
	default:
		op = unix.EPOLL_CTL_MOD
	}
	c.flags[side] |= flagAdded
	if out != 0 {
		c.flags[side] |= flagOut
	}
	ev := unix.EpollEvent{
		Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET&0xffffffff | out,
		Fd:     int32(c.id<<1 | uint32(side)), Pad: c.gen,
	}
	if e := rawEpollCtl(l.ep, op, c.fd[side], &ev); e != 0 {
		// Out of memory or of user watches: it would never be heard of again, so
		// let the timer end it now.
		l.f.fail(fmt.Errorf("watch connection: epoll_ctl: %w", e))
		l.unschedule(c)
		c.phase |= doomed
		l.schedule(c, l.now)
	}
}

func (l *loop) event(key uint32, gen int32, events uint32) {
	c, side := l.conn(key>>1), int(key&1)
	if c.gen != gen {
		return // of a connection that ended earlier in this turn
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.flags[side] |= flagHup
	}
	switch c.phase {
	case phaseHello:
		l.moreHello(c)
	case phaseConnecting:
		if side == target {
			l.answered(c, events)
		} else if events&unix.EPOLLERR != 0 {
			b := c.begun
			b.dial.abandon()
			l.parse(b.buf, &b.scan)
			l.refuse(c, b.peer, &l.hello, b.buf, gateway.RefuseClientGone, "while connecting to "+b.dial.addr.String())
		}
	case phaseOpen:
		if events&unix.EPOLLERR != 0 && c.held[side] != nil {
			// Reset, while what it sent before cannot be passed on.
			l.end(c, true)
			return
		}
		if events&unix.EPOLLOUT != 0 && c.held[1-side] != nil {
			if !l.pump(c, 1-side) {
				return
			}
		}
		if events&^uint32(unix.EPOLLOUT) != 0 {
			l.pump(c, side)
		}
	}
}

// pump moves what src has sent until there is no more, the other side takes no
// more, or others are due. It returns false when the connection has ended.
func (l *loop) pump(c *conn, src int) bool {
	dst := 1 - src
	fd, to := c.fd[src], c.fd[dst]
	count := &c.count.in
	if src == target {
		count = &c.count.out
	}
	left := burst
	if h := c.held[src]; h != nil {
		switch n, e := l.flush(c, h, to); {
		case e == unix.EAGAIN:
			add(count, n)
			l.watch(c, dst, unix.EPOLLOUT)
			return true
		case e != 0:
			l.end(c, true)
			return false
		default:
			add(count, n)
			c.held[src] = nil
			l.dropHeld(h)
		}
		c.active = l.tick
	}
	if c.flags[src]&flagEOF != 0 {
		return true
	}
	for left > 0 {
		if c.flags[src]&flagBulk != 0 {
			n, drained, ok := l.splice(c, src, left)
			add(count, n)
			if !ok {
				return false
			}
			if n > 0 {
				c.active = l.tick
			}
			left -= n
			if drained || c.held[src] != nil {
				return true
			}
			continue
		}
		n, e := rawRecv(fd, l.buf)
		switch {
		case e == unix.EAGAIN:
			return true
		case e != 0:
			l.end(c, true)
			return false
		case n == 0:
			return l.eof(c, src)
		}
		c.active = l.tick
		if dst == target && c.flags[target]&flagNoDelay == 0 {
			// The hello went out without; only from the second write on can the
			// kernel hold anything back.
			c.flags[target] |= flagNoDelay
			rawSetInt(to, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
		}
		k, e := rawSend(to, l.buf[:n])
		if e == unix.EAGAIN {
			k = 0
		} else if e != 0 {
			l.end(c, true)
			return false
		}
		add(count, k)
		if k < n {
			h := l.newHeld()
			h.buf = append(l.block(n-k), l.buf[k:n]...)
			h.data = h.buf
			c.held[src] = h
			l.watch(c, dst, unix.EPOLLOUT)
			return true
		}
		left -= n
		if n == len(l.buf) {
			if c.full[src]++; c.full[src] >= 2 && !l.noPipes {
				c.flags[src] |= flagBulk
			}
			continue
		}
		c.full[src] = 0
		if c.flags[src]&flagHup == 0 {
			return true // a short read: there is no more, and more makes an edge
		}
	}
	l.enqueue(c, src)
	return true
}

// flush writes what is held. EAGAIN says that some of it is left.
func (l *loop) flush(c *conn, h *held, to int32) (n int, e syscall.Errno) {
	for len(h.data) > 0 {
		k, e := rawSend(to, h.data)
		if e != 0 {
			return n, e
		}
		h.data = h.data[k:]
		n += k
	}
	for h.n > 0 {
		k, e := rawSplice(h.pipe.r, to, h.n)
		if e != 0 {
			return n, e
		}
		h.n -= k
		n += k
	}
	return n, 0
}

// splice moves bytes through a pipe, in the kernel. drained says that the
// source has no more for now; ok is false when the connection has ended.
func (l *loop) splice(c *conn, src, most int) (moved int, drained, ok bool) {
	p, got := l.pipe()
	if !got {
		c.flags[src] &^= flagBulk
		c.full[src] = 0
		return 0, false, true
	}
	fd, to := c.fd[src], c.fd[1-src]
	for moved < most {
		n, e := rawSplice(fd, p.w, pipeSize)
		switch {
		case e == unix.EAGAIN:
			if moved < bulkLeast {
				c.flags[src] &^= flagBulk
				c.full[src] = 0
			}
			l.dropPipe(p, true)
			return moved, true, true
		case e == unix.EINVAL:
			// No splice here: copy from now on.
			l.noPipes = true
			c.flags[src] &^= flagBulk
			l.dropPipe(p, true)
			return moved, false, true
		case e != 0:
			l.dropPipe(p, false)
			l.end(c, true)
			return moved, false, false
		case n == 0:
			l.dropPipe(p, true)
			return moved, true, l.eof(c, src)
		}
		for n > 0 {
			k, e := rawSplice(p.r, to, n)
			if e == unix.EAGAIN {
				h := l.newHeld()
				h.pipe, h.n = p, n
				c.held[src] = h
				l.watch(c, 1-src, unix.EPOLLOUT)
				return moved, false, true
			}
			if e != 0 {
				l.dropPipe(p, false)
				l.end(c, true)
				return moved, false, false
			}
			n -= k
			moved += k
		}
	}
	l.dropPipe(p, true)
	return moved, false, true
}

// eof passes the end of what src sends on. It returns false when that was the
// end of the connection.
func (l *loop) eof(c *conn, src int) bool {
	c.flags[src] |= flagEOF
	if c.flags[1-src]&flagEOF != 0 {
		// An end is read only once what came before it is written: nothing is held.
		l.end(c, false)
		return false
	}
	rawShutdown(c.fd[1-src])
	if d := l.f.cfg.idleLimit(true); d > 0 {
		l.schedule(c, l.now+int64(d))
	}
	return true
}

// end closes a connection; with reset, so that both sides see that it was cut.
func (l *loop) end(c *conn, reset bool) {
	if c.owner != nil {
		closed(c.owner, c.ep)
	}
	if c.begun != nil {
		l.dropBegun(c)
	}
	l.unschedule(c)
	for src, h := range c.held {
		if h != nil {
			l.dropHeld(h)
			c.held[src] = nil
		}
	}
	c.l.active.Add(-1)
	for _, fd := range c.fd {
		if fd < 0 {
			continue
		}
		if reset {
			rawAbort(fd)
		}
		rawClose(fd)
	}
	*c = conn{id: c.id, gen: c.gen + 1}
	l.unused = append(l.unused, c.id)
}

// refuse closes a connection that reaches no endpoint.
func (l *loop) refuse(c *conn, peer netip.AddrPort, h *hello, data []byte, reason, detail string) {
	l.f.refuse(c.l, peer, h, len(data), reason, detail)
	l.end(c, false)
}

func (l *loop) closeConns(ln *listener) {
	for _, chunk := range l.chunks {
		for i := range chunk {
			c := &chunk[i]
			if c.phase == phaseFree || ln != nil && c.l != ln {
				continue
			}
			if c.phase&^doomed == phaseConnecting {
				c.begun.dial.abandon()
			}
			l.end(c, false)
		}
	}
}

// add counts bytes; this loop is the only writer of its counters.
func add(n interface {
	Load() uint64
	Store(uint64)
}, k int) {
	n.Store(n.Load() + uint64(k))
}

// ---- the run queue

func (l *loop) enqueue(c *conn, src int) {
	if c.flags[src]&flagQueued == 0 {
		c.flags[src] |= flagQueued
		l.queue = append(l.queue, ref{c.id, c.gen, uint8(src)})
	}
}

func (l *loop) runQueue() {
	if len(l.queue) == 0 {
		return
	}
	l.turn, l.queue = l.queue, l.turn[:0]
	for _, r := range l.turn {
		if c := l.conn(r.id); c.gen == r.gen {
			c.flags[r.src] &^= flagQueued
			l.pump(c, int(r.src))
		}
	}
}

// ---- timers

func tickOf(now int64) uint32 { return uint32(now >> tickShift) }

// schedule sets the connection's timer, unless it is due earlier as it is.
func (l *loop) schedule(c *conn, at int64) {
	deadline := tickOf(at) + 1
	if c.linked {
		if int32(deadline-c.deadline) >= 0 {
			return
		}
		l.unschedule(c)
	}
	c.deadline = deadline
	l.link(c)
}

func (l *loop) link(c *conn) {
	slot := c.deadline
	if d := int32(slot - l.tick); d < 1 {
		slot = l.tick + 1
	} else if d >= wheelSlots {
		slot = l.tick + wheelSlots - 1
	}
	slot %= wheelSlots
	c.linked, c.prev, c.next = true, 0, l.wheel[slot]
	if c.next != 0 {
		l.conn(c.next).prev = c.id
	}
	// The head knows its slot by a complement: no connection has such an index.
	c.prev = ^slot
	l.wheel[slot] = c.id
	l.filled[slot/64] |= 1 << (slot % 64)
}

func (l *loop) unschedule(c *conn) {
	if !c.linked {
		return
	}
	c.linked = false
	if c.next != 0 {
		l.conn(c.next).prev = c.prev
	}
	if slot := ^c.prev; slot < wheelSlots {
		l.wheel[slot] = c.next
		if c.next == 0 {
			l.filled[slot/64] &^= 1 << (slot % 64)
		}
	} else {
		l.conn(c.prev).next = c.next
	}
}

// nextTimer is how many milliseconds there are until a slot with timers, -1 if
// there is none.
func (l *loop) nextTimer() int64 {
	for i := uint32(1); i < wheelSlots; {
		slot := (l.tick + i) % wheelSlots
		word := l.filled[slot/64] >> (slot % 64)
		if word == 0 {
			i += 64 - slot%64
			continue
		}
		i += uint32(bits.TrailingZeros64(word))
		at := (l.now>>tickShift + int64(i)) << tickShift
		return max(0, (at-l.now)/1e6) + 1
	}
	return -1
}

func (l *loop) advance() {
	if l.paused != 0 && l.now >= l.paused {
		l.resume()
	}
	now := tickOf(l.now)
	if n := now - l.tick; n > wheelSlots {
		l.tick = now - wheelSlots
	}
	for l.tick != now {
		l.tick++
		slot := l.tick % wheelSlots
		id := l.wheel[slot]
		if id == 0 {
			continue
		}
		l.wheel[slot] = 0
		l.filled[slot/64] &^= 1 << (slot % 64)
		for id != 0 {
			c := l.conn(id)
			id = c.next
			c.linked = false
			if int32(c.deadline-l.tick) > 0 {
				l.link(c)
			} else {
				l.fire(c)
			}
		}
	}
}

func (l *loop) fire(c *conn) {
	switch c.phase {
	case phaseHello:
		l.refuse(c, c.begun.peer, nil, c.begun.buf, gateway.RefuseHelloTimeout, l.f.cfg.HelloTimeout.String())
	case phaseConnecting:
		l.nextEndpoint(c, errConnectTimeout)
	case phaseOpen:
		if c.flags[target]&flagKeep == 0 {
			c.flags[target] |= flagKeep
			setKeepalive(c.fd[client], l.f.cfg.Keepalive)
			setKeepalive(c.fd[target], l.f.cfg.keepalive(c.keepalive()))
		}
		half := (c.flags[client]|c.flags[target])&flagEOF != 0
		idle := l.f.cfg.idleLimit(half)
		if idle == 0 {
			return
		}
		if quiet := time.Duration(l.tick-c.active) << tickShift; quiet >= idle {
			l.end(c, false)
		} else {
			l.schedule(c, l.now+int64(idle-quiet))
		}
	case phaseConnecting | doomed:
		c.begun.dial.abandon()
		l.end(c, true)
	default:
		l.end(c, true)
	}
}

// keepalive is that of the cluster, as its table now says.
func (c *conn) keepalive() (k gateway.Keepalive) {
	if pl := c.owner.plan.Load(); pl != nil {
		for i := range pl.tiers {
			if pl.tiers[i].owner == c.owner {
				return pl.tiers[i].keepalive
			}
		}
	}
	return k
}

// ---- pools

// Blocks have sizes from 2 to 64 KiB.
const (
	smallestBlock = 11
	blockClasses  = 6
)

func blockClass(n int) int { return max(bits.Len(uint(n-1)), smallestBlock) - smallestBlock }

// block returns an empty slice with room for n bytes, at most 64 KiB.
func (l *loop) block(n int) []byte {
	k := blockClass(max(n, 1))
	if s := l.blocks[k]; len(s) > 0 {
		b := s[len(s)-1]
		l.blocks[k] = s[:len(s)-1]
		return b[:0]
	}
	return make([]byte, 0, 1<<(k+smallestBlock))
}

func (l *loop) unblock(b []byte) {
	if cap(b) == 0 {
		return
	}
	if k := blockClass(cap(b)); len(l.blocks[k]) < keepBlocks {
		l.blocks[k] = append(l.blocks[k], b)
	}
}

func (l *loop) newHeld() *held {
	if n := len(l.helds); n > 0 {
		h := l.helds[n-1]
		l.helds = l.helds[:n-1]
		return h
	}
	return &held{}
}

func (l *loop) dropHeld(h *held) {
	l.unblock(h.buf)
	if h.pipe != (pipe{}) {
		l.dropPipe(h.pipe, h.n == 0)
	}
	*h = held{}
	if len(l.helds) < keepBlocks {
		l.helds = append(l.helds, h)
	}
}

func (l *loop) newBegun() *begun {
	if n := len(l.begins); n > 0 {
		b := l.begins[n-1]
		l.begins = l.begins[:n-1]
		return b
	}
	return &begun{}
}

func (l *loop) dropBegun(c *conn) {
	b := c.begun
	c.begun = nil
	l.unblock(b.buf)
	*b = begun{}
	if len(l.begins) < keepBlocks {
		l.begins = append(l.begins, b)
	}
}

// pipe returns an empty pipe, or false when there is none to be had.
func (l *loop) pipe() (pipe, bool) {
	if l.pipesIn >= maxPipes {
		return pipe{}, false
	}
	if n := len(l.pipes); n > 0 {
		p := l.pipes[n-1]
		l.pipes = l.pipes[:n-1]
		l.pipesIn++
		return p, true
	}
	var p [2]int
	if unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC) != nil {
		return pipe{}, false
	}
	if _, err := unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		// The user's quota of pipe pages (pipe(7)) is used up. What the kernel still
		// gives may be a pipe of two pages, which is worse than copying.
		if size, err := unix.FcntlInt(uintptr(p[0]), unix.F_GETPIPE_SZ, 0); err != nil || size < leastPipe {
			unix.Close(p[0])
			unix.Close(p[1])
			return pipe{}, false
		}
	}
	l.pipesIn++
	return pipe{int32(p[0]), int32(p[1])}, true
}

// dropPipe gives a pipe back. One with bytes in it is of no more use.
func (l *loop) dropPipe(p pipe, empty bool) {
	l.pipesIn--
	if empty && len(l.pipes) < keepPipes {
		l.pipes = append(l.pipes, p)
		return
	}
	rawClose(p.r)
	rawClose(p.w)
}
