package cluster

import (
	"context"
	"net"
	"time"
)

// Network opens and dials RPC ports. It is replaced where there is no real
// network. Implementations are safe for concurrent use.
type Network interface {
	// Listen listens on ip:port; port 0 chooses a free one.
	Listen(address string) (net.Listener, error)
	// Dial connects to ip:port. It returns when ctx ends.
	Dial(ctx context.Context, address string) (net.Conn, error)
}

// tcpNetwork is the real one.
type tcpNetwork struct{}

// Cut connections are noticed by HTTP/2 pings and raft's heartbeats; keepalive
// is for the ones that nobody writes to.
const tcpKeepAlive = 15 * time.Second

func (tcpNetwork) Listen(address string) (net.Listener, error) {
	l := net.ListenConfig{KeepAlive: tcpKeepAlive}
	return l.Listen(context.Background(), "tcp", address)
}

func (tcpNetwork) Dial(ctx context.Context, address string) (net.Conn, error) {
	d := net.Dialer{KeepAlive: tcpKeepAlive}
	return d.DialContext(ctx, "tcp", address)
}
