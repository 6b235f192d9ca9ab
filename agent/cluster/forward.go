package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/sluicemesh/sluice/agent/state"
)

// transports keeps HTTP/2 connections to RPC ports, one transport per datacenter, since
// the name that a server's certificate must carry depends on it.
type transports struct {
	dialer *dialer

	mu    sync.Mutex
	byDC  map[string]*http.Transport // guarded by mu
	ended bool                       // guarded by mu
}

// dialError marks a request that certainly did not reach the server.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// dialTimeout bounds connecting and the TLS handshake.
const dialTimeout = 5 * time.Second

func (t *transports) get(dc string) (*http.Transport, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended {
		return nil, net.ErrClosed
	}
	if tr := t.byDC[dc]; tr != nil {
		return tr, nil
	}
	var p http.Protocols
	p.SetHTTP2(true)
	p.SetUnencryptedHTTP2(true)
	tr := &http.Transport{
		Protocols: &p,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			c, err := t.dialer.dial(ctx, address)
			if err != nil {
				return nil, &dialError{err}
			}
			return c, nil
		},
		DialTLSContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			c, err := t.dialer.dialTLS(ctx, address, dc, alpnHTTP2)
			if err != nil {
				return nil, &dialError{err}
			}
			return c, nil
		},
		// Bodies pass as they are.
		DisableCompression: true,
		IdleConnTimeout:    idleTimeout,
		HTTP2: &http.HTTP2Config{
			SendPingTimeout: pingAfter,
			PingTimeout:     pingTimeout,
			// Another connection beats waiting behind other requests' long polls.
			StrictMaxConcurrentRequests: false,
		},
	}
	if t.byDC == nil {
		t.byDC = map[string]*http.Transport{}
	}
	t.byDC[dc] = tr
	return tr, nil
}

// close fails requests under way and lets no new one start.
func (t *transports) close() {
	t.mu.Lock()
	t.ended = true
	byDC := t.byDC
	t.mu.Unlock()
	for _, tr := range byDC {
		tr.CloseIdleConnections()
	}
	t.dialer.conns.close()
}

// roundTrip sends r to one server.
func (t *transports) roundTrip(r *http.Request, to server) (*http.Response, error) {
	tr, err := t.get(to.dc)
	if err != nil {
		return nil, &dialError{err}
	}
	u := *r.URL
	u.Scheme, u.Host, u.User = "http", to.address, nil
	if t.dialer.tls != nil && to.useTLS {
		u.Scheme = "https"
	}
	out := &http.Request{
		Method: r.Method, URL: &u, Header: forwardHeader(r.Header),
		Body: r.Body, GetBody: r.GetBody, ContentLength: r.ContentLength,
		Trailer: r.Trailer,
	}
	return tr.RoundTrip(out.WithContext(r.Context()))
}

// forwardHeader copies h without what speaks of one connection only; HTTP/2
// refuses some of it.
func forwardHeader(h http.Header) http.Header {
	out := h.Clone()
	if out == nil {
		return http.Header{}
	}
	for _, k := range []string{
		"Connection", "Proxy-Connection", "Keep-Alive", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
	} {
		out.Del(k)
	}
	return out
}

// forwarder is a transport to one of several servers.
type forwarder struct {
	transports *transports
	// next returns the server to try, given those that failed this request so
	// far; an error when there is none (any more). It may wait.
	next func(ctx context.Context, failed []string) (server, error)
	// onFail tells of a server that could not be reached; may be nil.
	onFail func(server)
}

// maxRetryBody is how large a body may be for its request to be sent again.
const maxRetryBody = 1 << 20

// RoundTrip implements [http.RoundTripper]. A request is sent again, to another
// server, when it certainly did not arrive, or when it changes nothing.
func (f *forwarder) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx := r.Context()
	r, again, err := rewindable(r)
	if err != nil {
		return nil, err
	}
	var failed []string
	var last error
	for {
		to, err := f.next(ctx, failed)
		if err != nil {
			closeBody(r)
			if last != nil {
				err = fmt.Errorf("%w: %w", err, last)
			}
			return nil, err
		}
		if len(failed) > 0 && r.GetBody != nil {
			if r.Body, err = r.GetBody(); err != nil {
				return nil, fmt.Errorf("rewind request body: %w", err)
			}
		}
		resp, err := f.transports.roundTrip(r, to)
		if err == nil {
			return resp, nil
		}
		if f.onFail != nil && ctx.Err() == nil {
			f.onFail(to)
		}
		var notSent *dialError
		harmless := r.Method == http.MethodGet || r.Method == http.MethodHead || r.Method == http.MethodOptions
		if ctx.Err() != nil || !again || !(errors.As(err, &notSent) || harmless) {
			return nil, fmt.Errorf("forward request to %s: %w", to.address, err)
		}
		failed = append(failed, to.address)
		last = fmt.Errorf("forward request to %s: %w", to.address, err)
	}
}

// rewindable returns r, or a copy, whose body can be sent more than once; again
// is false when it is too large to be kept.
func rewindable(r *http.Request) (_ *http.Request, again bool, _ error) {
	if r.Body == nil || r.Body == http.NoBody {
		return r, true, nil
	}
	if r.GetBody != nil {
		return r, true, nil
	}
	if r.ContentLength > maxRetryBody {
		return r, false, nil
	}
	head, err := io.ReadAll(io.LimitReader(r.Body, maxRetryBody+1))
	if err != nil {
		closeBody(r)
		return nil, false, fmt.Errorf("read request body: %w", err)
	}
	c := *r
	if len(head) > maxRetryBody {
		c.Body = struct {
			io.Reader
			io.Closer
		}{io.MultiReader(bytes.NewReader(head), r.Body), r.Body}
		return &c, false, nil
	}
	closeBody(r)
	c.ContentLength = int64(len(head))
	c.GetBody = func() (io.ReadCloser, error) {
		if len(head) == 0 {
			return http.NoBody, nil
		}
		return io.NopCloser(bytes.NewReader(head)), nil
	}
	c.Body, _ = c.GetBody()
	return &c, true, nil
}

func closeBody(r *http.Request) {
	if r.Body != nil {
		_ = r.Body.Close()
	}
}

// oneOf returns a next function that goes through servers in order and says
// none, when all have failed.
func oneOf(servers []server, none error) func(context.Context, []string) (server, error) {
	return func(_ context.Context, failed []string) (server, error) {
		for _, s := range servers {
			if !slices.Contains(failed, s.address) {
				return s, nil
			}
		}
		return server{}, none
	}
}

// leaderWatch publishes who leads.
type leaderWatch struct {
	mu      sync.Mutex
	address string        // guarded by mu
	changed chan struct{} // guarded by mu; closed and replaced on change
}

func newLeaderWatch() *leaderWatch { return &leaderWatch{changed: make(chan struct{})} }

func (w *leaderWatch) set(address string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if address == w.address {
		return
	}
	w.address = address
	close(w.changed)
	w.changed = make(chan struct{})
}

func (w *leaderWatch) get() (string, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.address, w.changed
}

// await returns the leader's address as soon as there is one. While the leader
// is the one that could not be reached it waits a little for another, then
// lets it be tried once more, all until the deadline.
func (w *leaderWatch) await(ctx context.Context, deadline time.Time, failed bool) (string, error) {
	timeout := time.NewTimer(time.Until(deadline))
	defer timeout.Stop()
	var again <-chan time.Time
	if failed {
		t := time.NewTimer(250 * time.Millisecond)
		defer t.Stop()
		again = t.C
	}
	for {
		address, changed := w.get()
		if address != "" && !failed {
			return address, nil
		}
		select {
		case <-changed:
			failed = false
		case <-again:
			failed = false
		case <-timeout.C:
			return "", state.ErrNoLeader
		case <-ctx.Done():
			return "", fmt.Errorf("wait for leader: %w", context.Cause(ctx))
		}
	}
}
