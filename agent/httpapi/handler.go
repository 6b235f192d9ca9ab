package httpapi

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/state"
)

// The limits of a request.
const (
	// MaxBodyBytes bounds the body of a request; a larger one is answered 413.
	// Bodies are held in memory, so that a write can be sent again to a new leader.
	MaxBodyBytes = 8 << 20
	// MaxHeaderBytes bounds the header lines of a request; see [Handler.Server].
	MaxHeaderBytes = 64 << 10
	// gzipFrom is the size from which an answer is compressed.
	gzipFrom = 1400
)

// The defaults of [Config].
const (
	defaultQueryTime   = 300 * time.Second
	defaultMaxQuery    = 600 * time.Second
	defaultHoldTimeout = 7 * time.Second
)

// Config is what a [Handler] needs. Cluster, Agent, Datacenter and NodeName are
// required.
type Config struct {
	Cluster Cluster
	Agent   Agent
	// FromRPC says whether the request with this context came in on the RPC port,
	// from an agent that proved to be one; nil is never.
	FromRPC func(context.Context) bool

	Datacenter string
	// PrimaryDatacenter is where config entries, intentions and federation states
	// are written; "" is Datacenter.
	PrimaryDatacenter string
	NodeName, NodeID  string
	// Version is shown to clients, which compare it as a version of Consul.
	Version, Revision string
	BuildDate         time.Time
	// DebugConfig returns the flattened runtime configuration for /v1/agent/self,
	// secrets replaced; nil is none.
	DebugConfig func() map[string]any
	// GRPCPort and GRPCTLSPort are the xDS ports, -1 where disabled; 0 counts as -1.
	GRPCPort, GRPCTLSPort int

	// DefaultQueryTime is how long a blocking query without ?wait waits (0 is
	// 300 s) and MaxQueryTime the longest (0 is 600 s).
	DefaultQueryTime, MaxQueryTime time.Duration
	// HoldTimeout is how long a request waits for a leader (0 is 7 s).
	HoldTimeout time.Duration
	// NoConnect says that the mesh is turned off; its endpoints then say so.
	NoConnect bool
	// WANFederationViaGateways forbids to join the WAN by hand.
	WANFederationViaGateways bool

	// Dev indents every answer.
	Dev bool
	// ResponseHeaders are set on every answer first.
	ResponseHeaders map[string]string
	// BlockEndpoints are path prefixes answered 403 on the HTTP port.
	BlockEndpoints []string
	// AllowWriteFrom are the networks that may write on the HTTP port; empty is
	// every one. Requests over a unix socket are not restricted.
	AllowWriteFrom []netip.Prefix

	// Metrics returns the metrics of the last interval, in the form of go-metrics'
	// InmemSink.DisplayMetrics, which fits; nil is none.
	Metrics func(http.ResponseWriter, *http.Request) (any, error)
	// Prometheus serves the metrics in Prometheus' format; nil where disabled.
	Prometheus http.Handler

	// Logger is for what an answer cannot say; nil is none. One that is an
	// [hclog.InterceptLogger] is what /v1/agent/monitor streams.
	Logger hclog.Logger
}

// Validate returns all that is wrong with the configuration.
func (c *Config) Validate() error {
	var errs []error
	if c.Cluster == nil {
		errs = append(errs, errors.New("httpapi config: Cluster is not set"))
	}
	if c.Agent == nil {
		errs = append(errs, errors.New("httpapi config: Agent is not set"))
	}
	if c.Datacenter == "" {
		errs = append(errs, errors.New("httpapi config: Datacenter is empty"))
	}
	if c.NodeName == "" {
		errs = append(errs, errors.New("httpapi config: NodeName is empty"))
	}
	if c.DefaultQueryTime < 0 || c.MaxQueryTime < 0 || c.HoldTimeout < 0 {
		errs = append(errs, errors.New("httpapi config: a time is negative"))
	}
	return errors.Join(errs...)
}

// Handler serves the API. It is safe for concurrent use.
type Handler struct {
	cfg     Config
	cluster Cluster
	agent   Agent
	logger  hclog.Logger
	routes  *routeNode
	// inProcess counts the requests of Transport that are being served.
	inProcess sync.WaitGroup
}

// New returns a handler. It panics if the configuration is not valid, which
// [Config.Validate] says without a panic.
func New(cfg Config) *Handler {
	if err := cfg.Validate(); err != nil {
		panic(err)
	}
	if cfg.PrimaryDatacenter == "" {
		cfg.PrimaryDatacenter = cfg.Datacenter
	}
	if cfg.DefaultQueryTime == 0 {
		cfg.DefaultQueryTime = defaultQueryTime
	}
	if cfg.MaxQueryTime == 0 {
		cfg.MaxQueryTime = defaultMaxQuery
	}
	if cfg.HoldTimeout == 0 {
		cfg.HoldTimeout = defaultHoldTimeout
	}
	if cfg.GRPCPort == 0 {
		cfg.GRPCPort = -1
	}
	if cfg.GRPCTLSPort == 0 {
		cfg.GRPCTLSPort = -1
	}
	if cfg.FromRPC == nil {
		cfg.FromRPC = func(context.Context) bool { return false }
	}
	logger := cfg.Logger
	if logger == nil {
		logger = hclog.NewNullLogger()
	}
	return &Handler{
		cfg:     cfg,
		cluster: cfg.Cluster,
		agent:   cfg.Agent,
		logger:  logger.Named("http"),
		routes:  newRouteTree(routeTable),
	}
}

// Server returns an HTTP server for the handler with the limits that an agent's
// port needs. There is no limit on the time of an answer: queries block.
func (h *Handler) Server() *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    MaxHeaderBytes,
		ErrorLog:          h.logger.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
}

// call is one request on its way.
type call struct {
	h      *Handler
	w      http.ResponseWriter
	r      *http.Request
	route  *route
	params map[string]string
	query  url.Values
	body   []byte
	opts   options
	// inProcess: from this agent itself. peer: from another agent's RPC.
	inProcess, peer bool
	// until is when a blocking query ends, set when it first blocks.
	until time.Time
}

func (c *call) ctx() context.Context { return c.r.Context() }

// param returns a variable of the route's pattern.
func (c *call) param(name string) string { return c.params[name] }

// store returns the replicated state. A route that is not about the agent runs
// only where there is one.
func (c *call) store() *state.Store { return c.h.cluster.Store() }

// token returns the secret that the request was made with, "" if with none.
func (c *call) token() acl.Secret {
	if t := c.query.Get("token"); t != "" {
		return acl.Secret(t)
	}
	if t := c.r.Header.Get("X-Consul-Token"); t != "" {
		return acl.Secret(t)
	}
	scheme, t, ok := strings.Cut(strings.TrimSpace(c.r.Header.Get("Authorization")), " ")
	if ok && strings.EqualFold(scheme, "Bearer") {
		return acl.Secret(strings.TrimSpace(t))
	}
	return ""
}

// ServeHTTP implements [http.Handler].
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &call{h: h, w: w, r: r, inProcess: isInProcess(r.Context())}
	c.peer = !c.inProcess && h.cfg.FromRPC(r.Context())

	for k, v := range h.cfg.ResponseHeaders {
		w.Header().Set(k, v)
	}
	if !printable(r.URL.Path) {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	routes, params := h.routes.find(r.URL.Path)
	if routes == nil {
		h.serveUnknown(w, r)
		return
	}
	w.Header().Set("X-Consul-Default-ACL-Policy", "allow")
	w.Header().Add("Vary", "Accept-Encoding")
	c.params, c.query = params, r.URL.Query()

	value, err := c.admit(routes)
	if err == nil && c.route != nil {
		value, err = c.serve()
	}
	c.answer(value, err)
}

func (h *Handler) serveUnknown(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	switch {
	case r.URL.Path == "/":
		_, _ = io.WriteString(w, textNoUI)
	case strings.Contains(r.URL.Path, "/v1/"):
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, textUnknownPath+"\n")
	default:
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, textNotAPI+"\n")
	}
}

// admit does all that comes before the route's handler: it chooses the route by
// method, refuses what may not be asked, and reads the parameters and the body.
// Without an error and without a route, value is the whole answer.
func (c *call) admit(routes []*route) (value any, err error) {
	var (
		h       = c.h
		r       = c.r
		outside = !c.inProcess && !c.peer
		method  = r.Method
	)
	if outside && slices.ContainsFunc(h.cfg.BlockEndpoints, func(p string) bool { return strings.HasPrefix(r.URL.Path, p) }) {
		return nil, status(http.StatusForbidden, textBlocked)
	}
	if method == http.MethodOptions {
		c.w.Header().Set("Allow", allowed(routes))
		return raw{}, nil
	}
	if method == http.MethodHead {
		method = http.MethodGet
	}
	for _, route := range routes {
		if route.method == method {
			c.route = route
		}
	}
	if c.route == nil {
		c.w.Header().Set("Allow", allowed(routes))
		return nil, status(http.StatusMethodNotAllowed, "method %s not allowed", r.Method)
	}
	switch {
	case outside && method != http.MethodGet && !h.mayWrite(r.RemoteAddr):
		return nil, status(http.StatusForbidden, textRestricted)
	case outside && c.route.internal:
		return nil, status(http.StatusForbidden, "%s is served to agents only", r.URL.Path)
	case c.peer && c.route.scope == scopeAgent:
		return nil, status(http.StatusForbidden, "%s is not served to other agents", r.URL.Path)
	}
	if err := refuseTenancy(r.Header, c.query); err != nil {
		return nil, err
	}
	if c.opts, err = parseOptions(r, c.query, h.cfg); err != nil {
		return nil, err
	}
	if method != http.MethodGet {
		if c.body, err = readBody(c.w, r); err != nil {
			return nil, err
		}
	}
	if c.route.check != nil {
		return nil, c.route.check(c)
	}
	return nil, nil
}

// refuseTenancy refuses requests for another namespace or partition.
//
// COMPAT: Consul's free edition has neither. Sluice's names carry them, and the
// API refuses them until requests can.
func refuseTenancy(header http.Header, query url.Values) error {
	for _, t := range []struct{ header, param, text string }{
		{"X-Consul-Namespace", "ns", textNamespaces},
		{"X-Consul-Partition", "partition", textPartitions},
	} {
		if header.Get(t.header) != "" {
			return bad("Invalid header: %q - %s", t.header, t.text)
		}
	}
	for _, t := range []struct{ param, text string }{{"ns", textNamespaces}, {"partition", textPartitions}} {
		if query.Get(t.param) != "" {
			return bad("Invalid query parameter: %q - %s", t.param, t.text)
		}
	}
	return nil
}

// mayWrite says whether a client at this address may change anything.
func (h *Handler) mayWrite(remote string) bool {
	if len(h.cfg.AllowWriteFrom) == 0 || remote == "" || remote == "@" {
		return true
	}
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return false
	}
	ip = ip.Unmap().WithZone("")
	return slices.ContainsFunc(h.cfg.AllowWriteFrom, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// readBody reads the whole body, within the limit.
func readBody(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return nil, nil
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBodyBytes))
	if err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return nil, status(http.StatusRequestEntityTooLarge, textTooLarge, MaxBodyBytes)
		}
		return nil, bad("Request decode failed: %v", err)
	}
	return body, nil
}

func printable(path string) bool {
	return !strings.ContainsFunc(path, func(r rune) bool { return !unicode.IsPrint(r) })
}

// raw is an answer that is not JSON; its zero value has no body and no type.
type raw struct {
	code        int // 0 is 200
	contentType string
	body        []byte
}

// withStatus is a JSON answer with a code that is not 200.
type withStatus struct {
	code  int
	value any
}

// written says that the handler has answered.
type written struct{}

// answer writes the outcome of a request.
func (c *call) answer(value any, err error) {
	if err != nil {
		c.answerError(err)
		return
	}
	code := http.StatusOK
	if s, ok := value.(withStatus); ok {
		code, value = s.code, s.value
	}
	switch v := value.(type) {
	case written:
	case raw:
		if v.code != 0 {
			code = v.code
		}
		c.write(code, v.contentType, v.body)
	case nil:
		c.write(code, "application/json", nil)
	default:
		body, err := c.encode(v)
		if err != nil {
			c.answerError(fmt.Errorf("encode the answer: %w", err))
			return
		}
		c.write(code, "application/json", body)
	}
}

func (c *call) encode(v any) ([]byte, error) {
	_, pretty := c.query["pretty"]
	if !pretty && !c.h.cfg.Dev {
		return json.Marshal(v)
	}
	b, err := json.MarshalIndent(v, "", "    ")
	if pretty && err == nil {
		b = append(b, '\n')
	}
	return b, err
}

func (c *call) answerError(err error) {
	if errors.Is(err, errPassedOn) {
		return
	}
	if c.ctx().Err() != nil {
		// The client has gone, or this agent stops. An empty answer would read as
		// success where it still arrives.
		panic(http.ErrAbortHandler)
	}
	code, text, retry := answerTo(err)
	if retry && (c.peer || c.inProcess) {
		c.w.Header().Set(retryHeader, "1")
	}
	if e, ok := errors.AsType[*statusError](err); ok && e.reason != "" {
		c.w.Header().Set("X-Consul-Reason", e.reason)
	}
	if code >= 500 {
		level := hclog.Warn
		if c.peer || c.inProcess {
			level = hclog.Debug // who asked reports it
		}
		c.h.logger.Log(level, "request failed", "method", c.r.Method, "path", c.r.URL.Path, "peer_addr", c.r.RemoteAddr, "error", err)
	}
	c.write(code, "text/plain; charset=utf-8", []byte(text))
}

// write sends a whole answer, compressed where that pays and is accepted.
func (c *call) write(code int, contentType string, body []byte) {
	header := c.w.Header()
	if contentType != "" {
		header.Set("Content-Type", contentType)
	}
	if len(body) >= gzipFrom && acceptsGzip(c.r.Header) {
		var buf bytes.Buffer
		z := gzip.NewWriter(&buf)
		_, _ = z.Write(body) // to memory: cannot fail
		_ = z.Close()
		body = buf.Bytes()
		header.Set("Content-Encoding", "gzip")
	}
	header.Set("Content-Length", strconv.Itoa(len(body)))
	c.w.WriteHeader(code)
	if c.r.Method != http.MethodHead {
		_, _ = c.w.Write(body) // an error is the client's going away
	}
}

func acceptsGzip(header http.Header) bool {
	for _, line := range header.Values("Accept-Encoding") {
		for part := range strings.SplitSeq(line, ",") {
			name, q, _ := strings.Cut(strings.TrimSpace(part), ";")
			q = strings.ReplaceAll(q, " ", "")
			if strings.EqualFold(name, "gzip") && q != "q=0" && !strings.HasPrefix(q, "q=0.0") {
				return true
			}
		}
	}
	return false
}

// buildDate returns the build's date as clients read it.
func (h *Handler) buildDate() string { return h.cfg.BuildDate.UTC().Format(time.RFC3339) }

func (h *Handler) isServer() bool { return h.cluster.Store() != nil }
