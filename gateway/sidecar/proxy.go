package sidecar

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/gateway"
)

// handle serves one accepted connection by the routing it came in under. It
// returns why it ended, where it has not been refused.
func (s *Sidecar) handle(ctx context.Context, ses *session, r *routing, def *gateway.Listener, conn net.Conn) string {
	s.keepalive(conn, nil)
	switch def.Mode {
	case gateway.ListenInbound:
		return s.inbound(ctx, ses, r, def, conn)
	case gateway.ListenUpstream:
		return s.upstream(ctx, ses, r, def, conn)
	default:
		s.refuse(ses, gateway.RefuseNoRoute, fmt.Errorf("a sidecar does not serve listeners of mode %q", def.Mode), "")
		return ""
	}
}

// serverConfig is the TLS of inbound listeners. Sessions are not resumed: each
// connection shows its certificate, and is judged by the rules of its time.
func serverConfig(r *routing) *tls.Config {
	return &tls.Config{
		Certificates:           []tls.Certificate{*r.cert},
		ClientAuth:             tls.RequireAnyClientCert,
		MinVersion:             tls.VersionTLS12,
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			return r.verifier.Verify(cs.PeerCertificates, time.Now(), nil)
		},
	}
}

// inbound terminates mutual TLS, asks the intentions, and forwards to the local
// service.
func (s *Sidecar) inbound(ctx context.Context, ses *session, r *routing, def *gateway.Listener, conn net.Conn) string {
	if r.inbound == nil {
		s.refuse(ses, gateway.RefuseHandshake, errNoIdentity, "")
		return ""
	}
	tc := tls.Server(conn, r.inbound)
	hctx, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	err := tc.HandshakeContext(hctx)
	cancel()
	if errors.Is(err, io.EOF) {
		// Not a byte came: somebody looked whether the port is open, as health checks
		// do every few seconds. In the ring they would push out what matters.
		ses.refused = gateway.RefuseClientGone
		ses.l.refuse(gateway.RefuseClientGone)
		return ""
	}
	if err != nil {
		s.refuse(ses, gateway.RefuseHandshake, err, tc.ConnectionState().ServerName)
		return ""
	}
	sni := tc.ConnectionState().ServerName
	s.sessions.secured(ses, tc, sni)
	id, err := connect.PeerIdentity(tc.ConnectionState().PeerCertificates[0])
	if err != nil {
		s.refuse(ses, gateway.RefuseIdentity, err, sni)
		return ""
	}
	if allow, why := authorise(def.Authorise, id.Service); !allow {
		s.refuse(ses, gateway.RefuseDenied, fmt.Errorf("%s: %s", id.URI(), why), sni)
		return ""
	}
	c := r.clusters[def.Cluster]
	up, e, err := s.dial(ctx, r, c, conn.RemoteAddr())
	if err != nil {
		s.refuse(ses, reasonOf(err), err, sni)
		return ""
	}
	return s.join(ses, c, e, tc, up)
}

// authorise finds the first rule for source; why names it.
func authorise(a *gateway.Authorisation, source catalog.ServiceName) (allow bool, why string) {
	if a == nil {
		return false, "the listener has no rules"
	}
	for i := range a.Rules {
		rule := &a.Rules[i]
		if rule.Source.Name != "*" && rule.Source.Canonical() != source.Canonical() {
			continue
		}
		return rule.Allow, fmt.Sprintf("intention for source %s (precedence %d, %s)", rule.Source, rule.Precedence, rule.Origin.Object)
	}
	return a.DefaultAllow, "no intention matches, and the default decides"
}

// upstream carries a plain connection over mutual TLS to the listener's cluster.
func (s *Sidecar) upstream(ctx context.Context, ses *session, r *routing, def *gateway.Listener, conn net.Conn) string {
	c := r.clusters[def.Cluster]
	up, e, err := s.dial(ctx, r, c, conn.RemoteAddr())
	if err != nil {
		s.refuse(ses, reasonOf(err), err, "")
		return ""
	}
	return s.join(ses, e.cluster, e, conn, up)
}

// errNoEndpoint says that a cluster has nothing to dial.
var errNoEndpoint = errors.New("no healthy endpoint")

func reasonOf(err error) string {
	switch {
	case errors.Is(err, errNoEndpoint):
		return gateway.RefuseNoEndpoint
	case errors.Is(err, errLimit):
		return gateway.RefuseLimit
	case errors.Is(err, errIdentity):
		return gateway.RefuseIdentity
	case errors.Is(err, errHandshake):
		return gateway.RefuseHandshake
	}
	return gateway.RefuseConnect
}

var (
	errLimit     = errors.New("the cluster has as many connections as it may")
	errHandshake = errors.New("mutual TLS")
	// errIdentity is wrapped where the far side is somebody else.
	errIdentity = errors.New("not the expected peer")
)

// reached is the endpoint that a connection was made to, and its cluster.
type reached struct {
	*endpoint
	cluster *cluster
}

// dial connects to the best endpoint of c that answers, then of the clusters it
// fails over to. The connection is in s.conns.
func (s *Sidecar) dial(ctx context.Context, r *routing, c *cluster, peer net.Addr) (net.Conn, *reached, error) {
	if c == nil {
		return nil, nil, fmt.Errorf("the table has no such cluster: %w", errNoEndpoint)
	}
	var errs []error
	left := s.cfg.Attempts
	tried := []*cluster{c}
	for _, name := range c.def.Failover {
		if f := r.clusters[name]; f != nil {
			tried = append(tried, f)
		}
	}
	for _, t := range tried {
		if max := t.def.MaxConnections; max > 0 && t.active.Load() >= int64(max) {
			errs = append(errs, fmt.Errorf("%s: %w (%d)", t.def.Name, errLimit, max))
			continue
		}
		eps := t.candidates()
		if len(eps) == 0 {
			errs = append(errs, fmt.Errorf("%s: %w among %d", t.def.Name, errNoEndpoint, len(t.endpoints)))
			continue
		}
		for _, e := range eps {
			if left == 0 {
				break
			}
			if left < s.cfg.Attempts {
				t.retries.Add(1)
			}
			left--
			e.active.Add(1)
			conn, err := s.connect(ctx, r, t, e)
			if err == nil {
				e.succeeded()
				t.connected.Add(1)
				return conn, &reached{e, t}, nil
			}
			e.active.Add(-1)
			if ctx.Err() != nil {
				return nil, nil, ctx.Err()
			}
			e.fail(err)
			s.cfg.Logger.Debug("endpoint not reached", "cluster", t.def.Name, "endpoint", e.address, "client", addrString(peer), "error", err)
			errs = append(errs, fmt.Errorf("%s: %w", e.address, err))
		}
	}
	c.failed.Add(1)
	return nil, nil, errors.Join(errs...)
}

// connect makes one connection to one endpoint, TLS included where the cluster
// has it. The connection is in s.conns.
func (s *Sidecar) connect(ctx context.Context, r *routing, c *cluster, e *endpoint) (net.Conn, error) {
	network := e.def.Network
	if network == "" {
		network = "tcp"
	}
	ctx, cancel := context.WithTimeout(ctx, c.def.ConnectTimeout)
	defer cancel()
	conn, err := (&net.Dialer{KeepAlive: -1}).DialContext(ctx, network, e.address)
	if err != nil {
		return nil, err
	}
	if !s.conns.add(conn) {
		return nil, net.ErrClosed
	}
	s.keepalive(conn, c.def.Keepalive)
	if c.def.TLS == nil {
		return conn, nil
	}
	tc, err := s.originate(ctx, r, c.def.TLS, conn)
	if err != nil {
		_ = conn.Close() // the handshake's error says more
		s.conns.remove(conn)
		return nil, fmt.Errorf("%w with %s: %w", errHandshake, c.def.TLS.ServerName, err)
	}
	return tc, nil
}

// originate does the client's side of mutual TLS: the server must be one of the
// expected identities, whatever its address.
func (s *Sidecar) originate(ctx context.Context, r *routing, want *gateway.ClientTLS, conn net.Conn) (*tls.Conn, error) {
	if r.cert == nil {
		return nil, errNoIdentity
	}
	expect := want.SPIFFE
	if expect == nil {
		expect = []string{} // nobody, rather than anybody
	}
	tc := tls.Client(conn, &tls.Config{
		Certificates: []tls.Certificate{*r.cert},
		ServerName:   want.ServerName,
		MinVersion:   tls.VersionTLS12,
		// The mesh knows its members by SPIFFE identity, not by host name: the check
		// below takes the place of the one that is skipped.
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection verifies chain and identity
		VerifyConnection: func(cs tls.ConnectionState) error {
			if err := r.verifier.Verify(cs.PeerCertificates, time.Now(), expect); err != nil {
				return fmt.Errorf("%w: %w", errIdentity, err)
			}
			return nil
		},
	})
	ctx, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	defer cancel()
	return tc, tc.HandshakeContext(ctx)
}

// keepalive sets TCP keepalive, by k where the table has it.
func (s *Sidecar) keepalive(conn net.Conn, k *gateway.Keepalive) {
	tc, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	cfg := s.cfg.Keepalive
	if k != nil {
		cfg = net.KeepAliveConfig{Enable: true, Idle: k.Idle, Interval: k.Interval, Count: k.Probes}
	}
	_ = tc.SetKeepAliveConfig(cfg) // without it the connection works as well, and ends later
}

// join copies both ways until both have ended, passing on the end of each, and
// gives up the endpoint's connection. It returns why it ended.
func (s *Sidecar) join(ses *session, c *cluster, e *reached, client, server net.Conn) string {
	s.sessions.reached(ses, server, c, e)
	c.active.Add(1)
	defer func() {
		_ = server.Close() // whatever came of it, it ends here
		s.conns.remove(underlying(server))
		e.active.Add(-1)
		c.active.Add(-1)
	}()
	var wg sync.WaitGroup
	var inErr error
	wg.Go(func() {
		inErr = forward(server, client, &c.in, &e.in, &ses.in)
		endOf(server, client, inErr)
	})
	err := forward(client, server, &c.out, &e.out, &ses.out)
	endOf(client, server, err)
	wg.Wait()
	switch {
	case err == nil && inErr == nil:
		return gateway.CloseDone
	case s.conns.isClosed():
		return gateway.CloseStopped
	}
	return gateway.CloseReset
}

func underlying(c net.Conn) net.Conn {
	if tc, ok := c.(*tls.Conn); ok {
		return tc.NetConn()
	}
	return c
}

// endOf passes on that src has no more to say; after an error both are over.
func endOf(dst, src net.Conn, err error) {
	if err != nil {
		abort(dst)
		abort(src)
		return
	}
	if cw, ok := dst.(interface{ CloseWrite() error }); ok && cw.CloseWrite() == nil {
		return
	}
	_ = dst.Close() // it cannot be half closed
}

// abort closes a connection so that the peer learns that it did not end well.
func abort(c net.Conn) {
	if tc, ok := underlying(c).(*net.TCPConn); ok {
		_ = tc.SetLinger(0) // reset rather than an orderly end
	}
	_ = underlying(c).Close()
}

// buffers of the copies; 32 KiB holds two TLS records.
var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// forward copies until the end of src (nil) or an error, and adds what it writes
// to the counters.
func forward(dst io.Writer, src io.Reader, counters ...*atomic.Uint64) error {
	buf := buffers.Get().(*[32 << 10]byte) //nolint:forcetypeassert,errcheck // the pool holds nothing else
	defer buffers.Put(buf)
	for {
		r, rerr := src.Read(buf[:])
		if r > 0 {
			w, werr := dst.Write(buf[:r])
			for _, n := range counters {
				n.Add(uint64(w))
			}
			if werr != nil {
				return werr
			}
		}
		if errors.Is(rerr, io.EOF) {
			return nil
		}
		if rerr != nil {
			return rerr
		}
	}
}
