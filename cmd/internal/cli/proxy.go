package cli

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/gateway/sidecar"
	"github.com/sluicemesh/sluice/proxycfg"
)

// proxyFlags say which sidecar to run.
type proxyFlags struct {
	sidecarFor, proxyID          string
	service, listen, serviceAddr string
	upstreams                    upstreams
	register                     bool
	registerID, logLevel         string
}

func (e *env) proxyCommands() []*command {
	f := proxyFlags{}
	return []*command{{
		name: "connect proxy", http: true, synopsis: "Run a sidecar in the foreground",
		help: "Runs the built-in sidecar as a process of its own: that of a proxy which is\nregistered on the agent (-sidecar-for, -proxy-id), or one that the flags describe\n(-service). What it needs to know it asks of the agent.\n\n" +
			"An agent runs the proxies that are registered on it by itself, except those that\nhave data_plane = \"none\" in their config block.",
		flags: func(fs *flag.FlagSet) {
			f = proxyFlags{}
			fs.StringVar(&f.sidecarFor, "sidecar-for", os.Getenv("CONNECT_SIDECAR_FOR"), "`ID` of a service on the agent that has one registered sidecar")
			fs.StringVar(&f.proxyID, "proxy-id", os.Getenv("CONNECT_PROXY_ID"), "`ID` of a registered connect-proxy")
			fs.StringVar(&f.service, "service", "", "`name` of the service whose certificate to use; needs no registration")
			fs.Var(&f.upstreams, "upstream", "with -service: `NAME[?dc=DC]:[ADDRESS:]PORT`, a service and the local port that leads to it; may be repeated")
			fs.StringVar(&f.listen, "listen", "", "with -service: `address:port` that accepts mutual TLS for the service")
			fs.StringVar(&f.serviceAddr, "service-addr", "", "with -listen: `address:port` of the service itself")
			fs.BoolVar(&f.register, "register", false, "with -listen: register the proxy on the agent while it runs")
			fs.StringVar(&f.registerID, "register-id", "", "with -register: `suffix` of the proxy's ID, where there are several of one service")
			fs.StringVar(&f.logLevel, "log-level", "info", "`level` of the log on standard error: trace, debug, info, warn or error")
		},
		run: func(c *call) error { return f.run(c) },
	}}
}

// check tells what does not go together.
func (f *proxyFlags) check() error {
	n := 0
	for _, s := range []string{f.sidecarFor, f.proxyID, f.service} {
		if s != "" {
			n++
		}
	}
	switch {
	case n == 0:
		return usage("No proxy ID specified. One of -proxy-id, -sidecar-for or -service is required")
	case n > 1:
		return usage("-proxy-id, -sidecar-for and -service exclude each other")
	case f.service == "" && (len(f.upstreams) > 0 || f.listen != "" || f.serviceAddr != "" || f.register || f.registerID != ""):
		return usage("-upstream, -listen, -service-addr and -register describe a proxy of -service; a registered one has its own")
	case f.service != "" && f.listen == "" && len(f.upstreams) == 0:
		return usage("-service needs -listen or -upstream: there is nothing to do otherwise")
	case (f.listen == "") != (f.serviceAddr == ""):
		return usage("-listen and -service-addr need each other")
	case f.register && f.listen == "":
		return usage("-register needs -listen: others connect there")
	case f.registerID != "" && !f.register:
		return usage("-register-id needs -register")
	}
	return nil
}

func (f *proxyFlags) run(c *call) error {
	if err := f.check(); err != nil {
		return err
	}
	if c.conn.dc != "" {
		return usage("-datacenter does not go with a proxy, which is part of its agent's; an upstream's is said by NAME?dc=DC")
	}
	logger, err := c.logger("proxy", f.logLevel, false)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	client, conf, err := c.connect()
	if err != nil {
		return err
	}
	self, err := readSelf(client)
	if err != nil {
		return err
	}
	p := &foreground{client: client, logger: logger, outward: f.service == "" || f.listen != "", changed: make(chan struct{})}
	p.proxy = proxycfg.Proxy{Node: self.node, Datacenter: self.datacenter, DefaultAllow: self.defaultAllow}
	if f.service != "" {
		reg, err := f.describe()
		if err != nil {
			return err
		}
		p.proxy.Service = reg
		if f.register {
			p.registration = registrationOf(reg)
		}
	} else {
		reg, err := registered(client, f.sidecarFor, f.proxyID)
		if err != nil {
			return err
		}
		if err := refuseTwin(ctx, client, reg.ID); err != nil {
			if ctx.Err() != nil {
				return nil // it was interrupted
			}
			return err
		}
		p.follow = reg.ID
		p.proxy.Service = runHere(reg)
	}
	destination, ok := catalog.DestinationOf(p.proxy.Service)
	if !ok {
		return fmt.Errorf("proxy %q names no destination service", p.proxy.Service.ID)
	}
	p.source = newSource(sourceConfig{
		client: client, transport: newTransport(conf), datacenter: self.datacenter, service: destination, logger: logger,
	})
	p.announce(c, destination)
	if err := p.run(ctx); err != nil {
		return err
	}
	fmt.Fprintln(c.out, "==> Sluice proxy stopped")
	return nil
}

// describe makes the registration of a proxy that is not registered.
func (f *proxyFlags) describe() (*catalog.Service, error) {
	id := f.service + "-proxy"
	if f.registerID != "" {
		id += "-" + f.registerID
	}
	s := &catalog.Service{
		Kind: catalog.KindConnectProxy, ID: id, Service: f.service + "-proxy",
		Proxy: &api.AgentServiceConnectProxyConfig{
			DestinationServiceName: f.service, Upstreams: f.upstreams, Config: map[string]any{},
		},
	}
	if f.listen != "" {
		host, port, err := hostPort("-listen", f.listen)
		if err != nil {
			return nil, err
		}
		s.Address, s.Port = host, port
		if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
			// It listens everywhere; where to connect to is the node's address.
			s.Address, s.Proxy.Config["bind_address"] = "", host
		}
		if host, port, err = hostPort("-service-addr", f.serviceAddr); err != nil {
			return nil, err
		}
		s.Proxy.LocalServiceAddress, s.Proxy.LocalServicePort = cmp.Or(host, "127.0.0.1"), port
	}
	return runHere(s), nil
}

func hostPort(flag, s string) (string, int, error) {
	host, p, err := net.SplitHostPort(s)
	if err != nil {
		return "", 0, usage("%s %q is not of the form address:port", flag, s)
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil || port == 0 {
		return "", 0, usage("%s %q has no port from 1 to 65535", flag, s)
	}
	return host, int(port), nil
}

// runHere returns a copy of a registration that has this process's data plane:
// what the original says of it is for the agent.
func runHere(s *catalog.Service) *catalog.Service {
	out, proxy := *s, *s.Proxy
	proxy.Config = maps.Clone(proxy.Config)
	if proxy.Config == nil {
		proxy.Config = map[string]any{}
	}
	proxy.Config["data_plane"] = gateway.DataPlaneBuiltin
	out.Proxy = &proxy
	return &out
}

// registrationOf is how the agent is to know of a proxy that runs here.
func registrationOf(s *catalog.Service) *api.AgentServiceRegistration {
	proxy := *s.Proxy
	proxy.Config = maps.Clone(proxy.Config)
	proxy.Config["data_plane"] = gateway.DataPlaneNone
	host, _ := proxy.Config["bind_address"].(string)
	if host == "" {
		host = s.Address
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return &api.AgentServiceRegistration{
		Kind: s.Kind, ID: s.ID, Name: s.Service, Address: s.Address, Port: s.Port, Proxy: &proxy,
		Check: &api.AgentServiceCheck{
			Name: "proxy listening", TCP: net.JoinHostPort(host, strconv.Itoa(s.Port)), Interval: "10s",
			// It is registered when it listens, so there is nothing to wait for.
			Status: api.HealthPassing,
			// What a killed process could not take back.
			DeregisterCriticalServiceAfter: "1h",
		},
	}
}

// registered finds the proxy on the agent that the flags name.
func registered(client *api.Client, sidecarFor, id string) (*catalog.Service, error) {
	services, err := client.Agent().Services()
	if err != nil {
		return nil, fmt.Errorf("list services of the agent: %w", err)
	}
	if id != "" {
		s := services[id]
		switch {
		case s == nil:
			return nil, fmt.Errorf("No proxy registered with ID %s", id) //nolint:staticcheck // in Consul's manner
		case s.Kind != catalog.KindConnectProxy:
			return nil, fmt.Errorf("service %q is of kind %q, not a connect-proxy", id, s.Kind)
		}
		return withProxy(s)
	}
	var ids []string
	for _, s := range services {
		if s.Kind == catalog.KindConnectProxy && s.Proxy != nil && s.Proxy.DestinationServiceID == sidecarFor {
			ids = append(ids, s.ID)
		}
	}
	slices.Sort(ids)
	switch len(ids) {
	case 0:
		return nil, fmt.Errorf("No sidecar proxy registered for %s", sidecarFor) //nolint:staticcheck // Consul's text
	case 1:
		return withProxy(services[ids[0]])
	}
	return nil, hinted{
		fmt.Errorf("More than one sidecar proxy registered for %s: %s", sidecarFor, strings.Join(ids, ", ")), //nolint:staticcheck // in Consul's manner
		"-proxy-id says which",
	}
}

func withProxy(s *catalog.Service) (*catalog.Service, error) {
	if s.Proxy == nil {
		return nil, fmt.Errorf("the agent tells nothing of what proxy %q does", s.ID)
	}
	return s, nil
}

// refuseTwin refuses to run a proxy that the agent runs: both would want the
// same addresses.
func refuseTwin(ctx context.Context, client *api.Client, id string) error {
	const patience = 3 * time.Second
	var st struct{ DataPlane, State string }
	for deadline, wait := time.Now().Add(patience), 50*time.Millisecond; ; wait = pause(ctx, wait) {
		_, err := client.Raw().Query("/v1/agent/proxy/"+url.PathEscape(id), &st, new(api.QueryOptions).WithContext(ctx))
		var se api.StatusError
		switch {
		case errors.As(err, &se) && se.Code == 404:
			return nil // nobody runs it (yet), or the agent is Consul's, which runs none
		case err != nil:
			return fmt.Errorf("ask the agent who runs proxy %q: %w", id, err)
		case st.DataPlane == "" || st.DataPlane == gateway.DataPlaneNone:
			return nil
		}
		// Who runs it may be said by proxy-defaults, which the agent has not read yet.
		if gateway.Phase(st.State) != gateway.PhasePending || time.Now().After(deadline) {
			break
		}
	}
	return hinted{
		fmt.Errorf("the agent runs proxy %q itself (data plane %q)", id, st.DataPlane),
		`set data_plane = "none" in the config block of the proxy's registration, and the agent leaves it to you`,
	}
}

// self is what an agent says of itself.
type self struct {
	node         *catalog.Node
	datacenter   string
	defaultAllow bool
}

func readSelf(client *api.Client) (self, error) {
	info, err := client.Agent().Self()
	if err != nil {
		return self{}, fmt.Errorf("ask the agent about itself: %w", err)
	}
	text := func(section, key string) string {
		s, _ := info[section][key].(string)
		return s
	}
	s := self{
		datacenter: text("Config", "Datacenter"),
		node:       &catalog.Node{ID: text("Config", "NodeID"), Node: text("Config", "NodeName"), Address: text("Member", "Addr")},
	}
	s.node.Datacenter = s.datacenter
	// An agent that does not say it leaves the default to be refusal.
	s.defaultAllow, _ = info["DebugConfig"]["ConnectDefaultAllow"].(bool)
	if s.datacenter == "" || s.node.Node == "" {
		return self{}, errors.New("ask the agent about itself: the answer names no datacenter or no node")
	}
	return s, nil
}

// foreground runs one sidecar in this process.
type foreground struct {
	client *api.Client
	logger hclog.Logger
	source *source
	// outward says that the proxy has a listener for others to connect to.
	outward bool
	// follow is the ID of the registration that is run; "" where there is none.
	follow string
	// registration is kept on the agent; nil registers nothing.
	registration *api.AgentServiceRegistration

	mu      sync.Mutex // guards what follows
	proxy   proxycfg.Proxy
	changed chan struct{} // closes when proxy is another
}

// proxies is what the manager is to build for.
func (p *foreground) proxies(ws memdb.WatchSet) []proxycfg.Proxy {
	p.mu.Lock()
	defer p.mu.Unlock()
	ws.Add(p.changed)
	return []proxycfg.Proxy{p.proxy}
}

func (p *foreground) announce(c *call, destination catalog.ServiceName) {
	s := p.proxy.Service
	fmt.Fprintln(c.out, "==> Sluice proxy starting...")
	rows := [][2]string{{"Service", destination.String()}, {"Proxy ID", s.ID}, {"Datacenter", p.proxy.Datacenter}}
	if p.outward {
		conf := func(key string) string {
			if v, ok := s.Proxy.Config[key]; ok {
				return fmt.Sprint(v)
			}
			return ""
		}
		listen := net.JoinHostPort(cmp.Or(conf("bind_address"), s.Address, "0.0.0.0"), cmp.Or(conf("bind_port"), strconv.Itoa(s.Port)))
		rows = append(rows, [2]string{"Public listener", fmt.Sprintf("%s => %s:%d", listen, cmp.Or(s.Proxy.LocalServiceAddress, "127.0.0.1"), s.Proxy.LocalServicePort)})
	}
	for _, u := range s.Proxy.Upstreams {
		at := u.LocalBindSocketPath
		if at == "" {
			at = net.JoinHostPort(cmp.Or(u.LocalBindAddress, "127.0.0.1"), strconv.Itoa(u.LocalBindPort))
		}
		rows = append(rows, [2]string{"Upstream", at + " => " + upstreamName(u)})
	}
	for _, r := range rows {
		fmt.Fprintf(c.out, "%16s: %s\n", r[0], r[1])
	}
	fmt.Fprintf(c.out, "\n==> Log data goes to standard error\n\n")
}

// run serves until ctx ends, and returns nil when everything has ended and what
// was registered is deregistered.
func (p *foreground) run(ctx context.Context) error {
	manager := proxycfg.NewManager(proxycfg.Config{Source: p.source, Proxies: p.proxies, Logger: p.logger})
	bound := make(chan struct{})
	runner, err := gateway.NewRunner(gateway.RunnerConfig{
		Latest: manager.Latest, Logger: p.logger,
		Factory: func(catalog.Kind, string, map[string]any) (gateway.DataPlane, error) {
			s := sidecar.New(sidecar.Config{Logger: p.logger.Named("sidecar")})
			if p.outward {
				return s, nil
			}
			return inward{s}, nil
		},
	})
	if err != nil {
		return err
	}
	parts := []func(context.Context) error{p.source.Run, p.followRegistration, manager.Run, runner.Run}
	if p.registration != nil {
		parts = append(parts, func(ctx context.Context) error { return p.keepRegistered(ctx, bound) })
	}
	parts = append(parts, func(ctx context.Context) error { return p.tell(ctx, manager, runner, bound) })
	// None of them ends before ctx does, nor with an error.
	var wg sync.WaitGroup
	errs := make([]error, len(parts))
	for i, part := range parts {
		wg.Go(func() { errs[i] = part(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// inward is a sidecar without the listener that others connect to.
type inward struct{ gateway.DataPlane }

// Apply implements [gateway.DataPlane].
func (p inward) Apply(t *gateway.Table) {
	out := *t
	out.Listeners = slices.DeleteFunc(slices.Clone(t.Listeners), func(l gateway.Listener) bool { return l.Mode == gateway.ListenInbound })
	p.DataPlane.Apply(&out)
}

// tell logs how the proxy is doing when that changes, and closes bound when its
// listeners have been bound for the first time.
func (p *foreground) tell(ctx context.Context, manager *proxycfg.Manager, runner *gateway.Runner, bound chan struct{}) error {
	// The data plane does not say when it has bound a listener.
	const look = 200 * time.Millisecond
	tick := time.NewTicker(look)
	defer tick.Stop()
	var said string
	ready := false
	for {
		for _, st := range runner.Status() {
			if !p.outward {
				// Nobody connects to it, so that it leads nowhere is no news.
				own := "service " + p.source.leaf.service.String() + ":"
				st.Warnings = slices.DeleteFunc(slices.Clone(st.Warnings), func(w string) bool { return strings.HasPrefix(w, own) })
			}
			if text := fmt.Sprint(st.State, st.Reason, st.Warnings); text != said {
				said = text
				log := p.logger.Warn
				if st.State == gateway.PhaseServing || st.State == gateway.PhasePending {
					log = p.logger.Info
				}
				log("proxy is "+string(st.State), "reason", st.Reason, "warnings", st.Warnings)
			}
			if !ready && st.Plane != nil && len(st.Plane.Listeners) > 0 &&
				!slices.ContainsFunc(st.Plane.Listeners, func(l gateway.ListenerStatus) bool { return !l.Bound }) {
				ready = true
				p.logger.Info("all listeners are open", "listeners", len(st.Plane.Listeners))
				close(bound)
			}
		}
		if ready {
			ws := memdb.NewWatchSet()
			manager.Latest(ws)
			_ = ws.WatchCtx(ctx) // that ctx has ended is seen below
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// followRegistration takes over what becomes of the registration that is run.
func (p *foreground) followRegistration(ctx context.Context) error {
	if p.follow == "" {
		return nil
	}
	hash, wait := "", minPause
	for ctx.Err() == nil {
		s, _, err := p.client.Agent().Service(p.follow, (&api.QueryOptions{WaitHash: hash, WaitTime: 5 * time.Minute}).WithContext(ctx))
		if err == nil {
			_, err = withProxy(s)
		}
		if err != nil {
			// The agent is away, or has been started again and knows nothing yet. What is
			// known stays good.
			if ctx.Err() == nil {
				p.logger.Warn("registration not read, going on with what is known of it", "proxy_id", p.follow, "error", err)
			}
			hash = ""
			wait = pause(ctx, wait)
			continue
		}
		wait = minPause
		if s.ContentHash == hash {
			continue
		}
		hash = s.ContentHash
		p.mu.Lock()
		p.proxy.Service = runHere(s)
		close(p.changed)
		p.changed = make(chan struct{})
		p.mu.Unlock()
	}
	return nil
}

// keepRegistered has the proxy registered from when it listens until ctx ends.
func (p *foreground) keepRegistered(ctx context.Context, bound <-chan struct{}) error {
	const look = 10 * time.Second
	select {
	case <-bound:
	case <-ctx.Done():
		return nil
	}
	tick := time.NewTicker(look)
	defer tick.Stop()
	id := p.registration.ID
	defer func() {
		const limit = 5 * time.Second
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
		defer cancel()
		if err := p.client.Agent().ServiceDeregisterOpts(id, new(api.QueryOptions).WithContext(ctx)); err != nil {
			p.logger.Warn("proxy not deregistered", "proxy_id", id, "error", err)
		}
	}()
	for {
		_, _, err := p.client.Agent().Service(id, new(api.QueryOptions).WithContext(ctx))
		var se api.StatusError
		if errors.As(err, &se) && se.Code == 404 {
			opts := api.ServiceRegisterOpts{}.WithContext(ctx)
			if err = p.client.Agent().ServiceRegisterOpts(p.registration, opts); err == nil {
				p.logger.Info("proxy registered", "proxy_id", id)
			}
		}
		if err != nil && ctx.Err() == nil {
			p.logger.Warn("proxy not registered, trying again", "proxy_id", id, "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// minPause and maxPause bound the time between attempts to ask an agent that
// does not answer.
const minPause, maxPause = 200 * time.Millisecond, 10 * time.Second

// pause waits for d or until ctx ends, and returns how long to wait next.
func pause(ctx context.Context, d time.Duration) time.Duration {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
	return min(2*d, maxPause)
}

// upstreams is the flag -upstream.
type upstreams []api.Upstream

// String implements [flag.Value].
func (l *upstreams) String() string {
	var out []string
	for _, u := range *l {
		at := strconv.Itoa(u.LocalBindPort)
		if u.LocalBindAddress != "" {
			at = net.JoinHostPort(u.LocalBindAddress, at)
		}
		out = append(out, upstreamName(u)+":"+at)
	}
	return strings.Join(out, ",")
}

// Set implements [flag.Value].
func (l *upstreams) Set(s string) error {
	u, err := parseUpstream(s)
	if err != nil {
		return err
	}
	for _, o := range *l {
		if o.LocalBindPort == u.LocalBindPort && cmp.Or(o.LocalBindAddress, "127.0.0.1") == cmp.Or(u.LocalBindAddress, "127.0.0.1") {
			return fmt.Errorf("upstreams %s and %s have the same local address", upstreamName(o), upstreamName(u))
		}
	}
	*l = append(*l, u)
	return nil
}

// upstreamName is NAME or NAME?dc=DC.
func upstreamName(u api.Upstream) string {
	if u.Datacenter != "" {
		return u.DestinationName + "?dc=" + u.Datacenter
	}
	return u.DestinationName
}

// parseUpstream reads NAME[?dc=DC]:[ADDRESS:]PORT.
func parseUpstream(s string) (api.Upstream, error) {
	who, at, ok := strings.Cut(s, ":")
	if !ok || who == "" {
		return api.Upstream{}, fmt.Errorf("%q is not of the form NAME[?dc=DC]:[ADDRESS:]PORT", s)
	}
	u := api.Upstream{DestinationType: api.UpstreamDestTypeService}
	var query string
	u.DestinationName, query, ok = strings.Cut(who, "?")
	if u.DestinationName == "" {
		return api.Upstream{}, fmt.Errorf("%q names no service", s)
	}
	if ok {
		params, err := url.ParseQuery(query)
		if err != nil {
			return api.Upstream{}, fmt.Errorf("%q: %w", s, err)
		}
		for key := range params {
			if key != "dc" {
				return api.Upstream{}, fmt.Errorf("%q: only dc can be said of an upstream, not %q", s, key)
			}
		}
		if u.Datacenter = params.Get("dc"); u.Datacenter == "" {
			return api.Upstream{}, fmt.Errorf("%q names no datacenter", s)
		}
	}
	port := at
	if strings.Contains(at, ":") {
		var err error
		if u.LocalBindAddress, port, err = net.SplitHostPort(at); err != nil {
			return api.Upstream{}, fmt.Errorf("%q: %w", s, err)
		}
		if net.ParseIP(u.LocalBindAddress) == nil {
			return api.Upstream{}, fmt.Errorf("%q: %q is no IP address", s, u.LocalBindAddress)
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return api.Upstream{}, fmt.Errorf("%q has no port from 1 to 65535", s)
	}
	u.LocalBindPort = int(n)
	return u, nil
}
