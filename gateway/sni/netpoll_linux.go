package sni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/gateway"
)

// On Linux the portable engine makes the same system calls as the epoll engine.
// Only where it has to wait does the runtime's poller learn of a socket.

// wire is a socket of a connection.
type wire struct {
	file *os.File // nil until it is watched
	raw  syscall.RawConn
	fd   int32 // valid if open
	open bool
}

// watch makes it possible to wait for the socket.
func (w *wire) watch() (err error) {
	if w.file == nil {
		w.file = os.NewFile(uintptr(w.fd), "")
		w.raw, err = w.file.SyscallConn()
	}
	return err
}

func (w *wire) close() {
	switch {
	case w.file != nil:
		w.file.Close()
	case w.open:
		rawClose(w.fd)
	}
	*w = wire{}
}

// Deadlines of what is not watched have no use, and errors are those of a socket
// that is being closed.

func (w *wire) setDeadline(t time.Time) {
	if w.file != nil {
		w.file.SetDeadline(t)
	}
}

func (w *wire) setReadDeadline(t time.Time)  { w.file.SetReadDeadline(t) }
func (w *wire) setWriteDeadline(t time.Time) { w.file.SetWriteDeadline(t) }

func (w *wire) shutdown()                     { rawShutdown(w.fd) }
func (w *wire) reset()                        { rawAbort(w.fd) }
func (w *wire) noDelay()                      { rawSetInt(w.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) }
func (w *wire) keepalive(k gateway.Keepalive) { setKeepalive(w.fd, k) }
func (w *wire) local() netip.AddrPort         { return rawLocal(w.fd) }

func recv(fd int32, b []byte) (int, syscall.Errno) { return rawRecv(fd, b) }
func send(fd int32, b []byte) (int, syscall.Errno) { return rawSend(fd, b) }

// netpollListener has sockets that share a port, each with a goroutine that accepts.
type netpollListener struct {
	socks []*wire
	quit  chan struct{}
	wg    sync.WaitGroup
}

func (e *netpoll) listen(l *listener) (string, error) {
	addr, err := checkListener(l)
	if err != nil {
		return "", err
	}
	fds, bound, err := listenSockets(addr, ownProcs())
	if err != nil {
		return "", err
	}
	nl := &netpollListener{quit: make(chan struct{})}
	for _, fd := range fds {
		s := &wire{fd: fd, open: true}
		err = errors.Join(err, s.watch())
		nl.socks = append(nl.socks, s)
	}
	if err != nil {
		nl.close()
		return "", err
	}
	e.socks[l] = nl
	for _, s := range nl.socks {
		nl.wg.Go(func() { e.accept(l, nl, s) })
	}
	return bound.String(), nil
}

// close returns when nothing more is accepted.
func (nl *netpollListener) close() {
	close(nl.quit)
	for _, s := range nl.socks {
		s.setDeadline(past)
	}
	nl.wg.Wait()
	for _, s := range nl.socks {
		s.close()
	}
}

func (e *netpoll) hold(l *listener) error { return e.socks[l].each(gateway.HoldOff) }

func (e *netpoll) tune(l *listener) error {
	cc := l.terms.Load().spec.CongestionControl
	return e.socks[l].each(func(fd int) error { return setCongestion(fd, cc) })
}

// each calls fn with each socket until it fails.
func (nl *netpollListener) each(fn func(fd int) error) error {
	for _, s := range nl.socks {
		if err := fn(int(s.fd)); err != nil {
			return err
		}
	}
	return nil
}

// acceptor accepts the connections of a socket.
type acceptor struct {
	e     *netpoll
	l     *listener
	fd    int32
	s     *setup // of the next connection
	sa    unix.RawSockaddrAny
	errno syscall.Errno
}

func (e *netpoll) accept(l *listener, nl *netpollListener, s *wire) {
	const pauseMin, pauseMax = 5 * time.Millisecond, time.Second
	a := &acceptor{e: e, l: l, fd: s.fd, s: e.newSetup()}
	defer func() { e.drop(a.s) }()
	for pause := pauseMin; ; {
		a.errno = 0
		err := s.raw.Read(a.ready)
		if err != nil {
			break // the deadline is the end
		}
		// Such as no more file descriptors: wait until some are closed.
		e.f.fail(fmt.Errorf("accept on %s: %w", l.address, a.errno))
		t := time.NewTimer(pause)
		select {
		case <-t.C:
			pause = min(2*pause, pauseMax)
			continue
		case <-nl.quit:
			t.Stop()
		}
		break
	}
	// To close the socket would reset what waits there.
	for range maxDrained {
		if a.one() != 0 {
			break
		}
	}
}

// ready accepts what there is. It returns true when it could not.
func (a *acceptor) ready(uintptr) bool {
	for n := 1; ; n++ {
		switch errno := a.one(); errno {
		case 0:
		case unix.EAGAIN:
			return false
		default:
			a.errno = errno
			return true
		}
		if n%maxAccept == 0 {
			runtime.Gosched()
		}
	}
}

// one accepts a connection.
func (a *acceptor) one() syscall.Errno {
	fd, errno := rawAccept(a.fd, &a.sa)
	if errno != 0 {
		if passing(errno) {
			return 0
		}
		return errno
	}
	p := &netpollConn{l: a.l, born: a.e.f.now(), peer: getSockaddr(&a.sa)}
	p.side[client] = wire{fd: fd, open: true}
	a.e.wg.Add(1)
	if a.begin(p) {
		a.s = a.e.newSetup()
	} else {
		a.e.end(p)
	}
	return 0
}

// begin starts with an accepted connection. Its hello is most often here already,
// and then nothing of it is waited for. It returns false when the connection is
// refused.
func (a *acceptor) begin(p *netpollConn) bool {
	e, s := a.e, a.s
	if !e.begin(s, p) {
		return false
	}
	if s.block == nil || len(s.block.buf) < readBuffer {
		if s.block != nil {
			e.blocks.put(s.block)
		}
		s.block = e.blocks.get(readBuffer)
	}
	s.data = s.block.buf[:0]
	n, errno := rawRecv(p.side[client].fd, e.room(s))
	if errno == unix.EAGAIN {
		n = 0
	} else if errno != 0 || n == 0 {
		e.tell(s, nil, gateway.RefuseClientGone, "")
		return false
	}
	done, reason, detail := e.take(s, n)
	switch {
	case reason != "":
		e.tell(s, nil, reason, detail)
		return false
	case done && !e.route(s):
		return false
	case done:
		switch e.connect(s) {
		case reached:
			e.fit(s)
			e.open(s)
		case reaching:
			e.fit(s)
			go func() {
				if e.awaitReached(s) {
					e.open(s)
					return
				}
				e.end(p)
				e.drop(s)
			}()
		default:
			return false
		}
		return true
	}
	if err := p.side[client].watch(); err != nil {
		e.tell(s, nil, gateway.RefuseLimit, err.Error())
		return false
	}
	e.fit(s)
	// Here and not in its goroutine: they are not run in the order in which their
	// connections came, and the one that has waited longest is to be shed.
	e.wait(s)
	go e.serve(s)
	return true
}

// progress is how far connect has come.
type progress int

const (
	unreached progress = iota // no endpoint, which was told
	reaching                  // an endpoint lets us wait
	reached                   // an endpoint has the hello
)

// reach connects to an endpoint and sends it the hello. It returns false when the
// connection is refused.
func (e *netpoll) reach(s *setup) bool {
	p := e.connect(s)
	return p == reached || p == reaching && e.awaitReached(s)
}

// connect tries endpoints until one takes the hello, or one lets us wait.
func (e *netpoll) connect(s *setup) progress {
	f, d := e.f, &s.dial
	for d.next(f.now()) {
		fd, errno := d.socket()
		if errno != 0 {
			d.abandon()
			f.fail(fmt.Errorf("connect to %s: socket: %w", d.addr, errno))
			e.tell(s, &s.hello, gateway.RefuseLimit, "socket: "+errno.Error())
			return unreached
		}
		if errno = rawConnect(fd, d.addr); errno == 0 {
			// On loopback it is connected by now; elsewhere this asks and is told to
			// wait.
			s.greet()
			if errno = s.send(fd); errno == 0 || errno == unix.EAGAIN {
				w := wire{fd: fd, open: true}
				if err := errors.Join(w.watch(), s.p.side[client].watch()); err != nil {
					w.close()
					d.abandon()
					f.fail(fmt.Errorf("watch connection: %w", err))
					e.tell(s, &s.hello, gateway.RefuseLimit, err.Error())
					return unreached
				}
				e.set(s.p, w)
				if errno != 0 {
					return reaching
				}
				return reached
			}
		}
		rawClose(fd)
		d.failed(f.now(), errno)
	}
	e.unreached(s)
	return unreached
}

// connectFor returns a connector for the choice's addresses.
func connectFor(d *dial) connector {
	cc := d.tier.congestion
	return func(ctx context.Context, a attempt) (wire, error) {
		fd, errno := socketFor(a.addr, cc)
		if errno != 0 {
			return wire{}, errno
		}
		w := wire{fd: fd, open: true}
		if errno = rawConnect(fd, a.addr); errno != 0 {
			w.close()
			return wire{}, errno
		}
		if err := w.watch(); err != nil {
			w.close()
			return wire{}, err
		}
		return w.reached(ctx)
	}
}

// reached waits until a socket is connected. One that is not is closed.
func (w wire) reached(ctx context.Context) (wire, error) {
	file := w.file
	stop := context.AfterFunc(ctx, func() { file.SetWriteDeadline(past) })
	var errno syscall.Errno
	err := w.raw.Write(func(uintptr) bool {
		var connected bool
		connected, errno = rawConnected(w.fd)
		return connected || errno != 0
	})
	if !stop() && err == nil {
		err = ctx.Err() // whose deadline may still come
	}
	if err == nil && errno != 0 {
		err = errno
	}
	if err != nil {
		w.close()
		return wire{}, err
	}
	return w, nil
}

// send sends what the endpoint does not have yet.
func (s *setup) send(fd int32) syscall.Errno {
	for {
		head, data := s.head[min(s.sent, len(s.head)):], s.data[max(0, s.sent-len(s.head)):]
		var n int
		var errno syscall.Errno
		switch {
		case len(head) > 0:
			n, errno = rawSend2(fd, head, data)
		case len(data) > 0:
			n, errno = rawSend(fd, data)
		default:
			return 0
		}
		if errno != 0 {
			return errno
		}
		s.sent += n
	}
}

// awaitReached waits for the endpoint that lets us wait, or another.
func (e *netpoll) awaitReached(s *setup) bool {
	p, d := s.p, &s.dial
	w := &p.side[target]
	for {
		var errno syscall.Errno
		w.setWriteDeadline(time.Now().Add(d.timeout(e.f.now())))
		err := os.ErrDeadlineExceeded
		if e.see(p, nil) {
			err = w.raw.Write(func(uintptr) bool {
				errno = s.send(w.fd)
				return errno != unix.EAGAIN
			})
		}
		cause := error(errno)
		switch {
		case p.aborted.Load():
			d.abandon()
			e.cut(s)
			return false
		case err == nil && errno == 0:
			w.setWriteDeadline(time.Time{})
			return true
		case errors.Is(err, os.ErrDeadlineExceeded):
			cause = errConnectTimeout
			if s.sent > 0 || d.untried() <= 0 {
				break
			}
			w.setWriteDeadline(time.Time{})
			begun := *w
			e.set(p, wire{})
			won, err := e.race(s, func(ctx context.Context, _ attempt) (wire, error) { return begun.reached(ctx) }, connectFor(d), true)
			if err == nil {
				e.set(p, won)
				continue
			}
			if p.aborted.Load() {
				d.abandon()
				e.cut(s)
				return false
			}
			cause = err
		case err != nil:
			cause = err
		}
		e.unset(w)
		switch {
		case s.sent == 0:
			d.failed(e.f.now(), cause)
		case errno == unix.EAGAIN: // it is connected, and takes no more
			d.unanswered(e.f.now(), errNoAnswer)
		default:
			d.reset = true
			d.unanswered(e.f.now(), errResetUnanswered)
		}
		if p := e.connect(s); p != reaching {
			return p == reached
		}
	}
}

// sharedPipes are pipes for the connections of an engine.
type sharedPipes struct {
	none atomic.Bool // there is no splice here
	mu   sync.Mutex  // guards what follows
	idle []pipe
	in   int // in use
}

func (q *sharedPipes) usable() bool { return !q.none.Load() }

// get returns an empty pipe, or false when there is none to be had.
// It says how many bytes to put into it.
func (q *sharedPipes) get() (p pipe, fill int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.in >= maxPipes {
		return pipe{}, 0, false
	}
	if n := len(q.idle); n > 0 {
		p, ok = q.idle[n-1], true
		q.idle = q.idle[:n-1]
	} else {
		p, ok = newPipe()
	}
	if ok {
		q.in++
	}
	return p, pipeFill(q.in), ok
}

// put gives a pipe back. One with bytes in it is of no more use.
func (q *sharedPipes) put(p pipe, empty bool) {
	q.mu.Lock()
	q.in--
	keep := empty && len(q.idle) < keepPipes
	if keep {
		q.idle = append(q.idle, p)
	}
	q.mu.Unlock()
	if !keep {
		p.close()
	}
}

// free closes the pipes that nobody uses.
func (q *sharedPipes) free() {
	for _, p := range q.idle {
		p.close()
	}
	q.idle = nil
}

// splice moves bytes through a pipe, in the kernel, and waits for the other side.
// drained says that src has no more for now; ok is false when that was the end.
func (h *half) splice(most int) (moved int, drained, ok bool) {
	p := h.p
	pipes := &p.e.pipes
	q, fill, got := pipes.get()
	if !got {
		h.bulk, h.full = false, 0
		return 0, false, true
	}
	fd, to := p.side[h.src].fd, p.side[1-h.src].fd
	for moved < most {
		n, errno := rawSplice(fd, q.w, fill)
		switch {
		case errno == unix.EAGAIN:
			if moved < bulkLeast {
				h.bulk, h.full = false, 0
			}
			pipes.put(q, true)
			return moved, true, true
		case errno == unix.EINVAL:
			// No splice here: copy from now on.
			pipes.none.Store(true)
			h.bulk = false
			pipes.put(q, true)
			return moved, false, true
		case errno != 0:
			pipes.put(q, true)
			p.failed()
			return moved, false, false
		case n == 0:
			pipes.put(q, true)
			h.ended()
			return moved, false, false
		}
		moved += n
		h.inPipe = n
		h.pipe = q
		errno = h.empty(to)
		if errno == unix.EAGAIN {
			if !h.flush() {
				return moved, false, false
			}
			// It was given back when it was empty.
			return moved, false, true
		}
		h.pipe = pipe{}
		if errno != 0 {
			pipes.put(q, false)
			p.failed()
			return moved, false, false
		}
	}
	pipes.put(q, true)
	return moved, false, true
}

// empty writes what is in the pipe. EAGAIN says that some of it is left.
func (h *half) empty(to int32) syscall.Errno {
	for h.inPipe > 0 {
		n, errno := rawSplice(h.pipe.r, to, h.inPipe)
		if errno != 0 {
			return errno
		}
		h.inPipe -= n
		h.p.moved(h.src, n)
	}
	return 0
}
