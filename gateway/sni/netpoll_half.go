package sni

import (
	"errors"
	"time"
)

// half is one direction of a connection whose hello is with an endpoint.
type half struct {
	p    *netpollConn
	src  uint8
	full uint8 // reads in a row that filled the buffer
	bulk bool  // sends so much that it is spliced
	past bool  // has written, after the hello

	// unanswered is why another endpoint is to be asked.
	unanswered error

	// What was read and could not be written yet.
	held   *block
	data   []byte // the part of held still to be written
	pipe   pipe
	inPipe int
}

// settle ends the time in which another endpoint could be asked; answering must be
// held.
func (p *netpollConn) settle(answered bool) {
	s, f := p.setup, p.e.f
	now := f.now()
	if answered {
		s.dial.answered(now)
	} else {
		s.dial.done()
	}
	if f.log.IsTrace() {
		f.log.Trace("connected", "listener", p.l.name(), "peer_addr", p.peer, "server_name", string(s.hello.name()),
			"cluster", p.owner.name, "endpoint", p.ep.key)
	}
	p.count = p.ep.counter(0, 1)
	p.count.made(s.dial.took)
	p.moved(client, len(s.data))
	p.lastActive.Store(now)
	p.setup = nil
	p.settled.Store(true)
	p.e.drop(s)
	if p.l.terms.Load().idle > 0 {
		p.arm(client, true)
		p.arm(target, true)
	}
}

// first is called when a direction has something to pass on for the first time, or
// its end with gone set. It returns false when it is not to be passed on: the
// connection ends, or another endpoint is to be asked.
func (h *half) first(gone error) bool {
	p := h.p
	if h.src == target && gone != nil {
		h.unanswered = gone
		return false
	}
	p.answering.Lock()
	defer p.answering.Unlock()
	switch {
	case p.settled.Load():
		return true
	case p.refused || p.aborted.Load():
		return false
	}
	if s := p.setup; gone != nil && s.dial.waitedLong(p.e.f.now()-s.sentAt) {
		s.dial.suspect(p.e.f.now(), errGaveUp)
	}
	p.settle(h.src == target)
	return true
}

// another asks another endpoint in place of one that did not answer, unless it was
// settled meanwhile. It returns false when there is no more to do.
func (h *half) another() bool {
	p := h.p
	e := p.e
	cause := h.unanswered
	h.unanswered = nil
	p.answering.Lock()
	defer p.answering.Unlock()
	silent := errors.Is(cause, errNoAnswer)
	switch {
	case p.settled.Load():
		if errors.Is(cause, errClosedUnanswered) {
			h.ended()
		} else if !silent {
			p.failed()
		}
		return silent
	case p.aborted.Load():
		return false
	}
	s := p.setup
	d := &s.dial
	if silent {
		now := e.f.now()
		if !d.mayReplay(now) {
			if d.others(now) { // only there are too many of its kind at the moment
				p.answerBy = now + int64(replayAgain)
				return true
			}
			d.suspect(e.f.now(), cause)
			p.settle(false) // nobody else can be asked: it may still come
			return true
		}
		p.side[target].reset()
	}
	e.unset(&p.side[target])
	d.reset = errors.Is(cause, errResetUnanswered)
	d.unanswered(e.f.now(), cause)
	if e.reach(s) {
		e.asked(s)
		if p.kept.Load() {
			p.side[target].keepalive(e.f.cfg.keepalive(p.owner.keepalive()))
		}
		return true
	}
	if p.refused = true; d.reset {
		p.side[client].reset()
	}
	p.abort()
	return false
}

// moved accounts bytes that came from src and were passed on.
func (p *netpollConn) moved(src uint8, n int) {
	p.bytes[src].Add(uint64(n))
	if src == client {
		p.count.in.Add(uint64(n))
	} else {
		p.count.out.Add(uint64(n))
	}
}

// run moves one direction until its end.
func (h *half) run() {
	for h.pump(); h.unanswered != nil && h.another(); {
		h.pump()
	}
	h.release()
	if p := h.p; p.running.Add(-1) == 0 {
		p.over()
	}
}

// over ends the connection when both of its directions have.
func (p *netpollConn) over() {
	if s := p.setup; s != nil {
		if !p.refused {
			s.dial.abandon()
			p.e.cut(s)
		}
		p.e.end(p)
		p.e.drop(s)
		return
	}
	why := closeReason(p.why.Load())
	closed(p.owner, p.ep)
	p.l.closed[why].Add(1)
	if p.logged {
		p.e.f.lines.add(p.connection(), closeNames[why])
	}
	p.e.end(p)
}

// release gives back what is left of the direction.
func (h *half) release() {
	if h.held != nil {
		h.p.e.blocks.put(h.held)
	}
	h.held, h.data = nil, nil
	if h.pipe != (pipe{}) {
		h.p.e.pipes.put(h.pipe, h.inPipe == 0)
		h.pipe, h.inPipe = pipe{}, 0
	}
}

// ended passes on that src sends no more.
func (h *half) ended() {
	p := h.p
	if p.ends.Add(1) == 1 {
		p.side[1-h.src].shutdown()
		p.arm(1-h.src, true) // the other direction has less time now
	}
}

// failed ends the connection because one of its sides was reset, or is no more to
// be written to: the other learns the same way.
func (p *netpollConn) failed() {
	if !p.aborted.Load() {
		p.cause(closeReset)
		for i := range p.side {
			p.side[i].reset()
		}
	}
	p.abort()
}

// keepaliveAfter is when a connection is one that lasts: keepalive costs those that
// do not nothing.
func (p *netpollConn) keepaliveAfter() time.Duration {
	cfg := &p.e.f.cfg
	return min(cfg.Keepalive.Idle/2, cfg.keepalive(p.owner.keepalive()).Idle/2, 10*time.Second)
}

// due is how long to wait for more of a side before tend is to be called; 0 is for
// ever.
func (p *netpollConn) due(src uint8) (d time.Duration) {
	now := p.e.f.now()
	sooner := func(t int64) {
		if left := max(time.Duration(t-now), time.Millisecond); d == 0 || left < d {
			d = left
		}
	}
	half := p.ends.Load() > 0
	if !p.settled.Load() {
		if src == client {
			return 0
		}
		// The target's half asks others, and waits for it to be settled as it does.
		if p.answerBy > 0 {
			sooner(p.answerBy)
		}
	} else if idle := p.l.terms.Load().idleLimit(half); idle > 0 {
		sooner(p.lastActive.Load() + int64(idle))
	}
	if !p.kept.Load() && (src == target || half) {
		sooner(p.born + int64(p.keepaliveAfter()))
	}
	return d
}

// arm sets the time after which a direction's wait ends to have tend called. It
// returns false when the connection is to end.
func (p *netpollConn) arm(src uint8, again bool) bool {
	for {
		ends := p.ends.Load()
		if d := p.due(src); d > 0 {
			p.side[src].setReadDeadline(time.Now().Add(d))
		} else if again {
			p.side[src].setReadDeadline(time.Time{})
		}
		if p.aborted.Load() {
			p.side[src].setDeadline(past) // which may be what was just undone
			return false
		}
		if ends == p.ends.Load() {
			return true
		}
	}
}

// tend does what is due for a connection on which nothing moves. It returns false
// when the direction is to wait no more.
func (h *half) tend() bool {
	p := h.p
	if p.aborted.Load() {
		return false
	}
	f := p.e.f
	now := f.now()
	settled := p.settled.Load()
	if !settled && h.src == target && p.answerBy > 0 && now >= p.answerBy {
		h.unanswered = errNoAnswer
		return false
	}
	if (settled || h.src == target) && !p.kept.Load() && now >= p.born+int64(p.keepaliveAfter()) && !p.kept.Swap(true) {
		p.side[client].keepalive(f.cfg.Keepalive)
		p.side[target].keepalive(f.cfg.keepalive(p.owner.keepalive()))
	}
	idle := p.l.terms.Load().idleLimit(p.ends.Load() > 0)
	if !settled || idle == 0 || time.Duration(now-p.lastActive.Load()) < idle {
		return true
	}
	p.cause(closeIdle)
	p.abort()
	return false
}
