package sni

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/gateway"
)

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
func (l *loop) begin(s *sock, fd int32) {
	ln := s.l
	c := l.newConn()
	c.l, c.phase, c.born = ln, phaseHello, l.clock
	c.fd = [2]int32{fd, -1}
	peer := getSockaddr(&l.sa)
	if l.f.lines.sampled() {
		n := l.note(c)
		n.logged, n.peer = true, peer
	}
	t := ln.terms.Load()
	if limit := ln.admit(t, l.now); limit != "" {
		l.refuse(c, peer, nil, nil, gateway.RefuseLimit, limit)
		return
	}
	expect, reason, detail := t.expects(peer.Addr())
	if reason != "" {
		l.refuse(c, peer, nil, nil, reason, detail)
		return
	}
	if !expect && t.bySource() && !l.admitSource(c, t, peer, nil) {
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
	}
	data := l.buf[:n]
	if expect {
		var size int
		var ok bool
		if size, expect, ok = l.takeHeader(c, t, &peer, data); !ok {
			return
		}
		data = data[size:]
	}
	if !expect && len(data) > 0 {
		done, reason := scan.feed(data, limit)
		if reason != "" {
			l.refuse(c, peer, nil, data, reason, "")
			return
		}
		if done {
			l.route(c, peer, data, &scan)
			return
		}
	}
	b := l.newBegun()
	b.peer, b.scan, b.expect = peer, scan, expect
	b.due = l.now + int64(l.f.cfg.HelloTimeout)
	if len(data) > 0 {
		b.buf = append(l.block(len(data)), data...)
	}
	c.begun = b
	b.id = c.id
	s.wait.add(b)
	l.watch(c, client, 0)
	if s.wait.n > t.hellos {
		// Who has waited longest is the least likely to be a client.
		b, c := s.wait.oldest, l.conn(s.wait.oldest.id)
		l.refuse(c, b.peer, nil, b.buf, gateway.RefuseLimit, "pending hellos of the listener")
	}
}

// takeHeader takes the header of the PROXY protocol at the start of data, of which
// it is size bytes, and sets peer to the source that it names. more says that it
// has not all come; ok is false when the connection is refused.
func (l *loop) takeHeader(c *conn, t *terms, peer *netip.AddrPort, data []byte) (size int, more, ok bool) {
	h, more, reason, detail := t.header(data)
	switch {
	case reason != "":
		l.refuse(c, *peer, nil, nil, reason, detail)
		return 0, false, false
	case more:
		return 0, true, true
	case h.src.IsValid():
		n := l.note(c)
		n.src, n.dst = h.src, h.dst
		*peer = h.src
	}
	return h.size, false, !t.bySource() || l.admitSource(c, t, *peer, nil)
}

// admitSource accounts the connection to its source. It returns false when the
// source has reached a limit, and the connection is refused.
func (l *loop) admitSource(c *conn, t *terms, peer netip.AddrPort, data []byte) bool {
	s, limit := c.l.admitSource(t, peer.Addr(), l.now)
	if limit != "" {
		l.refuse(c, peer, nil, data, gateway.RefuseLimit, limit)
		return false
	}
	c.source = s
	return true
}

// moreHello goes on with a hello that did not come in one piece.
func (l *loop) moreHello(c *conn) {
	b := c.begun
	for {
		limit := l.f.cfg.HelloBytes
		if b.expect {
			limit = max(limit, maxProxyHeader)
		}
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
		if b.expect {
			size, more, ok := l.takeHeader(c, c.l.terms.Load(), &b.peer, b.buf)
			if !ok {
				return
			}
			b.expect = more
			b.buf = b.buf[:copy(b.buf, b.buf[size:])]
		}
		if b.expect || len(b.buf) == 0 {
			if n < len(room) && c.flags[client]&flagHup == 0 {
				return
			}
			continue
		}
		done, reason := b.scan.feed(b.buf, limit)
		if reason != "" {
			l.refuse(c, b.peer, nil, b.buf, reason, "")
			return
		}
		if done {
			b.remove()
			if n == len(room) {
				c.flags[client] |= flagMore
			}
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
		fd, e := d.socket()
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
			if n, e = l.sendHello(c, fd, peer, data, d); e == 0 {
				c.fd[target] = fd
				l.open(c, peer, data, scan, n, d)
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
	if d.reset {
		rawAbort(c.fd[client])
	}
	l.refuse(c, peer, &l.hello, data, reason, detail)
}

// keep keeps what a connection needs until its endpoint has answered.
func (l *loop) keep(c *conn, peer netip.AddrPort, data []byte, scan *helloScan, d *dial) *begun {
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
	return b
}

// await waits until the endpoint has taken or refused the connection.
func (l *loop) await(c *conn, peer netip.AddrPort, data []byte, scan *helloScan, d *dial) {
	l.keep(c, peer, data, scan, d)
	c.phase = phaseConnecting
	l.unschedule(c)
	l.schedule(c, l.now+int64(d.timeout(l.now)))
	l.watch(c, target, unix.EPOLLOUT)
	if c.flags[client]&flagAdded == 0 {
		l.watch(c, client, 0)
	}
}

// late goes on with a connection whose endpoint has not taken it for some time.
func (l *loop) late(c *conn) {
	if l.beside(c) {
		return
	}
	if left := c.begun.dial.left(l.now); left > 0 {
		l.schedule(c, l.now+int64(left))
		return
	}
	l.nextEndpoint(c, errConnectTimeout)
}

// beside tries another address of the endpoint, while those under way go on. It
// returns false when there is none.
func (l *loop) beside(c *conn) bool {
	b := c.begun
	d := &b.dial
	before := rival{c.fd[target], d.attempt}
	for d.beside(l.now) {
		fd, e := d.socket()
		if e != 0 {
			l.f.fail(fmt.Errorf("connect to %s: socket: %w", d.addr, e))
			break
		}
		if e = rawConnect(fd, d.addr); e == 0 {
			b.rivals = append(b.rivals, before)
			c.fd[target], c.flags[target] = fd, 0
			l.await(c, b.peer, b.buf, &b.scan, d)
			return true
		}
		rawClose(fd)
		d.lost(d.attempt, l.now, e)
	}
	d.attempt = before.attempt
	return false
}

// race looks which of several attempts to connect have come about, or failed.
func (l *loop) race(c *conn) {
	b := c.begun
	d := &b.dial
	all := append(b.rivals, rival{c.fd[target], d.attempt})
	left := all[:0]
	for i, r := range all {
		n, e := l.sendHello(c, r.fd, b.peer, b.buf, d)
		switch {
		case e == unix.EAGAIN:
			left = append(left, r)
		case e == 0:
			var others []attempt
			for _, o := range append(left, all[i+1:]...) {
				rawClose(o.fd)
				others = append(others, o.attempt)
			}
			b.rivals = nil
			d.won(r.attempt, others, l.now)
			c.fd[target] = r.fd
			if l.renew(c); c.phase&doomed == 0 {
				l.open(c, b.peer, b.buf, &b.scan, n, d)
			}
			return
		case len(left) == 0 && i == len(all)-1:
			b.rivals = nil
			c.fd[target], d.attempt = r.fd, r.attempt
			l.nextEndpoint(c, e)
			return
		default:
			rawClose(r.fd)
			d.lost(r.attempt, l.now, e)
		}
	}
	last := len(left) - 1
	b.rivals, c.fd[target], d.attempt = left[:last], left[last].fd, left[last].attempt
	if len(left) < len(all) {
		l.beside(c) // what has failed is not to be waited for
	}
}

// renew gives a connection another generation: what is still to come of its events in
// this turn is of sockets that were closed. The kernel tells anew of those it has.
func (l *loop) renew(c *conn) {
	c.gen++
	c.flags[target] = flagAdded | flagOut
	c.flags[client] &^= flagHup
	l.control(c, client, unix.EPOLL_CTL_MOD)
	l.control(c, target, unix.EPOLL_CTL_MOD)
}

// answered is called when something has happened to a connection under way.
func (l *loop) answered(c *conn, events uint32) {
	b, gen := c.begun, c.gen
	if len(b.rivals) > 0 {
		l.race(c)
		return
	}
	n, e := l.sendHello(c, c.fd[target], b.peer, b.buf, &b.dial)
	switch e {
	case 0:
		l.open(c, b.peer, b.buf, &b.scan, n, &b.dial)
		if events&^uint32(unix.EPOLLOUT) != 0 && c.gen == gen && (c.phase == phaseOpen || c.phase == phaseAnswer) {
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
	for _, r := range b.rivals {
		rawClose(r.fd)
		b.dial.lost(r.attempt, l.now, cause)
	}
	b.rivals = nil
	if c.phase == phaseAnswer {
		b.dial.unanswered(l.now, cause)
	} else {
		b.dial.failed(l.now, cause)
	}
	l.connect(c, b.peer, b.buf, &b.scan, &b.dial)
}

// unanswered goes on with a connection whose endpoint ended it before its first
// byte. The client has had nothing of it, so that the hello can be sent to another.
func (l *loop) unanswered(c *conn, cause error) {
	c.begun.dial.reset = errors.Is(cause, errResetUnanswered)
	l.nextEndpoint(c, cause)
}

// silent goes on with a connection whose endpoint says nothing.
func (l *loop) silent(c *conn) {
	d := &c.begun.dial
	if !d.mayReplay(l.now) {
		if d.others(l.now) { // only there are too many of its kind at the moment
			l.schedule(c, l.now+int64(replayAgain))
			return
		}
		d.suspect(l.now, errNoAnswer)
		l.settle(c, false) // nobody else is to be asked: it may still come
		return
	}
	rawAbort(c.fd[target])
	d.reset = false
	l.nextEndpoint(c, errNoAnswer)
}

// spoke goes on with a connection whose client sends more, or ends, before the
// endpoint has answered: the hello is no longer all there is to send.
func (l *loop) spoke(c *conn, events uint32) bool {
	b := c.begun
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 && b.dial.waitedLong(l.now-b.sentAt) {
		b.dial.suspect(l.now, errGaveUp)
	}
	l.settle(c, false)
	return l.pump(c, client)
}

// parse reads a complete hello into l.hello: once to route it, and again to tell
// of it when other hellos may have been read since.
func (l *loop) parse(data []byte, scan *helloScan) (reason string) {
	if scan.recs > 1 && l.spare == nil {
		l.spare = make([]byte, maxHelloBytes)
	}
	return l.hello.parse(scan.message(data, l.spare))
}

// sendHello sends the hello, behind the PROXY header that the endpoint wants, which
// is left in l.head.
func (l *loop) sendHello(c *conn, fd int32, peer netip.AddrPort, data []byte, d *dial) (int, syscall.Errno) {
	l.head = l.header[:0]
	if d.tier.send == "" {
		return rawSend(fd, data)
	}
	var dst netip.AddrPort
	if c.note != nil {
		dst = c.note.dst
	}
	if !dst.IsValid() {
		dst = rawLocal(c.fd[client])
	}
	l.head = appendProxyHeader(l.head, d.tier.send, peer, dst)
	return rawSend2(fd, l.head, data)
}

// open begins to wait for the answer. sent of l.head and of data, the hello, are
// with the endpoint.
func (l *loop) open(c *conn, peer netip.AddrPort, data []byte, scan *helloScan, sent int, d *dial) {
	d.connected(l.now)
	b := l.keep(c, peer, data, scan, d)
	b.sentAt, b.passed = l.now, max(0, sent-len(l.head))
	c.phase = phaseAnswer
	var out uint32
	if sent < len(l.head)+len(data) {
		h := l.newHeld()
		if sent >= len(l.head) {
			h.buf = append(l.block(len(data)), data[sent-len(l.head):]...)
			h.data = h.buf
		} else {
			h.data = slices.Concat(l.head[sent:], data)
		}
		c.held[client] = h
		out = unix.EPOLLOUT
		l.settle(c, false)
	} else if scan.more(data) {
		l.settle(c, false) // early data, which is not to be sent twice
	} else if limit := b.dial.answerTimeout(); limit > 0 {
		l.unschedule(c)
		l.schedule(c, l.now+int64(limit))
	} else {
		l.unschedule(c)
	}
	l.watch(c, target, out)
	switch {
	case c.flags[client]&flagAdded == 0:
		l.watch(c, client, 0)
	case c.phase&doomed != 0:
	case c.phase == phaseOpen:
		// Edges that came before are gone.
		l.pump(c, client)
	case c.flags[client]&(flagMore|flagHup) != 0:
		l.spoke(c, 0)
	}
}

// settle ends the time in which another endpoint could be asked.
func (l *loop) settle(c *conn, answered bool) {
	b := c.begun
	d := &b.dial
	if answered {
		c.owner, c.ep = d.answered(l.now)
	} else {
		c.owner, c.ep = d.done()
	}
	c.via = d.cluster.number
	c.ep.counter(l.worker, len(l.e.loops)).made(d.took)
	l.moved(c, client, b.passed)
	c.phase = phaseOpen
	c.active = l.clock
	peer, data := b.peer, b.buf
	if logged := c.note != nil && c.note.logged; logged || l.f.log.IsTrace() {
		var scan helloScan
		if scan.feed(data, maxHelloBytes+1); scan.need > 0 && scan.msg == scan.need {
			l.parse(data, &scan)
		}
		if logged {
			c.note.name = string(l.hello.name())
		}
		l.f.log.Trace("connected", "listener", c.l.name(), "peer_addr", peer, "server_name", string(l.hello.name()),
			"cluster", c.owner.name, "endpoint", c.ep.key)
	}
	// Keepalive is for connections that last: set then, it costs the short ones
	// nothing.
	wait := min(l.f.cfg.Keepalive.Idle/2, l.f.cfg.keepalive(d.tier.keepalive).Idle/2, 10*time.Second)
	if idle := c.l.terms.Load().idle; idle > 0 {
		wait = min(wait, idle)
	}
	l.dropBegun(c)
	l.unschedule(c)
	l.schedule(c, l.now+int64(wait))
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
	l.control(c, side, op)
}

// control tells the epoll set of a side, as its flags say.
func (l *loop) control(c *conn, side, op int) {
	ev := unix.EpollEvent{
		Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET&0xffffffff,
		Fd:     int32(c.id<<1 | uint32(side)), Pad: c.gen,
	}
	if c.flags[side]&flagOut != 0 {
		ev.Events |= unix.EPOLLOUT
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
		} else if c.flags[client] |= flagMore; events&unix.EPOLLERR != 0 {
			b := c.begun
			b.dial.abandon()
			l.parse(b.buf, &b.scan)
			l.refuse(c, b.peer, &l.hello, b.buf, gateway.RefuseClientGone, "while connecting to "+b.dial.addr.String())
		}
	case phaseAnswer:
		if side == client {
			l.spoke(c, events)
		} else if events&^uint32(unix.EPOLLOUT) != 0 {
			l.pump(c, target)
		}
	case phaseOpen:
		if events&unix.EPOLLERR != 0 && c.held[side] != nil {
			// Reset, while what it sent before cannot be passed on.
			l.end(c, true, closeReset)
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

// end closes a connection; with reset, so that both sides see that it was cut.
func (l *loop) end(c *conn, reset bool, why closeReason) {
	if c.owner != nil {
		closed(c.owner, c.ep)
		c.l.closed[why].Add(1)
		if c.note != nil && c.note.logged {
			l.f.lines.add(l.connection(c), closeNames[why])
		}
	}
	if c.begun != nil {
		l.dropBegun(c)
	}
	if c.source != nil {
		c.source.release()
	}
	if c.note != nil {
		l.dropNote(c)
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
	if c.note != nil && c.note.logged {
		if h != nil {
			c.note.name = string(h.name())
		}
		l.f.lines.add(l.connection(c), reason)
	}
	l.end(c, false, closeDone)
}

// closeConns closes the connections of a listener; nil is all of them.
func (l *loop) closeConns(ln *listener, why closeReason) {
	for c := range l.conns {
		if ln == nil || c.l == ln {
			l.cut(c, why)
		}
	}
}

// conns calls yield with every connection there is, which yield may end.
func (l *loop) conns(yield func(*conn) bool) { l.connsOf(l.chunks)(yield) }

// connsOf is conns of some of the chunks.
func (l *loop) connsOf(chunks [][]conn) func(yield func(*conn) bool) {
	return func(yield func(*conn) bool) {
		for _, chunk := range chunks {
			for i := range chunk {
				if c := &chunk[i]; c.phase != phaseFree && !yield(c) {
					return
				}
			}
		}
	}
}

// cut ends a connection in whatever phase it is, for a reason of ours.
func (l *loop) cut(c *conn, why closeReason) {
	if p := c.phase &^ doomed; p == phaseConnecting || p == phaseAnswer {
		c.begun.dial.abandon()
	}
	if b := c.begun; b != nil {
		l.refuse(c, b.peer, nil, b.buf, gateway.RefuseClientGone, "cut: "+closeNames[why])
		return
	}
	l.end(c, false, why)
}

// since is when a connection was accepted, on the forwarder's clock.
func (c *conn) since() int64 { return int64(c.born) << tickShift }

// chunksAtOnce is how much of a loop's connections are looked through in one go, so
// that bytes do not wait while it is very many.
const chunksAtOnce = 32

func (e *epoll) oldest(limit int, want func(h handle) bool) []handle {
	var all []handle
	for i, lp := range e.loops {
		var hs []handle
		for from, left := 0, 1; left > 0; from += chunksAtOnce {
			lp.do(func() {
				to := min(from+chunksAtOnce, len(lp.chunks))
				left = len(lp.chunks) - to
				for c := range lp.connsOf(lp.chunks[min(from, to):to]) {
					h := handle{born: c.since(), worker: int32(i), id: c.id, gen: c.gen}
					if c.phase == phaseOpen {
						h.via, h.ep = c.via, c.ep
					}
					if want != nil && !want(h) {
						continue
					}
					hs = append(hs, h)
					// So that the list of a few of very many stays short.
					if limit < 1<<16 && len(hs) >= 4*limit+1024 {
						hs = firstOf(hs, limit)
					}
				}
			})
		}
		all = append(all, hs...)
	}
	return firstOf(all, limit)
}

// each runs fn on the loop of each connection that there still is.
func (e *epoll) each(hs []handle, fn func(i int, l *loop, c *conn)) {
	for w, lp := range e.loops {
		if !slices.ContainsFunc(hs, func(h handle) bool { return h.worker == int32(w) }) {
			continue
		}
		lp.do(func() {
			for i, h := range hs {
				if h.worker != int32(w) {
					continue
				}
				if c := lp.conn(h.id); c.gen == h.gen && c.phase != phaseFree {
					fn(i, lp, c)
				}
			}
		})
	}
}

func (e *epoll) describe(hs []handle) []gateway.Connection {
	out := make([]gateway.Connection, len(hs))
	e.each(hs, func(i int, l *loop, c *conn) {
		out[i] = l.connection(c)
	})
	return slices.DeleteFunc(out, func(x gateway.Connection) bool { return x.Listener == "" && x.Since.IsZero() })
}

func (e *epoll) closeThese(hs []handle, why closeReason) (n int) {
	e.each(hs, func(_ int, l *loop, c *conn) {
		l.cut(c, why)
		n++
	})
	return n
}

// connection tells of a connection.
func (l *loop) connection(c *conn) gateway.Connection {
	x := gateway.Connection{
		Listener: c.l.name(), Client: l.peer(c).String(), Since: l.f.at(c.since()),
		BytesIn: c.bytes[client], BytesOut: c.bytes[target],
	}
	switch {
	case c.owner != nil:
		x.Cluster, x.Endpoint = c.owner.name, c.ep.key
	case c.phase == phaseAnswer:
		x.Cluster, x.Endpoint = c.begun.dial.tier.owner.name, c.begun.dial.ep.key
	}
	if c.note != nil {
		x.ServerName = c.note.name
	}
	return x
}

// peer is the client's address; the kernel is asked for it where it is not kept.
func (l *loop) peer(c *conn) netip.AddrPort {
	switch {
	case c.begun != nil:
		return c.begun.peer
	case c.note != nil && c.note.src.IsValid():
		return c.note.src
	case c.note != nil && c.note.logged:
		return c.note.peer
	}
	return rawPeer(c.fd[client])
}
