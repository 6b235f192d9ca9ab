//go:build unix

package sni

import (
	"errors"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// readHello waits for the rest of the hello.
func (e *netpoll) readHello(s *setup) (reason, detail string) {
	p := s.p
	var done bool
	err := p.side[client].raw.Read(func(uintptr) bool {
		for {
			n, errno := recv(p.side[client].fd, e.room(s))
			switch {
			case errno == syscall.EAGAIN:
				if len(s.data) == 0 {
					e.fit(s)
				}
				return false
			case errno != 0 || n == 0:
				reason = gateway.RefuseClientGone
				return true
			}
			if done, reason, detail = e.take(s, n); done || reason != "" {
				return true
			}
		}
	})
	switch {
	case err == nil:
		return reason, detail
	case errors.Is(err, os.ErrDeadlineExceeded):
		return gateway.RefuseHelloTimeout, e.f.cfg.HelloTimeout.String()
	}
	return gateway.RefuseClientGone, ""
}

// pump moves one direction. Its goroutine waits in the call of Read: a buffer is
// taken when there is something to read, and given back before waiting for more.
func (h *half) pump() {
	p := h.p
	w := &p.side[h.src]
	ready := h.ready
	for again := false; p.arm(h.src, again); again = true {
		err := w.raw.Read(ready)
		if err == nil {
			return
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			if p.settled.Load() || h.first(errResetUnanswered) {
				p.failed()
			}
			return
		}
		if !h.tend() {
			return
		}
	}
}

// ready moves what src has sent until there is no more. It returns true when that
// was the end.
func (h *half) ready(uintptr) bool {
	p := h.p
	pools := &p.e.blocks
	fd := p.side[h.src].fd
	var b *block
	for left := burst; ; {
		if left <= 0 {
			runtime.Gosched()
			left = burst
		}
		if h.bulk {
			if b != nil {
				pools.put(b)
				b = nil
			}
			n, drained, ok := h.splice(left)
			if n > 0 {
				p.lastActive.Store(p.e.f.now())
			}
			switch {
			case !ok:
				return true
			case drained:
				return false
			}
			left -= n
			continue
		}
		if b == nil {
			b = pools.get(readBuffer)
		}
		n, errno := recv(fd, b.buf)
		if errno == syscall.EAGAIN {
			pools.put(b)
			return false
		}
		var gone error
		switch {
		case errno != 0:
			gone = errResetUnanswered
		case n == 0:
			gone = errClosedUnanswered
		}
		if !p.settled.Load() && !h.first(gone) {
			pools.put(b)
			return true
		}
		if gone != nil {
			pools.put(b)
			if errno != 0 {
				p.failed()
			} else {
				h.ended()
			}
			return true
		}
		p.lastActive.Store(p.e.f.now())
		if h.src == client && !h.past {
			// The hello went out without; only from the second write on can the
			// kernel hold anything back.
			h.past = true
			p.side[target].noDelay()
		}
		k, errno := send(p.side[1-h.src].fd, b.buf[:n])
		if errno == syscall.EAGAIN {
			k = 0
		} else if errno != 0 {
			pools.put(b)
			p.failed()
			return true
		}
		p.moved(h.src, k)
		if k < n {
			h.held, h.data = b, b.buf[k:n]
			if n-k <= readBuffer/2 {
				h.held = pools.get(n - k)
				h.data = h.held.buf[:copy(h.held.buf, h.data)]
				pools.put(b)
			}
			b = nil
			if !h.flush() {
				return true
			}
		}
		left -= n
		if n == readBuffer {
			if h.full++; h.full >= 2 && p.e.pipes.usable() {
				h.bulk = true
			}
		} else {
			h.full = 0
		}
	}
}

// flush writes what is held, and waits for that. It returns false when the
// connection ends.
func (h *half) flush() bool {
	p := h.p
	w := &p.side[1-h.src]
	var errno syscall.Errno
	for {
		if idle := p.l.terms.Load().idleLimit(p.ends.Load() > 0); idle > 0 {
			w.setWriteDeadline(time.Now().Add(idle))
			if p.aborted.Load() {
				w.setDeadline(past)
			}
		}
		err := w.raw.Write(func(uintptr) bool {
			errno = h.write(w.fd)
			return errno != syscall.EAGAIN
		})
		switch {
		case err != nil && errors.Is(err, os.ErrDeadlineExceeded):
			if !h.tend() {
				return false
			}
			continue
		case err != nil || errno != 0:
			p.failed()
			return false
		}
		w.setWriteDeadline(time.Time{})
		if p.aborted.Load() {
			w.setDeadline(past)
			return false
		}
		h.release()
		p.lastActive.Store(p.e.f.now())
		return true
	}
}

// write sends some of what is held. EAGAIN says that some of it is left.
func (h *half) write(to int32) syscall.Errno {
	for len(h.data) > 0 {
		n, errno := send(to, h.data)
		if errno != 0 {
			return errno
		}
		h.p.moved(h.src, n)
		h.data = h.data[n:]
	}
	return h.empty(to)
}
