package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// How a connection to the RPC port says what it carries: by its first byte, or
// by ALPN under TLS.
const (
	raftByte    = 0x01
	tlsByte     = 0x16 // a TLS handshake record
	http2Byte   = 'P'  // the HTTP/2 client preface, "PRI * HTTP/2.0"
	alpnRaft    = "consul/raft"
	alpnHTTP2   = "h2"
	helloWithin = 5 * time.Second // limits.rpc_handshake_timeout
)

// mux takes the connections of the RPC port apart. It tracks all of them, so
// that shutting down ends those that would go on for ever.
type mux struct {
	listener net.Listener
	tls      *tls.Config // nil refuses TLS
	log      hclog.Logger

	raft, http *handoff

	conns  connSet
	wg     sync.WaitGroup
	once   sync.Once
	closed chan struct{}
}

func newMux(l net.Listener, serverTLS *tls.Config, log hclog.Logger) *mux {
	m := &mux{
		listener: l, log: log,
		raft: newHandoff(l.Addr()), http: newHandoff(l.Addr()),
		closed: make(chan struct{}),
	}
	if serverTLS != nil {
		m.tls = serverTLS.Clone()
		m.tls.NextProtos = []string{alpnHTTP2, alpnRaft}
	}
	return m
}

// serve accepts until close is called.
func (m *mux) serve() {
	defer m.wg.Wait()
	var pause time.Duration
	for {
		c, err := m.listener.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of file descriptors, most likely: others may close some.
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			m.log.Error("accept rpc connection", "error", err, "retry_in", pause)
			select {
			case <-time.After(pause):
				continue
			case <-m.closed:
				return
			}
		}
		pause = 0
		t, err := m.conns.add(c)
		if err != nil {
			return
		}
		m.wg.Go(func() {
			if err := m.handle(t); err != nil {
				m.log.Debug("refuse rpc connection", "peer_addr", t.RemoteAddr().String(), "error", err)
				_ = t.Close()
			}
		})
	}
}

// handle finds out what a connection carries and hands it on.
func (m *mux) handle(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(helloWithin)); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	var first [1]byte
	if _, err := c.Read(first[:]); err != nil {
		return fmt.Errorf("read first byte: %w", err)
	}
	to := m.http
	switch first[0] {
	case tlsByte:
		if m.tls == nil {
			return errors.New("tls is not configured")
		}
		tc := tls.Server(&prefixConn{Conn: c, prefix: first[:]}, m.tls)
		if err := tc.Handshake(); err != nil {
			return fmt.Errorf("tls handshake: %w", err)
		}
		switch p := tc.ConnectionState().NegotiatedProtocol; p {
		case alpnHTTP2:
		case alpnRaft:
			to = m.raft
		default:
			return fmt.Errorf("unknown application protocol %q", p)
		}
		c = tc
	case raftByte, http2Byte:
		if m.tls != nil && m.tls.ClientAuth >= tls.RequireAndVerifyClientCert {
			return errors.New("clear text where tls is required")
		}
		if first[0] == raftByte {
			to = m.raft
		} else {
			c = &prefixConn{Conn: c, prefix: first[:]}
		}
	default:
		return fmt.Errorf("unknown protocol, first byte 0x%02x", first[0])
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("clear deadline: %w", err)
	}
	return to.give(c)
}

// close stops accepting and closes every connection.
func (m *mux) close() {
	m.once.Do(func() {
		close(m.closed)
		_ = m.listener.Close()
		_ = m.raft.Close()
		_ = m.http.Close()
		m.conns.close()
	})
}

// prefixConn gives back the byte that was looked at. One goroutine reads.
type prefixConn struct {
	net.Conn
	prefix []byte
}

func (c *prefixConn) Read(p []byte) (int, error) {
	if len(c.prefix) > 0 && len(p) > 0 {
		n := copy(p, c.prefix)
		c.prefix = c.prefix[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// handoff is a listener that is given its connections.
type handoff struct {
	addr  net.Addr
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newHandoff(addr net.Addr) *handoff {
	return &handoff{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (h *handoff) give(c net.Conn) error {
	select {
	case h.conns <- c:
		return nil
	case <-h.done:
		return net.ErrClosed
	}
}

func (h *handoff) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *handoff) Close() error {
	h.once.Do(func() { close(h.done) })
	return nil
}

func (h *handoff) Addr() net.Addr { return h.addr }

// raftLayer is raft's side of the RPC port.
type raftLayer struct {
	*handoff
	advertise net.Addr
	dial      func(ctx context.Context, address string) (net.Conn, error)
}

// Addr is the address that raft tells the others.
func (l *raftLayer) Addr() net.Addr { return l.advertise }
