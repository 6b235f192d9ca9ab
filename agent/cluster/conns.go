package cluster

import (
	"net"
	"sync"
)

// connSet is open connections, so that they can all be closed.
type connSet struct {
	mu     sync.Mutex
	conns  map[*trackedConn]struct{} // guarded by mu
	closed bool                      // guarded by mu
}

// add returns c as one of the set, which it leaves when it is closed. When the
// set is closed, c is too.
func (s *connSet) add(c net.Conn) (net.Conn, error) {
	t := &trackedConn{Conn: c, set: s}
	s.mu.Lock()
	closed := s.closed
	if !closed {
		if s.conns == nil {
			s.conns = map[*trackedConn]struct{}{}
		}
		s.conns[t] = struct{}{}
	}
	s.mu.Unlock()
	if closed {
		_ = c.Close()
		return nil, net.ErrClosed
	}
	return t, nil
}

// close closes all connections and every later one.
func (s *connSet) close() {
	s.mu.Lock()
	s.closed = true
	conns := s.conns
	s.conns = nil
	s.mu.Unlock()
	for c := range conns {
		_ = c.Conn.Close()
	}
}

type trackedConn struct {
	net.Conn
	set *connSet
}

func (c *trackedConn) Close() error {
	c.set.mu.Lock()
	delete(c.set.conns, c)
	c.set.mu.Unlock()
	return c.Conn.Close()
}
