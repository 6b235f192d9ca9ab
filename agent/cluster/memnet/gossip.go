package memnet

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// Gossip is a [memberlist.Transport] on a host's port.
type Gossip struct {
	host    *Host
	port    int
	packets chan *memberlist.Packet
	streams chan net.Conn
	once    sync.Once
}

var _ memberlist.NodeAwareTransport = (*Gossip)(nil)

// Gossip opens a gossip port of the host; 0 chooses one. It panics when the
// port is in use or the host is down.
func (h *Host) Gossip(port int) *Gossip {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	if port == 0 {
		port = h.portLocked()
	}
	if h.gossip[port] != nil || h.down {
		panic("memnet: gossip port in use or host down: " + h.name)
	}
	g := &Gossip{
		host: h, port: port,
		// As large as a socket's buffer; what does not fit is lost, as with UDP.
		packets: make(chan *memberlist.Packet, 1024),
		streams: make(chan net.Conn, 128),
	}
	h.gossip[port] = g
	return g
}

// Port returns the port.
func (g *Gossip) Port() int { return g.port }

// FinalAdvertiseAddr implements [memberlist.Transport]: the host's own address,
// whatever was configured.
func (g *Gossip) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return g.host.ip.AsSlice(), g.port, nil
}

// WriteTo implements [memberlist.Transport]. Packets that cannot arrive are lost.
func (g *Gossip) WriteTo(b []byte, addr string) (time.Time, error) {
	now := time.Now()
	ip, port, err := splitAddress(addr)
	if err != nil {
		return now, err
	}
	n := g.host.net
	n.mu.Lock()
	defer n.mu.Unlock()
	to := n.hosts[ip]
	if g.host.down || to == nil || to.down || n.cuts[pair(g.host.name, to.name)] {
		return now, nil
	}
	peer := to.gossip[port]
	if peer == nil {
		return now, nil
	}
	p := &memberlist.Packet{
		Buf:       append([]byte(nil), b...), // the sender may reuse its buffer
		From:      &net.UDPAddr{IP: g.host.ip.AsSlice(), Port: g.port},
		Timestamp: now,
	}
	select {
	case peer.packets <- p:
	default:
	}
	return now, nil
}

// WriteToAddress implements [memberlist.NodeAwareTransport].
func (g *Gossip) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return g.WriteTo(b, a.Addr)
}

// PacketCh implements [memberlist.Transport].
func (g *Gossip) PacketCh() <-chan *memberlist.Packet { return g.packets }

// DialTimeout implements [memberlist.Transport].
func (g *Gossip) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	c, err := g.host.dial(ctx, addr, func(to *Host, port int) chan<- net.Conn {
		if peer := to.gossip[port]; peer != nil {
			return peer.streams
		}
		return nil
	})
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "mem", Err: err}
	}
	return c, nil
}

// DialAddressTimeout implements [memberlist.NodeAwareTransport].
func (g *Gossip) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return g.DialTimeout(a.Addr, timeout)
}

// StreamCh implements [memberlist.Transport].
func (g *Gossip) StreamCh() <-chan net.Conn { return g.streams }

// Shutdown implements [memberlist.Transport].
func (g *Gossip) Shutdown() error { g.crash(); return nil }

func (g *Gossip) crash() {
	g.once.Do(func() {
		n := g.host.net
		n.mu.Lock()
		delete(g.host.gossip, g.port)
		n.mu.Unlock()
		drain(g.streams)
	})
}
