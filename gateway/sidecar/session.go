package sidecar

import (
	"container/list"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// session is one accepted connection, from then to its end. Its own goroutine
// writes what is not said to be guarded.
type session struct {
	l       *listener
	peer    string
	since   time.Time
	logged  bool // its end is to be written to the access log
	refused string
	in, out atomic.Uint64 // bytes

	// Guarded by the mutex of sessions.
	client, server    net.Conn // TLS where it is
	serverName        string
	cluster, endpoint string
	at                *list.Element // nil once it is being ended
	cut               string        // why it is being ended, a Close constant
}

// sessions are the open ones.
type sessions struct {
	mu sync.Mutex
	// open has those that nobody ends yet, in the order in which they began.
	open   list.List
	ending int
}

func (s *sessions) begin(l *listener, c net.Conn, logged bool) *session {
	ses := &session{l: l, peer: addrString(c.RemoteAddr()), since: time.Now(), logged: logged, client: c}
	s.mu.Lock()
	defer s.mu.Unlock()
	ses.at = s.open.PushBack(ses)
	return ses
}

// secured says that the client's connection has become one over TLS.
func (s *sessions) secured(ses *session, c net.Conn, serverName string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ses.client, ses.serverName = c, serverName
}

// named says what the client has asked for.
func (s *sessions) named(ses *session, serverName string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ses.serverName = serverName
}

// reached says that the session has an endpoint.
func (s *sessions) reached(ses *session, server net.Conn, c *cluster, e *reached) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ses.server, ses.cluster, ses.endpoint = server, c.def.Name, e.address
	if t := c.def.TLS; t != nil {
		ses.serverName = t.ServerName
	}
}

// end forgets a session, and returns why it was ended, "" where nobody did that.
func (s *sessions) end(ses *session) (cut string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ses.at != nil {
		s.open.Remove(ses.at)
		ses.at = nil
	} else {
		s.ending--
	}
	return ses.cut
}

func (s *sessions) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open.Len() + s.ending
}

// cutOldest calls hangUp for up to n sessions that nobody ends yet, and returns
// how many there were. A session does not end before hangUp has returned, which
// must not wait.
func (s *sessions) cutOldest(n int, why string, hangUp func(client, server net.Conn)) (found int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ; found < n && s.open.Len() > 0; found++ {
		ses := s.open.Remove(s.open.Front()).(*session) //nolint:forcetypeassert,errcheck // it holds nothing else
		ses.at, ses.cut = nil, why
		s.ending++
		hangUp(ses.client, ses.server)
	}
	return found
}

func (s *sessions) list(limit int) []gateway.Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []gateway.Connection
	for e := s.open.Front(); e != nil && len(out) < limit; e = e.Next() {
		out = append(out, e.Value.(*session).connection()) //nolint:forcetypeassert,errcheck // it holds nothing else
	}
	return out
}

// connection describes the session, whose end it is or whose sessions are locked.
func (ses *session) connection() gateway.Connection {
	return gateway.Connection{
		Listener: ses.l.name, Client: ses.peer, ServerName: ses.serverName, Cluster: ses.cluster, Endpoint: ses.endpoint,
		Since: ses.since, BytesIn: ses.in.Load(), BytesOut: ses.out.Load(),
	}
}

// Connections implements [gateway.ConnectionLister].
func (s *Sidecar) Connections(limit int) []gateway.Connection { return s.sessions.list(limit) }

// end accounts for a session that is over.
func (s *Sidecar) end(ses *session, reason string) {
	cut := s.sessions.end(ses)
	if ses.refused != "" {
		reason = ses.refused
	} else {
		if cut != "" {
			reason = cut
		}
		ses.l.closed.Add(reason)
	}
	if ses.logged {
		c := ses.connection()
		s.cfg.AccessLog.Write(&c, reason)
	}
}
