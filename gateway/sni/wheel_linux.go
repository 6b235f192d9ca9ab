package sni

import (
	"math/bits"
	"slices"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

func tickOf(now int64) uint32 { return uint32(now >> tickShift) }

// schedule sets the connection's timer, unless it is due earlier as it is.
func (l *loop) schedule(c *conn, at int64) {
	if c.fired {
		return
	}
	deadline := tickOf(at) + 1
	if c.linked {
		if int32(deadline-c.deadline) >= 0 {
			return
		}
		l.unschedule(c)
	}
	c.deadline = deadline
	l.link(c)
}

func (l *loop) link(c *conn) {
	slot := c.deadline
	if d := int32(slot - l.tick); d < 1 {
		slot = l.tick + 1
	} else if d >= wheelSlots {
		slot = l.tick + wheelSlots - 1
	}
	slot %= wheelSlots
	c.linked, c.prev, c.next = true, 0, l.wheel[slot]
	if c.next != 0 {
		l.conn(c.next).prev = c.id
	}
	// The head knows its slot by a complement: no connection has such an index.
	c.prev = ^slot
	l.wheel[slot] = c.id
	l.filled[slot/64] |= 1 << (slot % 64)
}

func (l *loop) unschedule(c *conn) {
	c.fired = false
	if !c.linked {
		return
	}
	c.linked = false
	if c.next != 0 {
		l.conn(c.next).prev = c.prev
	}
	if slot := ^c.prev; slot < wheelSlots {
		l.wheel[slot] = c.next
		if c.next == 0 {
			l.filled[slot/64] &^= 1 << (slot % 64)
		}
	} else {
		l.conn(c.prev).next = c.next
	}
}

// nextTimer is how many milliseconds there are until a slot with timers, -1 if
// there is none.
func (l *loop) nextTimer() int64 {
	for i := uint32(1); i < wheelSlots; {
		slot := (l.tick + i) % wheelSlots
		word := l.filled[slot/64] >> (slot % 64)
		if word == 0 {
			i += 64 - slot%64
			continue
		}
		i += uint32(bits.TrailingZeros64(word))
		at := (l.now>>tickShift + int64(i)) << tickShift
		return max(0, (at-l.now)/1e6) + 1
	}
	return -1
}

func (l *loop) advance() {
	if l.paused != 0 && l.now >= l.paused {
		l.resume()
	}
	now := tickOf(l.now)
	if n := now - l.tick; n > wheelSlots {
		l.tick = now - wheelSlots
	}
	for l.tick != now {
		l.tick++
		slot := l.tick % wheelSlots
		id := l.wheel[slot]
		if id == 0 {
			continue
		}
		l.wheel[slot] = 0
		l.filled[slot/64] &^= 1 << (slot % 64)
		for id != 0 {
			c := l.conn(id)
			id = c.next
			c.linked = false
			if int32(c.deadline-l.tick) > 0 {
				l.link(c)
			} else {
				c.fired = true
				l.over = append(l.over, ref{id: c.id, gen: c.gen})
			}
		}
	}
}

// fireSome serves some of the timers that are over; the others have the next turns.
func (l *loop) fireSome() {
	for n := 0; n < maxFired && l.served < len(l.over); l.served++ {
		r := l.over[l.served]
		if c := l.conn(r.id); c.gen == r.gen && c.fired {
			c.fired = false
			l.fire(c)
			n++
		}
	}
	if l.served == len(l.over) {
		l.over, l.served = l.over[:0], 0
	}
}

// shed ends connections whose hello has not come in time. They are not in the wheel:
// those of a tick would go at one time, and be in the way of others.
func (l *loop) shed() {
	for i := 0; i < len(l.waits); i++ {
		q := l.waits[i]
		for n := 0; n < maxFired && q.oldest != nil && q.oldest.due <= l.now; n++ {
			b := q.oldest
			l.refuse(l.conn(b.id), b.peer, nil, b.buf, gateway.RefuseHelloTimeout, l.f.cfg.HelloTimeout.String())
		}
		if q.last && q.n == 0 {
			l.waits = slices.Delete(l.waits, i, i+1)
			i--
		}
	}
}

func (l *loop) fire(c *conn) {
	switch c.phase {
	case phaseConnecting:
		l.late(c)
	case phaseAnswer:
		l.silent(c)
	case phaseOpen:
		if c.flags[target]&flagKeep == 0 {
			c.flags[target] |= flagKeep
			setKeepalive(c.fd[client], l.f.cfg.Keepalive)
			setKeepalive(c.fd[target], l.f.cfg.keepalive(c.owner.keepalive()))
		}
		half := (c.flags[client]|c.flags[target])&flagEOF != 0
		idle := c.l.terms.Load().idleLimit(half)
		if idle == 0 {
			return
		}
		if quiet := time.Duration(l.clock-c.active) << tickShift; quiet >= idle {
			l.end(c, false, closeIdle)
		} else {
			l.schedule(c, l.now+int64(idle-quiet))
		}
	case phaseConnecting | doomed, phaseAnswer | doomed:
		c.begun.dial.abandon()
		l.end(c, true, closeReset)
	default:
		l.end(c, true, closeReset)
	}
}
