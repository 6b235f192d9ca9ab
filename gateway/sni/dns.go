package sni

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// The bounds of how long an answer of a name server is taken to hold. A name may ask
// never to be kept, but not for a query per connection; and one that asks to be kept
// for days would be stuck to when it has moved.
const (
	leastTTL = 2 * time.Second
	mostTTL  = 5 * time.Minute
)

// systemLookup resolves as the system is configured. How long the answer holds is
// known where it came from a name server, and not from a file of hosts.
func systemLookup(ctx context.Context, host string) ([]netip.Addr, time.Duration, error) {
	return lookupThrough(ctx, new(net.Dialer).DialContext, host)
}

// lookupThrough resolves with connections that dial makes to name servers.
func lookupThrough(ctx context.Context, dial dialFunc, host string) ([]netip.Addr, time.Duration, error) {
	t := &ttlTap{dial: dial}
	// One for each lookup: lookups of one resolver share their answers, and then only
	// one of them would see its TTL.
	r := net.Resolver{Dial: t.dialContext}
	addrs, err := r.LookupNetIP(ctx, "ip", host)
	return addrs, t.ttl(), err
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// ttlTap reads the TTLs of answers on their way from name servers to the resolver of
// package net, which knows the system's configuration but does not tell them.
type ttlTap struct {
	dial dialFunc

	mu    sync.Mutex // guards what follows
	known bool
	least uint32 // seconds
}

func (t *ttlTap) dialContext(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := t.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if u, ok := c.(*net.UDPConn); ok {
		return &packetTap{u, t}, nil
	}
	return &streamTap{Conn: c, t: t}, nil
}

// ttl is the least of all answers, within bounds; 0 is not known.
func (t *ttlTap) ttl() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.known {
		return 0
	}
	return min(max(time.Duration(t.least)*time.Second, leastTTL), mostTTL)
}

// take reads a message. One that has no address is not part of the answer.
func (t *ttlTap) take(msg []byte) {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil || !h.Response || h.RCode != dnsmessage.RCodeSuccess || p.SkipAllQuestions() != nil {
		return
	}
	found, least := false, ^uint32(0)
	for {
		rr, err := p.AnswerHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			break
		}
		if err != nil {
			return
		}
		switch rr.Type {
		case dnsmessage.TypeA, dnsmessage.TypeAAAA:
			found = true
			least = min(least, rr.TTL)
		case dnsmessage.TypeCNAME:
			least = min(least, rr.TTL)
		}
		if p.SkipAnswer() != nil {
			return
		}
	}
	if !found {
		return
	}
	if least > 1<<31-1 {
		least = 0 // RFC 2181 8
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.known || least < t.least {
		t.known, t.least = true, least
	}
}

// packetTap is a connection on which each read is a message.
type packetTap struct {
	*net.UDPConn
	t *ttlTap
}

// Read implements [net.Conn].
func (c *packetTap) Read(b []byte) (int, error) {
	n, err := c.UDPConn.Read(b)
	if err == nil {
		c.t.take(b[:n])
	}
	return n, err
}

// streamTap is a connection with the length of each message before it.
type streamTap struct {
	net.Conn
	t   *ttlTap
	buf []byte
}

// Read implements [net.Conn].
func (c *streamTap) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.buf = append(c.buf, b[:n]...)
	for len(c.buf) >= 2 {
		size := 2 + int(binary.BigEndian.Uint16(c.buf))
		if len(c.buf) < size {
			break
		}
		c.t.take(c.buf[2:size])
		c.buf = c.buf[size:]
	}
	return n, err
}
