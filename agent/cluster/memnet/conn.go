package memnet

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// maxBuffered is how much a connection holds before writes wait, per direction.
const maxBuffered = 1 << 20

// stream is one direction of a connection. Everything waits on channels, so
// that time can advance in a synctest bubble meanwhile.
type stream struct {
	mu     sync.Mutex
	data   []byte
	eof    bool          // the writer closed
	err    error         // the connection was torn down
	cut    bool          // what is written arrives only once this ends
	change chan struct{} // closed and replaced on every change
}

func newStream() *stream { return &stream{change: make(chan struct{})} }

// update runs f and wakes everyone who waits.
func (s *stream) update(f func()) {
	s.mu.Lock()
	f()
	close(s.change)
	s.change = make(chan struct{})
	s.mu.Unlock()
}

func (s *stream) read(p []byte, d *deadline) (int, error) {
	for {
		s.mu.Lock()
		switch {
		case s.err != nil:
			defer s.mu.Unlock()
			return 0, s.err
		case d.passed():
			defer s.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			defer s.mu.Unlock()
			return 0, nil
		case !s.cut && len(s.data) > 0:
			n := copy(p, s.data)
			s.data = s.data[n:]
			if len(s.data) == 0 {
				s.data = nil
			}
			close(s.change)
			s.change = make(chan struct{})
			s.mu.Unlock()
			return n, nil
		case !s.cut && s.eof:
			defer s.mu.Unlock()
			return 0, io.EOF
		}
		change := s.change
		s.mu.Unlock()
		d.wait(change)
	}
}

func (s *stream) write(p []byte, d *deadline) (n int, err error) {
	for {
		s.mu.Lock()
		switch {
		case s.err != nil:
			defer s.mu.Unlock()
			return n, s.err
		case s.eof:
			defer s.mu.Unlock()
			return n, net.ErrClosed
		case d.passed():
			defer s.mu.Unlock()
			return n, os.ErrDeadlineExceeded
		case len(s.data) < maxBuffered:
			k := min(len(p)-n, maxBuffered-len(s.data))
			s.data = append(s.data, p[n:n+k]...)
			n += k
			close(s.change)
			s.change = make(chan struct{})
			if n == len(p) {
				s.mu.Unlock()
				return n, nil
			}
		}
		change := s.change
		s.mu.Unlock()
		d.wait(change)
	}
}

// deadline is one that can be moved while somebody waits for it.
type deadline struct {
	mu     sync.Mutex
	at     time.Time
	timer  *time.Timer
	change chan struct{} // closed and replaced when at moves or passes
}

func newDeadline() *deadline { return &deadline{change: make(chan struct{})} }

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.at = t
	if !t.IsZero() {
		if left := time.Until(t); left > 0 {
			d.timer = time.AfterFunc(left, d.wake)
		}
	}
	close(d.change)
	d.change = make(chan struct{})
}

func (d *deadline) wake() {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.change)
	d.change = make(chan struct{})
}

func (d *deadline) passed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.at.IsZero() && !time.Now().Before(d.at)
}

// wait returns when ch closes or the deadline passes or moves.
func (d *deadline) wait(ch <-chan struct{}) {
	d.mu.Lock()
	change, passed := d.change, !d.at.IsZero() && !time.Now().Before(d.at)
	d.mu.Unlock()
	if passed {
		return
	}
	select {
	case <-ch:
	case <-change:
	}
}

// conn is one end of a connection between two hosts.
type conn struct {
	net           *Network
	in, out       *stream
	local, remote net.Addr
	rd, wd        *deadline
	link          *link
	once          sync.Once
}

func (c *conn) Read(p []byte) (int, error)  { return c.in.read(p, c.rd) }
func (c *conn) Write(p []byte) (int, error) { return c.out.write(p, c.wd) }
func (c *conn) LocalAddr() net.Addr         { return c.local }
func (c *conn) RemoteAddr() net.Addr        { return c.remote }

// Close lets the peer read what was written, then end of file.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.out.update(func() { c.out.eof = true })
		c.in.update(func() { c.in.err = net.ErrClosed })
		c.rd.set(time.Time{})
		c.wd.set(time.Time{})
		c.net.closed(c.link)
	})
	return nil
}

func (c *conn) SetDeadline(t time.Time) error {
	c.rd.set(t)
	c.wd.set(t)
	return nil
}
func (c *conn) SetReadDeadline(t time.Time) error  { c.rd.set(t); return nil }
func (c *conn) SetWriteDeadline(t time.Time) error { c.wd.set(t); return nil }

// link is a connection as the network sees it.
type link struct {
	a, b  *Host
	ends  [2]*conn
	count int // of ends that are closed; guarded by Network.mu
}

func (l *link) setCut(cut bool) {
	for _, c := range l.ends {
		c.in.update(func() { c.in.cut = cut })
	}
}

// reset tears the connection down at both ends, as a killed process does.
func (l *link) reset() {
	for _, c := range l.ends {
		c.in.update(func() {
			if c.in.err == nil {
				c.in.err = &net.OpError{Op: "read", Net: "mem", Addr: c.remote, Err: syscall.ECONNRESET}
			}
		})
	}
}
