package sni

import "golang.org/x/sys/unix"

// block returns an empty slice with room for n bytes, at most 64 KiB.
func (l *loop) block(n int) []byte {
	k := blockClass(max(n, 1))
	if s := l.blocks[k]; len(s) > 0 {
		b := s[len(s)-1]
		l.blocks[k] = s[:len(s)-1]
		return b[:0]
	}
	return make([]byte, 0, 1<<(k+smallestBlock))
}

func (l *loop) unblock(b []byte) {
	if cap(b) == 0 {
		return
	}
	if k := blockClass(cap(b)); len(l.blocks[k])<<(k+smallestBlock) < keepBlocks {
		l.blocks[k] = append(l.blocks[k], b)
	}
}

func (l *loop) newHeld() *held {
	if n := len(l.helds); n > 0 {
		h := l.helds[n-1]
		l.helds = l.helds[:n-1]
		return h
	}
	return &held{}
}

func (l *loop) dropHeld(h *held) {
	l.unblock(h.buf)
	if h.pipe != (pipe{}) {
		l.dropPipe(h.pipe, h.n == 0)
	}
	*h = held{}
	if len(l.helds) < keepHeld {
		l.helds = append(l.helds, h)
	}
}

func (l *loop) newBegun() *begun {
	if n := len(l.begins); n > 0 {
		b := l.begins[n-1]
		l.begins = l.begins[:n-1]
		return b
	}
	return &begun{}
}

func (l *loop) dropBegun(c *conn) {
	b := c.begun
	b.remove()
	for _, r := range b.rivals {
		rawClose(r.fd)
	}
	c.begun = nil
	l.unblock(b.buf)
	*b = begun{}
	if len(l.begins) < keepBegun {
		l.begins = append(l.begins, b)
	}
}

// note returns the connection's note, which it makes if there is none.
func (l *loop) note(c *conn) *note {
	if c.note == nil {
		if n := len(l.notes); n > 0 {
			c.note = l.notes[n-1]
			l.notes = l.notes[:n-1]
		} else {
			c.note = &note{}
		}
	}
	return c.note
}

func (l *loop) dropNote(c *conn) {
	n := c.note
	c.note = nil
	*n = note{}
	if len(l.notes) < keepNotes {
		l.notes = append(l.notes, n)
	}
}

// pipe returns an empty pipe, or false when there is none to be had.
func (l *loop) pipe() (pipe, bool) {
	if l.pipesIn >= maxPipes {
		return pipe{}, false
	}
	if n := len(l.pipes); n > 0 {
		p := l.pipes[n-1]
		l.pipes = l.pipes[:n-1]
		l.pipesIn++
		return p, true
	}
	p, ok := newPipe()
	if ok {
		l.pipesIn++
	}
	return p, ok
}

// newPipe makes a pipe, or returns false when there is none to be had.
func newPipe() (pipe, bool) {
	var p [2]int
	if unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC) != nil {
		return pipe{}, false
	}
	for _, size := range [...]int{pipeSize, slowPipe} {
		if _, err := unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, size); err == nil {
			return pipe{int32(p[0]), int32(p[1])}, true
		}
	}
	// The user's quota of pipe pages (pipe(7)) is used up. What the kernel still gives
	// may be a pipe of two pages, which is worse than copying.
	if size, err := unix.FcntlInt(uintptr(p[0]), unix.F_GETPIPE_SZ, 0); err != nil || size < leastPipe {
		unix.Close(p[0])
		unix.Close(p[1])
		return pipe{}, false
	}
	return pipe{int32(p[0]), int32(p[1])}, true
}

// pipeFill is how many bytes to put into a pipe, with so many in use.
func pipeFill(inUse int) int {
	if inUse > fastPipes {
		return slowPipe
	}
	return pipeSize
}

func (p pipe) close() {
	rawClose(p.r)
	rawClose(p.w)
}

// dropPipe gives a pipe back. One with bytes in it is of no more use.
func (l *loop) dropPipe(p pipe, empty bool) {
	l.pipesIn--
	if empty && len(l.pipes) < keepPipes {
		l.pipes = append(l.pipes, p)
		return
	}
	p.close()
}
