package sidecar

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// Drain implements [gateway.Drainer].
func (s *Sidecar) Drain(ctx context.Context, p gateway.Plan, progress func(gateway.Progress)) error {
	return gateway.RunDrain(ctx, p, (*draining)(s), progress)
}

// draining is the sidecar as a drain sees it.
type draining Sidecar

const (
	// settle is how long a listener that is to be closed goes without a new
	// connection before it is: handshakes that have begun take a round trip to end.
	settle = 250 * time.Millisecond
	// settleMost bounds that where new ones cannot be kept away.
	settleMost = 2 * time.Second
)

var errHeld = errors.New("draining")

// hold makes accept end, once what is queued is accepted.
func (l *listener) hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = true
	l.holdLocked()
}

func (l *listener) holdLocked() {
	switch ln := l.l.(type) {
	case nil:
	case *net.TCPListener:
		_ = gateway.HoldOffConn(ln)                // without it those are reset who come in the last moment
		_ = ln.SetDeadline(time.Now().Add(settle)) // it fails on a closed one, whose accept ends by that
	case interface{ SetDeadline(time.Time) error }: // a unix socket
		_ = ln.SetDeadline(time.Now().Add(settle))
	}
}

func (l *listener) bound() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.l != nil
}

// StopAccepting implements [gateway.Draining].
func (d *draining) StopAccepting(ctx context.Context) error {
	if d.held.Load() == nil {
		held := make(chan struct{})
		d.held.Store(&held)
	}
	d.mu.Lock()
	for _, l := range d.listeners {
		l.hold()
	}
	d.mu.Unlock()
	for d.anyBound() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-d.parked:
		}
	}
	return nil
}

func (d *draining) anyBound() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.listeners {
		if l.bound() {
			return true
		}
	}
	return false
}

// park waits while listeners are to be closed. It returns false when they are not.
func (s *Sidecar) park(ctx context.Context, l *listener) bool {
	held := s.held.Load()
	if held == nil {
		return false
	}
	l.mu.Lock()
	l.l, l.err = nil, errHeld
	l.mu.Unlock()
	select {
	case s.parked <- struct{}{}:
	default: // who waits looks at all listeners each time
	}
	select {
	case <-ctx.Done():
	case <-*held:
	}
	return true
}

// Resume implements [gateway.Draining].
func (d *draining) Resume() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.listeners {
		l.mu.Lock()
		l.held = false
		l.mu.Unlock()
	}
	if held := d.held.Swap(nil); held != nil {
		close(*held)
	}
}

// Open implements [gateway.Draining].
func (d *draining) Open() int { return d.sessions.count() }

// CloseOldest implements [gateway.Draining].
func (d *draining) CloseOldest(n int) int {
	return d.sessions.cutOldest(n, gateway.CloseDrain, func(client, server net.Conn) {
		// The farewell of TLS may have to wait for the peer.
		d.wg.Go(func() { hangUp(client, server) })
	})
}

// Ended implements [gateway.Draining].
func (d *draining) Ended() <-chan struct{} { return d.done }

// hangUp ends both sides in order.
func hangUp(client, server net.Conn) {
	_ = client.Close() // it may have ended by itself
	if server != nil {
		_ = server.Close() // the same
	}
}
