//go:build !unix

package sni

import (
	"errors"
	"io"
	"net"
	"os"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// Where sockets cannot be asked without waiting, who waits has a buffer in hand.

// polled has nothing here.
type polled struct{}

func (*polled) init(*net.TCPConn) error { return nil }

// readHello waits for the rest of the hello.
func (e *netpoll) readHello(s *setup) (reason, detail string) {
	for {
		n, err := s.p.side[client].conn.Read(e.room(s))
		if n > 0 {
			if done, reason, detail := e.take(s, n); done || reason != "" {
				return reason, detail
			}
		}
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return gateway.RefuseHelloTimeout, e.f.cfg.HelloTimeout.String()
		case err != nil:
			return gateway.RefuseClientGone, ""
		}
	}
}

// copyBuffer is smaller than what is read at a time elsewhere: all that wait have
// one.
const copyBuffer = 16 << 10

// pump moves one direction.
func (h *half) pump() {
	p := h.p
	b := p.e.blocks.get(copyBuffer)
	defer p.e.blocks.put(b)
	for again := false; p.arm(h.src, again); again = true {
		n, err := p.side[h.src].conn.Read(b.buf)
		if n > 0 {
			if !p.settled.Load() && !h.first(nil) {
				return
			}
			p.lastActive.Store(p.e.f.now())
			if !h.write(b.buf[:n]) {
				return
			}
		}

		switch {
		case err == nil:
			continue
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !h.tend() {
				return
			}
			continue
		}
		end := errors.Is(err, io.EOF)
		if !p.settled.Load() {
			gone := errResetUnanswered
			if end {
				gone = errClosedUnanswered
			}
			if !h.first(gone) {
				return
			}
		}
		if end {
			h.ended()
		} else {
			p.failed()
		}
		return
	}
}

// write passes bytes on. It returns false when the connection ends.
func (h *half) write(b []byte) bool {
	p := h.p
	w := &p.side[1-h.src]
	for len(b) > 0 {
		if idle := p.l.terms.Load().idleLimit(p.ends.Load() > 0); idle > 0 {
			w.setWriteDeadline(time.Now().Add(idle))
			if p.aborted.Load() {
				w.setDeadline(past)
			}
		}
		n, err := w.conn.Write(b)
		p.moved(h.src, n)
		b = b[n:]
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			if !h.tend() {
				return false
			}
		default:
			p.failed()
			return false
		}
		p.lastActive.Store(p.e.f.now())
	}
	return true
}
