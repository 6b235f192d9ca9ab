package sni

import (
	"context"
	"math"
	"slices"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// handle names a connection of an engine, and says where it is.
type handle struct {
	born   int64 // on the forwarder's clock
	worker int32 // epoll: the loop, and what the loop knows the connection by
	gen    int32
	id     uint32
	via    uint32    // the number of the cluster it was routed to; with ep
	ep     *endpoint // nil while it has none
	conn   *netpollConn
}

// firstOf returns the first handles by age. It changes the order of hs.
func firstOf(hs []handle, limit int) []handle {
	slices.SortFunc(hs, func(a, b handle) int {
		if a.born < b.born {
			return -1
		} else if a.born > b.born {
			return 1
		}
		return 0
	})
	return hs[:min(limit, len(hs))]
}

// at is a time on the forwarder's clock as others know it.
func (f *Forwarder) at(now int64) time.Time { return f.epoch.Add(time.Duration(now)) }

// do runs fn on the control goroutine and waits for it. It returns false when
// the forwarder does not run.
func (f *Forwarder) do(fn func(c *control)) bool {
	if !f.started.Load() {
		return false
	}
	done := make(chan struct{})
	select {
	case f.calls <- func(c *control) { fn(c); close(done) }:
		<-done
		return true
	case <-f.ended:
		return false
	}
}

// Connections implements [gateway.ConnectionLister]. The server name is left out:
// to keep it costs memory for each connection, and the cluster says nearly as much.
func (f *Forwarder) Connections(limit int) []gateway.Connection {
	var out []gateway.Connection
	f.do(func(c *control) { out = c.eng.describe(c.eng.oldest(max(limit, 0), nil)) })
	return out
}

// Drain implements [gateway.Drainer].
func (f *Forwarder) Drain(ctx context.Context, p gateway.Plan, progress func(gateway.Progress)) error {
	if !f.started.Load() {
		return gateway.ErrStopped
	}
	return gateway.RunDrain(ctx, p, &drain{f: f}, progress)
}

// handshakeGrace is how long connections whose handshake had begun may take to
// end it once nothing new is taken: round trips between distant datacenters.
const handshakeGrace = 250 * time.Millisecond

// drain takes the forwarder out of use. It implements [gateway.Draining].
type drain struct {
	f *Forwarder
	// left are the connections there were when nothing more was accepted, the
	// oldest first, as far as they were not ended by the drain.
	left []handle
}

func (d *drain) StopAccepting(ctx context.Context) error {
	held := false
	ok := d.f.do(func(c *control) {
		c.stopped = true
		for _, l := range c.listeners {
			if st := l.state.Load(); st == nil || !st.bound {
				continue
			}
			l.held = true
			if err := c.eng.hold(l); err != nil {
				d.f.log.Debug("cannot hold new connections off; some may be reset", "listener", l.name(), "error", err)
				continue
			}
			held = true
		}
	})
	if held {
		t := time.NewTimer(handshakeGrace)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-d.f.ended:
		}
	}
	if !ok || !d.f.do((*control).unbind) {
		return gateway.ErrStopped
	}
	return nil
}

// unbind closes the sockets that are held.
func (c *control) unbind() {
	for _, l := range c.listeners {
		if !l.held {
			continue
		}
		l.held = false
		c.eng.unlisten(l)
		l.state.Store(&bindState{address: l.address, err: "draining"})
		c.f.log.Info("listener closed to drain", "listener", l.name(), "connections", l.active.Load())
	}
	c.f.notify()
}

func (d *drain) Resume() {
	d.left = nil
	d.f.do(func(c *control) {
		c.unbind() // a held socket cannot be made to take connections again
		c.stopped = false
		for _, l := range c.listeners {
			l.retryAt = time.Time{}
		}
		c.due()
	})
}

func (d *drain) Open() (n int) {
	d.f.do(func(c *control) {
		for _, l := range c.listeners {
			n += int(l.active.Load())
		}
		for _, dr := range c.draining {
			n += int(dr.l.active.Load())
		}
	})
	return n
}

func (d *drain) CloseOldest(n int) (closed int) {
	d.f.do(func(c *control) {
		// Nothing more is accepted, so that one look is enough for the whole drain.
		if len(d.left) == 0 {
			d.left = c.eng.oldest(math.MaxInt, nil)
		}
		for closed < n && len(d.left) > 0 {
			k := min(n-closed, len(d.left))
			closed += c.eng.closeThese(d.left[:k], closeDrain)
			d.left = d.left[k:]
		}
	})
	return closed
}

func (d *drain) Ended() <-chan struct{} { return d.f.ended }
