package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

type rpcKey struct{}

// FromRPC tells whether a request arrived on the RPC port, from another agent,
// rather than over the HTTP API or in process.
func FromRPC(ctx context.Context) bool {
	from, _ := ctx.Value(rpcKey{}).(bool)
	return from
}

// Blocking queries last for minutes in which neither side has anything to say,
// so a peer that is gone is found by pings, not by timeouts on requests.
const (
	pingAfter   = 3 * time.Second
	pingTimeout = 3 * time.Second
	idleTimeout = 2 * time.Minute
	// Every watch of every agent behind a forwarding server is a stream.
	maxStreams = 100_000
)

// newHTTPServer serves h on the HTTP/2 side of the RPC port.
func newHTTPServer(h http.Handler, log hclog.Logger) *http.Server {
	var p http.Protocols
	p.SetHTTP2(true)
	p.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler:           h,
		Protocols:         &p,
		ReadHeaderTimeout: helloWithin,
		IdleTimeout:       2 * idleTimeout, // the client's end closes first
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: maxStreams,
			SendPingTimeout:      5 * pingAfter,
			PingTimeout:          pingTimeout,
		},
		ErrorLog: log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, rpcKey{}, true)
		},
	}
}

// dialer opens connections to RPC ports.
type dialer struct {
	network Network
	tls     *tls.Config // nil never uses TLS
	verify  bool        // demand the server's name
	domain  string
	conns   connSet
}

func newDialer(c *Config) *dialer {
	return &dialer{network: c.Network, tls: c.ClientTLS, verify: c.VerifyServerHostname, domain: c.Domain}
}

// dial connects in clear text.
func (d *dialer) dial(ctx context.Context, address string) (net.Conn, error) {
	c, err := d.network.Dial(ctx, address)
	if err != nil {
		return nil, err
	}
	return d.conns.add(c)
}

// tlsFor returns the configuration towards a server of that datacenter.
func (d *dialer) tlsFor(dc, alpn string) *tls.Config {
	c := d.tls.Clone()
	c.NextProtos = []string{alpn}
	c.ServerName = "server." + dc + "." + d.domain
	if d.verify || c.InsecureSkipVerify {
		return c
	}
	// Without verify_server_hostname any certificate of the mesh's authority
	// will do, whatever name it carries.
	c.InsecureSkipVerify = true
	c.VerifyConnection = func(s tls.ConnectionState) error {
		if len(s.PeerCertificates) == 0 {
			return errors.New("the server sent no certificate")
		}
		o := x509.VerifyOptions{Roots: d.tls.RootCAs, Intermediates: x509.NewCertPool()}
		for _, cert := range s.PeerCertificates[1:] {
			o.Intermediates.AddCert(cert)
		}
		_, err := s.PeerCertificates[0].Verify(o)
		return err
	}
	return c
}

// dialTLS connects and does the handshake.
func (d *dialer) dialTLS(ctx context.Context, address, dc, alpn string) (net.Conn, error) {
	c, err := d.dial(ctx, address)
	if err != nil {
		return nil, err
	}
	tc := tls.Client(c, d.tlsFor(dc, alpn))
	if err := tc.HandshakeContext(ctx); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("tls handshake with %s: %w", address, err)
	}
	return tc, nil
}

// dialRaft connects to raft on a server of this datacenter.
func (d *dialer) dialRaft(ctx context.Context, address, dc string) (net.Conn, error) {
	if d.tls != nil {
		return d.dialTLS(ctx, address, dc, alpnRaft)
	}
	c, err := d.dial(ctx, address)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		_ = c.SetWriteDeadline(deadline)
	}
	if _, err := c.Write([]byte{raftByte}); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("write to %s: %w", address, err)
	}
	_ = c.SetWriteDeadline(time.Time{})
	return c, nil
}

// Dial implements [raft.StreamLayer].
func (l *raftLayer) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return l.dial(ctx, string(address))
}

// rpc is the open RPC port of a server.
type rpc struct {
	mux  *mux
	http *http.Server
	gate gate
	end  context.CancelFunc
	wg   sync.WaitGroup
}

func newRPC(l net.Listener, c *Config, h http.Handler, log hclog.Logger) *rpc {
	r := &rpc{mux: newMux(l, c.ServerTLS, log.Named("rpc"))}
	r.http = newHTTPServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if !r.gate.enter() {
			http.Error(w, "server is shutting down", http.StatusServiceUnavailable)
			return
		}
		defer r.gate.leave()
		h.ServeHTTP(w, q)
	}), log.Named("rpc"))
	return r
}

// start serves until stop.
func (r *rpc) start(ctx context.Context) {
	// Requests outlive ctx until stop: a server that leaves still answers.
	ctx, r.end = context.WithCancel(context.WithoutCancel(ctx))
	r.http.BaseContext = func(net.Listener) context.Context { return ctx }
	r.wg.Go(r.mux.serve)
	r.wg.Go(func() { _ = r.http.Serve(r.mux.http) }) // always the listener's end
}

// stop ends every connection and request, and returns when all have ended.
func (r *rpc) stop() {
	r.end()
	_ = r.http.Close()
	r.mux.close()
	r.gate.close()
	r.wg.Wait()
}

// gate counts who is inside, so that closing can wait for them.
type gate struct {
	mu     sync.Mutex
	closed bool // guarded by mu
	wg     sync.WaitGroup
}

func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.wg.Add(1)
	return true
}

func (g *gate) leave() { g.wg.Done() }

func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.wg.Wait()
}
