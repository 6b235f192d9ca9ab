package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// listener is one address of the table, bound or waiting to be.
type listener struct {
	name, network, address, socketMode string
	cancel                             context.CancelFunc
	done                               chan struct{}

	active   atomic.Int64
	accepted atomic.Uint64
	refused  atomic.Uint64
	reasons  gateway.Tally // of refusals
	closed   gateway.Tally // of ends

	// mu guards what follows.
	mu   sync.Mutex
	l    net.Listener
	err  error
	held bool // it is to be closed
}

func (l *listener) close() {
	l.cancel()
	l.mu.Lock()
	if l.l != nil {
		_ = l.l.Close() // accepting stops; there is nothing to do about an error
	}
	l.mu.Unlock()
	<-l.done
}

// refuse counts a connection that was closed without reaching an endpoint.
func (l *listener) refuse(reason string) {
	l.refused.Add(1)
	l.reasons.Add(reason)
}

func (l *listener) status() gateway.ListenerStatus {
	st := gateway.ListenerStatus{
		Name: l.name, Address: l.address,
		Active: l.active.Load(), Accepted: l.accepted.Load(), RefusedTotal: l.refused.Load(), Refused: l.reasons.Map(), Closed: l.closed.Map(),
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.l != nil {
		st.Bound, st.Address = true, l.l.Addr().String()
	}
	if l.err != nil {
		st.Error = l.err.Error()
	}
	return st
}

// bind opens the listener. A unix socket that a process left behind is replaced;
// anything else at its path is not.
func (l *listener) bind(ctx context.Context) (net.Listener, error) {
	if l.network == "unix" {
		if fi, err := os.Lstat(l.address); err == nil {
			if fi.Mode().Type() != fs.ModeSocket {
				return nil, fmt.Errorf("listen on %s: there is something that is no socket", l.address)
			}
			if err := os.Remove(l.address); err != nil {
				return nil, err
			}
		}
	}
	lc := net.ListenConfig{KeepAlive: -1}
	lc.SetMultipathTCP(false) // it could not be drained
	ln, err := lc.Listen(ctx, l.network, l.address)
	if err != nil {
		return nil, err
	}
	if l.network == "unix" && l.socketMode != "" {
		mode, err := strconv.ParseUint(l.socketMode, 8, 32)
		if err == nil {
			err = os.Chmod(l.address, fs.FileMode(mode))
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("mode %q of socket %s: %w", l.socketMode, l.address, err), ln.Close())
		}
	}
	return ln, nil
}

// serve binds, tries again where that fails, and accepts until ctx ends.
func (s *Sidecar) serve(ctx context.Context, l *listener) {
	const retryMin, retryMax = 100 * time.Millisecond, 5 * time.Second
	wait := retryMin
	for ctx.Err() == nil {
		if s.park(ctx, l) {
			continue
		}
		ln, err := l.bind(ctx)
		l.mu.Lock()
		l.l, l.err = ln, err
		if l.held {
			l.holdLocked()
		}
		if ctx.Err() != nil && ln != nil {
			_ = ln.Close() // close came before there was anything to close
		}
		l.mu.Unlock()
		if err == nil {
			wait = retryMin
			s.cfg.Logger.Info("listening", "listener", l.name, "address", ln.Addr().String())
			err = s.accept(ctx, l, ln)
			l.mu.Lock()
			l.l, l.err = nil, err
			l.mu.Unlock()
		}
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errHeld) {
			s.cfg.Logger.Info("listener closed for a drain", "listener", l.name)
			continue
		}
		s.cfg.Logger.Warn("listener not open, trying again", "listener", l.name, "error", err, "in", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, retryMax)
	}
}

// accept hands each connection to a goroutine. It returns when the listener is
// closed or broken.
func (s *Sidecar) accept(ctx context.Context, l *listener, ln net.Listener) error {
	defer ln.Close()                    //nolint:errcheck // it may be closed already, and that is why we are here
	recent, until := false, time.Time{} // for a listener that is held
	for {
		conn, err := ln.Accept()
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				if until.IsZero() {
					until = time.Now().Add(settleMost)
				}
				if d, ok := ln.(interface{ SetDeadline(time.Time) error }); ok && recent && time.Now().Before(until) && ctx.Err() == nil {
					recent = false
					if d.SetDeadline(time.Now().Add(settle)) == nil {
						continue
					}
				}
				return errHeld
			}
			if isExhausted(err) {
				// Out of descriptors: those that close make room.
				select {
				case <-ctx.Done():
				case <-time.After(10 * time.Millisecond):
				}
				continue
			}
			return err
		}
		recent = true
		l.accepted.Add(1)
		r := s.current.Load()
		def := r.listeners[l.name]
		if def == nil { // the table has changed, and this listener is about to close
			_ = conn.Close()
			continue
		}
		ses := s.sessions.begin(l, conn, s.cfg.AccessLog.Sampled())
		if max := def.MaxConnections; max > 0 && l.active.Load() >= int64(max) {
			s.refuse(ses, gateway.RefuseLimit, fmt.Errorf("the listener has %d connections, its bound", max), "")
			_ = conn.Close()
			s.end(ses, "")
			continue
		}
		if !s.conns.add(conn) {
			s.end(ses, gateway.CloseStopped)
			return net.ErrClosed
		}
		l.active.Add(1)
		s.wg.Go(func() {
			reason := s.handle(ctx, ses, r, def, conn)
			_ = conn.Close() // whatever came of it, it ends here
			s.conns.remove(conn)
			l.active.Add(-1)
			s.end(ses, reason)
		})
	}
}
