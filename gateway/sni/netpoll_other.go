//go:build !linux

package sni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// wire is a socket of a connection.
type wire struct {
	conn *net.TCPConn // nil until there is one
	polled
}

func newWire(c *net.TCPConn) (wire, error) {
	w := wire{conn: c}
	return w, w.polled.init(c)
}

func (w *wire) close() {
	if w.conn != nil {
		w.conn.Close()
	}
	*w = wire{}
}

func (w *wire) setDeadline(t time.Time) {
	if w.conn != nil {
		w.conn.SetDeadline(t)
	}
}

func (w *wire) setReadDeadline(t time.Time)  { w.conn.SetReadDeadline(t) }
func (w *wire) setWriteDeadline(t time.Time) { w.conn.SetWriteDeadline(t) }

func (w *wire) shutdown()             { w.conn.CloseWrite() }
func (w *wire) reset()                { w.conn.SetLinger(0) }
func (w *wire) noDelay()              {} // package net has done it
func (w *wire) local() netip.AddrPort { return addrPort(w.conn.LocalAddr()) }
func (w *wire) keepalive(k gateway.Keepalive) {
	w.conn.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: k.Idle, Interval: k.Interval, Count: k.Probes})
}

type netpollListener struct {
	*net.TCPListener
	last atomic.Bool // the deadline is the end
	quit chan struct{}
	done chan struct{} // closed when its accept loop has ended
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
	lc := net.ListenConfig{KeepAlive: -1} // it comes later, see tend
	lc.SetMultipathTCP(false)             // it cannot be held off, see hold
	ln, err := lc.Listen(e.ctx, network, addr.String())
	if err != nil {
		return "", err
	}
	nl := &netpollListener{TCPListener: ln.(*net.TCPListener), quit: make(chan struct{}), done: make(chan struct{})}
	e.socks[l] = nl
	go e.accept(l, nl)
	return ln.Addr().String(), nil
}

// lastAccept is how long a socket that is to be closed accepts what waits there:
// closing would reset it.
const lastAccept = 10 * time.Millisecond

// close returns when nothing more is accepted.
func (nl *netpollListener) close() {
	nl.last.Store(true)
	close(nl.quit)
	nl.SetDeadline(time.Now().Add(lastAccept))
	<-nl.done
	nl.TCPListener.Close()
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

func (e *netpoll) accept(l *listener, nl *netpollListener) {
	defer close(nl.done)
	const pauseMin, pauseMax = 5 * time.Millisecond, time.Second
	pause := pauseMin
	for {
		c, err := nl.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || nl.last.Load() {
				return
			}
			// Such as no more file descriptors: wait until some are closed.
			e.f.fail(err)
			t := time.NewTimer(pause)
			select {
			case <-t.C:
			case <-nl.quit:
				t.Stop()
			}
			pause = min(2*pause, pauseMax)
			continue
		}
		pause = pauseMin
		tc := c.(*net.TCPConn)
		w, err := newWire(tc)
		if err != nil {
			e.f.fail(err)
			tc.Close()
			continue
		}
		p := &netpollConn{l: l, born: e.f.now(), peer: addrPort(c.RemoteAddr())}
		p.side[client] = w
		e.wg.Add(1)
		s := e.newSetup()
		if !e.begin(s, p) {
			e.end(p)
			e.drop(s)
			continue
		}
		// Here and not in its goroutine: they are not run in the order in which their
		// connections came, and the one that has waited longest is to be shed.
		e.wait(s)
		go e.serve(s)
	}
}

// reach connects to an endpoint and sends it the hello. It returns false when the
// connection is refused.
func (e *netpoll) reach(s *setup) bool {
	f, p, d := e.f, s.p, &s.dial
	for d.next(f.now()) {
		w, err := e.race(s, connectFor(d), connectFor(d), false)
		if err != nil {
			switch {
			case p.aborted.Load():
				d.abandon()
				e.cut(s)
				return false
			case ownFault(err):
				d.abandon()
				f.fail(fmt.Errorf("connect to %s: socket: %w", d.addr, err))
				e.tell(s, &s.hello, gateway.RefuseLimit, "socket: "+err.Error())
				return false
			}
			d.failed(f.now(), err)
			continue
		}
		e.set(p, w)
		s.greet()
		w.setWriteDeadline(time.Now().Add(d.timeout(f.now())))
		err = os.ErrDeadlineExceeded
		if e.see(p, nil) {
			_, err = w.conn.Write(append(s.head[:len(s.head):len(s.head)], s.data...))
		}
		switch {
		case p.aborted.Load():
			d.abandon()
			e.cut(s)
			return false
		case err == nil:
			w.setWriteDeadline(time.Time{})
			return true
		case errors.Is(err, os.ErrDeadlineExceeded):
			err = errNoAnswer // it is connected, and takes no more
		default:
			err = connectError(err)
		}
		e.unset(&p.side[target])
		d.unanswered(f.now(), err)
	}
	e.unreached(s)
	return false
}

// connectFor returns a connector for the choice's addresses.
func connectFor(d *dial) connector {
	dialer := net.Dialer{KeepAlive: -1}
	if cc := d.tier.congestion; cc != "" {
		dialer.Control = func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { setCongestion(int(fd), cc) }) // that it can be had was seen before
		}
	}
	return func(ctx context.Context, a attempt) (wire, error) {
		c, err := dialer.DialContext(ctx, "tcp", a.addr.String())
		if err != nil {
			return wire{}, connectError(err)
		}
		w, err := newWire(c.(*net.TCPConn))
		if err != nil {
			w.close()
			return wire{}, err
		}
		return w, nil
	}
}
