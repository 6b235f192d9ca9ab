// Package memnet is a network in memory: hosts with IP addresses, gossip
// transports and stream connections between them, which can be partitioned and
// crashed. It is for tests, in particular in synctest bubbles: everything waits
// on channels, nothing waits for somebody who is gone, and there is no goroutine
// that outlives what it serves.
package memnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
)

// Network connects hosts. The zero value is ready to use; its methods are safe
// for concurrent use.
type Network struct {
	mu sync.Mutex // guards everything below, in hosts and links too

	hosts map[netip.Addr]*Host
	cuts  map[[2]string]bool
	links map[*link]bool
	// healed is closed and replaced whenever a partition ends.
	healed chan struct{}
}

// Host is a machine on the network. Hosts are made by [Network.Host].
type Host struct {
	net  *Network
	name string
	ip   netip.Addr

	listeners map[int]*listener
	gossip    map[int]*Gossip
	nextPort  int
	down      bool
}

// Host returns the host of that name, made with that IP where it is new. It
// panics when the IP is none or another host's.
func (n *Network) Host(name, ip string) *Host {
	addr := netip.MustParseAddr(ip)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.hosts == nil {
		n.hosts = map[netip.Addr]*Host{}
		n.cuts = map[[2]string]bool{}
		n.links = map[*link]bool{}
		n.healed = make(chan struct{})
	}
	h := n.hosts[addr]
	if h == nil {
		h = &Host{
			net: n, name: name, ip: addr,
			listeners: map[int]*listener{}, gossip: map[int]*Gossip{}, nextPort: 40000,
		}
		n.hosts[addr] = h
	}
	if h.name != name {
		panic(fmt.Sprintf("memnet: %s is the address of %s and of %s", ip, h.name, name))
	}
	return h
}

// Partition lets nothing pass between the hosts in a and those in b: packets
// are lost, dialling hangs, and what is written to open connections stays on
// the way until Heal.
func (n *Network) Partition(a, b []string) {
	n.mu.Lock()
	for _, x := range a {
		for _, y := range b {
			n.cuts[pair(x, y)] = true
		}
	}
	links := n.linksLocked(func(l *link) bool { return n.cuts[pair(l.a.name, l.b.name)] })
	n.mu.Unlock()
	for _, l := range links {
		l.setCut(true)
	}
}

// Heal ends all partitions.
func (n *Network) Heal() {
	n.mu.Lock()
	clear(n.cuts)
	links := n.linksLocked(func(*link) bool { return true })
	if n.healed != nil {
		close(n.healed)
		n.healed = make(chan struct{})
	}
	n.mu.Unlock()
	for _, l := range links {
		l.setCut(false)
	}
}

// Crash kills what runs on the host: connections are reset, listeners and
// gossip end, and nothing can be opened on it before [Network.Restart].
func (n *Network) Crash(host string) {
	n.mu.Lock()
	var hosts []*Host
	for _, h := range n.hosts {
		if h.name == host {
			hosts = append(hosts, h)
			h.down = true
		}
	}
	links := n.linksLocked(func(l *link) bool { return l.a.name == host || l.b.name == host })
	var close []interface{ crash() }
	for _, h := range hosts {
		for _, l := range h.listeners {
			close = append(close, l)
		}
		for _, g := range h.gossip {
			close = append(close, g)
		}
	}
	n.mu.Unlock()
	for _, c := range close {
		c.crash()
	}
	for _, l := range links {
		l.reset()
	}
}

// Restart lets a crashed host be used again.
func (n *Network) Restart(host string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, h := range n.hosts {
		if h.name == host {
			h.down = false
		}
	}
}

func (n *Network) linksLocked(match func(*link) bool) []*link {
	var out []*link
	for l := range n.links {
		if match(l) {
			out = append(out, l)
		}
	}
	return out
}

func (n *Network) closed(l *link) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if l.count++; l.count == len(l.ends) {
		delete(n.links, l)
	}
}

func pair(a, b string) [2]string {
	if a > b {
		a, b = b, a
	}
	return [2]string{a, b}
}

// splitAddress parses ip:port.
func splitAddress(address string) (netip.Addr, int, error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return netip.Addr{}, 0, fmt.Errorf("parse address %q: %w", address, err)
	}
	return ap.Addr().Unmap(), int(ap.Port()), nil
}

// IP returns the host's address.
func (h *Host) IP() string { return h.ip.String() }

// Listen listens on a port of the host: the IP in address counts for nothing.
// Port 0 chooses a free one.
func (h *Host) Listen(address string) (net.Listener, error) {
	_, s, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", address, err)
	}
	port, err := strconv.Atoi(s)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", address, err)
	}
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	if h.down {
		return nil, fmt.Errorf("listen on %q: host %s is down", address, h.name)
	}
	if port == 0 {
		port = h.portLocked()
	}
	if h.listeners[port] != nil {
		return nil, fmt.Errorf("listen on %q: %w", address, syscall.EADDRINUSE)
	}
	l := &listener{host: h, port: port, conns: make(chan net.Conn, 128), done: make(chan struct{})}
	h.listeners[port] = l
	return l, nil
}

func (h *Host) portLocked() int {
	h.nextPort++
	return h.nextPort
}

// Dial connects to a listener on the network.
func (h *Host) Dial(ctx context.Context, address string) (net.Conn, error) {
	c, err := h.dial(ctx, address, func(to *Host, port int) chan<- net.Conn {
		if l := to.listeners[port]; l != nil {
			return l.conns
		}
		return nil
	})
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "mem", Err: err}
	}
	return c, nil
}

// dial connects to the backlog that accept finds on the host; nil is refused.
// accept is called with the network's lock held.
func (h *Host) dial(ctx context.Context, address string, accept func(*Host, int) chan<- net.Conn) (net.Conn, error) {
	ip, port, err := splitAddress(address)
	if err != nil {
		return nil, err
	}
	n := h.net
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n.mu.Lock()
		if h.down {
			n.mu.Unlock()
			return nil, syscall.ENETDOWN
		}
		to := n.hosts[ip]
		if to == nil || !n.cuts[pair(h.name, to.name)] {
			if to == nil || to.down {
				n.mu.Unlock()
				return nil, syscall.ECONNREFUSED
			}
			ch := accept(to, port)
			if ch == nil {
				n.mu.Unlock()
				return nil, syscall.ECONNREFUSED
			}
			mine, theirs := n.connectLocked(h, to, port)
			// Sent with the lock held, so that a listener that closes now drains it.
			select {
			case ch <- theirs:
				n.mu.Unlock()
				return mine, nil
			default: // the backlog is full
			}
			delete(n.links, mine.link)
			n.mu.Unlock()
			return nil, syscall.ECONNREFUSED
		}
		healed := n.healed
		n.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-healed:
		}
	}
}

func (n *Network) connectLocked(from, to *Host, port int) (mine, theirs *conn) {
	fa := &net.TCPAddr{IP: from.ip.AsSlice(), Port: from.portLocked()}
	ta := &net.TCPAddr{IP: to.ip.AsSlice(), Port: port}
	x, y := newStream(), newStream()
	l := &link{a: from, b: to}
	mine = &conn{net: n, in: x, out: y, local: fa, remote: ta, rd: newDeadline(), wd: newDeadline(), link: l}
	theirs = &conn{net: n, in: y, out: x, local: ta, remote: fa, rd: newDeadline(), wd: newDeadline(), link: l}
	l.ends = [2]*conn{mine, theirs}
	n.links[l] = true
	return mine, theirs
}

// listener is an RPC port.
type listener struct {
	host  *Host
	port  int
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
	default:
		select {
		case c := <-l.conns:
			return c, nil
		case <-l.done:
		}
	}
	return nil, &net.OpError{Op: "accept", Net: "mem", Addr: l.Addr(), Err: net.ErrClosed}
}

func (l *listener) Close() error { l.crash(); return nil }

func (l *listener) crash() {
	l.once.Do(func() {
		l.host.net.mu.Lock()
		delete(l.host.listeners, l.port)
		close(l.done)
		l.host.net.mu.Unlock()
		drain(l.conns)
	})
}

func (l *listener) Addr() net.Addr {
	return &net.TCPAddr{IP: l.host.ip.AsSlice(), Port: l.port}
}

// drain closes the connections that nobody accepted.
func drain(ch <-chan net.Conn) {
	for {
		select {
		case c := <-ch:
			_ = c.Close()
		default:
			return
		}
	}
}
