package sni

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// pump moves what src has sent until there is no more, the other side takes no
// more, or others are due. It returns false when the connection has ended.
func (l *loop) pump(c *conn, src int) bool {
	dst := 1 - src
	fd, to := c.fd[src], c.fd[dst]
	left := burst
	if h := c.held[src]; h != nil {
		switch n, e := l.flush(c, h, to); {
		case e == unix.EAGAIN:
			l.moved(c, src, n)
			l.watch(c, dst, unix.EPOLLOUT)
			return true
		case e != 0:
			l.end(c, true, closeReset)
			return false
		default:
			l.moved(c, src, n)
			c.held[src] = nil
			l.dropHeld(h)
		}
		c.active = l.clock
	}
	if c.flags[src]&flagEOF != 0 {
		return true
	}
	for left > 0 {
		if c.flags[src]&flagBulk != 0 {
			n, drained, ok := l.splice(c, src, left)
			if !ok {
				return false
			}
			if n > 0 {
				c.active = l.clock
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
		case c.phase == phaseAnswer: // and src is the target
			switch {
			case e != 0:
				l.unanswered(c, errResetUnanswered)
				return false
			case n == 0:
				l.unanswered(c, errClosedUnanswered)
				return false
			}
			l.settle(c, true)
		case e != 0:
			l.end(c, true, closeReset)
			return false
		case n == 0:
			return l.eof(c, src)
		}
		c.active = l.clock
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
			l.end(c, true, closeReset)
			return false
		}
		l.moved(c, src, k)
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

// splice moves bytes through a pipe, in the kernel, and accounts them. drained says that the
// source has no more for now; ok is false when the connection has ended.
func (l *loop) splice(c *conn, src, most int) (moved int, drained, ok bool) {
	p, got := l.pipe()
	if !got {
		c.flags[src] &^= flagBulk
		c.full[src] = 0
		return 0, false, true
	}
	fd, to := c.fd[src], c.fd[1-src]
	fill := pipeFill(l.pipesIn)
	for moved < most {
		n, e := rawSplice(fd, p.w, fill)
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
			l.end(c, true, closeReset)
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
				l.end(c, true, closeReset)
				return moved, false, false
			}
			n -= k
			moved += k
			l.spliced += k
			l.moved(c, src, k)
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
		l.end(c, false, closeDone)
		return false
	}
	rawShutdown(c.fd[1-src])
	if d := c.l.terms.Load().halfIdle; d > 0 {
		l.schedule(c, l.now+int64(d))
	}
	return true
}

// moved accounts bytes that came from src and were passed on.
func (l *loop) moved(c *conn, src, n int) {
	c.bytes[src] += uint64(n)
	if count := c.ep.counter(l.worker, len(l.e.loops)); src == client {
		add(&count.in, n)
	} else {
		add(&count.out, n)
	}
}

// add counts bytes; this loop is the only writer of its counters.
func add(n interface {
	Load() uint64
	Store(uint64)
}, k int) {
	n.Store(n.Load() + uint64(k))
}

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
