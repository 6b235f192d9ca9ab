package sni

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
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
	fds, addr, err := listenSockets(addr, len(e.loops))
	if err != nil {
		return "", err
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

func (e *epoll) closeConns(l *listener, why closeReason) {
	for _, lp := range e.loops {
		lp.do(func() { lp.closeConns(l, why) })
	}
}

func (e *epoll) hold(l *listener) error {
	return e.socketsOf(l, gateway.HoldOff)
}

func (e *epoll) tune(l *listener) error {
	cc := l.terms.Load().spec.CongestionControl
	return e.socketsOf(l, func(fd int) error { return setCongestion(fd, cc) })
}

// socketsOf calls fn with each socket of a listener, until it fails.
func (e *epoll) socketsOf(l *listener, fn func(fd int) error) (err error) {
	for _, lp := range e.loops {
		lp.do(func() {
			for _, s := range lp.socks {
				if s != nil && s.l == l && err == nil {
					err = fn(int(s.fd))
				}
			}
		})
	}
	return err
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
	phaseAnswer // the hello is with the endpoint, and can be sent to another
	phaseOpen

	// doomed marks a connection that the timer is to end: events cannot be had.
	doomed = 0x80
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

	// flagMore says that the client may have sent more than the hello; a flag of the
	// client, which has no use for the other meaning.
	flagMore = flagNoDelay
)

// conn is one connection with both its sockets: all there is of it while it is
// idle. It is known by its index, and by a generation that tells it from others
// that had the index before.
type conn struct {
	fd    [2]int32
	flags [2]uint8
	full  [2]uint8 // reads in a row that filled the buffer
	phase uint8
	// linked says whether the timer is in the wheel.
	linked bool
	// fired says that the timer is over, and waits for its turn.
	fired bool
	gen   int32
	id    uint32
	born  uint32 // the tick of accepting

	// Timer wheel: neighbours, and the tick of the deadline.
	next, prev uint32
	deadline   uint32
	active     uint32 // the tick of the last byte
	via        uint32 // the number of the cluster it was routed to, with owner

	bytes  [2]uint64 // that were passed on, by the side they came from
	l      *listener
	owner  *cluster
	ep     *endpoint
	source *source  // that accounts it; nil where sources are not limited
	held   [2]*held // what was read of a side and could not be written yet
	begun  *begun   // until the connection is open
	note   *note    // of the few that need it
}

// note is what is kept of a connection only where something asks for it.
type note struct {
	// src and dst are those of a header of the PROXY protocol, else not valid.
	src, dst netip.AddrPort

	// logged says that the end is to be told; what follows is set only then.
	logged bool
	peer   netip.AddrPort // as the kernel says
	name   string
}

// held is what waits for the other side: bytes, or a pipe with bytes.
type held struct {
	buf  []byte // to be given back
	data []byte // the part of buf still to be written
	pipe pipe
	n    int // bytes in the pipe
}

type pipe struct{ r, w int32 }

// begun is what a connection needs before it is open, the answer of its endpoint
// included, and not after.
type begun struct {
	peer netip.AddrPort
	buf  []byte // the hello so far; its capacity is a class of blocks
	scan helloScan
	dial dial
	// expect says that a header of the PROXY protocol may come, and was not seen.
	expect bool
	rivals []rival
	sentAt int64 // when the endpoint had the hello
	passed int   // bytes of the hello that it has

	// While the hello is waited for: the queue it is in, its neighbours there, and
	// until when it is.
	hellos       *hellos
	older, newer *begun
	due          int64
	id           uint32 // of the connection
}

// rival is an attempt to connect to an address of the endpoint that began before the
// one under way, and still is too (RFC 8305 5).
type rival struct {
	fd int32
	attempt
}

// hellos are the connections of a listener, in one loop, whose hello is waited
// for, by their ages, and so by when each is due.
type hellos struct {
	oldest, newest *begun
	n              int
	last           bool // nobody joins any more
}

func (q *hellos) add(b *begun) {
	b.hellos, b.older = q, q.newest
	if q.newest != nil {
		q.newest.newer = b
	} else {
		q.oldest = b
	}
	q.newest = b
	q.n++
}

// remove takes b out of its queue, if it is in one.
func (b *begun) remove() {
	q := b.hellos
	if q == nil {
		return
	}
	if b.older != nil {
		b.older.newer = b.newer
	} else {
		q.oldest = b.newer
	}
	if b.newer != nil {
		b.newer.older = b.older
	} else {
		q.newest = b.older
	}
	b.hellos, b.older, b.newer = nil, nil, nil
	q.n--
}

const (
	// pipeSize is the most that is had without privileges (pipe(7)): bytes that are
	// moved many at a time cost less, and fewer wakeups. slowPipe is for where there
	// is no such, or many may be full.
	pipeSize  = 1 << 20
	slowPipe  = 256 << 10
	leastPipe = 64 << 10
	// bulkLeast is what a splice must have moved for the next to be worth it.
	bulkLeast  = 32 << 10
	maxPipes   = 256     // in use by one loop: 512 descriptors, 112 MiB when all are full
	fastPipes  = 64      // of them, those that are filled
	keepPipes  = 32      // unused in its pool
	keepBlocks = 1 << 20 // bytes of each size
	keepBegun  = 512
	keepHeld   = 64
	keepNotes  = 1024

	tickShift  = 23 // a tick is 8.4 ms
	wheelSlots = 1024

	// rawWaitMS is how long a loop that has just had work waits for more without
	// giving its processor back to the scheduler.
	rawWaitMS = 4
	// bulkTurn is what a turn must have spliced for the loop to rest after it: it
	// gives way bulkYields times to whoever wants the processor, and sleeps for
	// bulkPause and what the kernel adds (the timer slack, 50 µs). Bytes gather
	// meanwhile, and who sends and who reads them have the processors. Without, a
	// loop that keeps up with its peers moves packet by packet, at the price of a
	// wakeup for each.
	bulkTurn   = 2 * readBuffer
	bulkYields = 2
	bulkPause  = time.Microsecond
	// acceptPause is how long a loop that ran out of descriptors accepts nothing.
	acceptPause = 50 * time.Millisecond
	maxAccept   = 16
	// maxFired bounds the timers that are served in one turn: thousands of clients that
	// came at one time with nothing to say go at one time.
	maxFired = 16
	// maxDrained bounds what is accepted of a socket that is to be closed.
	maxDrained = 1 << 16

	connChunk = 512
)

// sock is a loop's socket of a listener.
type sock struct {
	l     *listener
	fd    int32
	batch int // connections to accept at one time, see accept
	wait  *hellos
}

type loop struct {
	e      *epoll
	f      *Forwarder
	worker int
	ep, ev int32 // epoll set; eventfd that wakes it

	mu       sync.Mutex // guards todo
	todo     []func()
	stopping bool // the loop's own

	now   int64  // of this turn, on the forwarder's clock
	clock uint32 // now as a tick
	tick  uint32 // up to which timers have fired
	busy  bool

	events [256]unix.EpollEvent
	buf    []byte
	spare  []byte // to put a hello of several records together
	header [maxProxyV1]byte
	head   []byte // the PROXY header that was sent last with a hello, in header
	hello  hello
	dial   dial
	sa     unix.RawSockaddrAny

	chunks [][]conn
	unused []uint32
	socks  []*sock // by the number in their events; nil where removed
	waits  []*hellos
	paused int64 // when to accept again; 0 is now

	queue  []ref
	turn   []ref
	over   []ref // whose timers are over
	served int   // of over
	wheel  [wheelSlots]uint32
	filled [wheelSlots / 64]uint64

	blocks  [blockClasses][][]byte
	helds   []*held
	begins  []*begun
	notes   []*note
	pipes   []pipe
	pipesIn int // in use
	noPipes bool
	spliced int // bytes, in this turn
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
	l.clock = tickOf(l.now)
	l.tick = l.clock
	return l, nil
}

func (l *loop) free() {
	for _, p := range l.pipes {
		p.close()
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
		l.clock = tickOf(l.now)
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
		l.fireSome()
		l.shed()
		l.runQueue()
	}
	l.closeConns(nil, closeStopped)
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
	if l.spliced >= bulkTurn {
		for range bulkYields {
			rawYield()
		}
		rawPause(bulkPause)
	}
	l.spliced = 0
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
	if len(l.queue) > 0 || len(l.over) > 0 {
		return 0
	}
	ms := -1
	if t := l.nextTimer(); t >= 0 {
		ms = int(t)
	}
	until := func(at int64) {
		if t := int(max(0, at-l.now)/1e6) + 1; ms < 0 || t < ms {
			ms = t
		}
	}
	if l.paused != 0 {
		until(l.paused)
	}
	for _, q := range l.waits {
		if q.oldest != nil {
			until(q.oldest.due)
		}
	}
	return ms
}

func (l *loop) addListener(ln *listener, fd int32) {
	s := &sock{l: ln, fd: fd, batch: 1, wait: &hellos{}}
	l.waits = append(l.waits, s.wait)
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

// removeListener closes a socket, after accepting what waits there: closing would
// reset it.
func (l *loop) removeListener(ln *listener) {
	for i, s := range l.socks {
		if s != nil && s.l == ln {
			for range maxDrained {
				fd, e := rawAccept(s.fd, &l.sa)
				if e != 0 {
					break
				}
				l.begin(s, fd)
			}
			rawClose(s.fd)
			s.wait.last = true
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
		switch {
		case e == 0:
			l.begin(s, fd)
		case e == unix.EAGAIN:
			s.batch = max(1, k)
			return
		case !passing(e):
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
