// Package agent is the composition root: it builds the parts of an agent from
// its configuration, runs them, reloads and stops them. It decides nothing that
// a part could decide.
//
// Everything depends on this package's imports and nothing but commands and
// tests may import it.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/check"
	"github.com/sluicemesh/sluice/agent/cluster"
	"github.com/sluicemesh/sluice/agent/config"
	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/agent/httpapi"
	"github.com/sluicemesh/sluice/agent/local"
	"github.com/sluicemesh/sluice/agent/telemetry"
	"github.com/sluicemesh/sluice/agent/view"
	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/gateway/sidecar"
	"github.com/sluicemesh/sluice/gateway/sni"
	"github.com/sluicemesh/sluice/proxycfg"
)

// Options of an agent.
type Options struct {
	// Config says where the configuration is; [Agent.Reload] reads it again.
	Config config.Options
	// Log is where the log goes; nil is standard output.
	Log io.Writer
	// Version and Revision are shown to clients and to other agents.
	Version, Revision string
	BuildDate         time.Time
}

// member is the agent's part in the cluster: a server's or a client's.
type member interface {
	httpapi.Cluster
	SetHandler(h http.Handler)
	Run(ctx context.Context) error
	Leave(ctx context.Context) error
}

// Agent is one agent, built and not yet running.
type Agent struct {
	opts Options
	log  hclog.InterceptLogger

	node      *catalog.Node
	member    member
	registry  *local.Registry
	checks    *check.Scheduler
	remote    *view.Remote
	source    proxycfg.Source
	leaves    *connect.LeafManager
	proxies   *proxycfg.Manager
	runner    *gateway.Runner
	reporter  *gateway.Reporter
	syncer    *local.Syncer
	central   *local.Central
	handler   *httpapi.Handler
	telemetry *telemetry.Telemetry
	listeners []boundListener
	logFile   *logFile
	lock      *os.File // of the data directory
	pidFile   string

	// stop ends Run, as asked for by the leave endpoint.
	stop func()

	// mu guards rt, which a reload replaces.
	mu sync.Mutex
	rt *config.Runtime
}

// New loads the configuration and builds the agent. Its HTTP listeners are bound
// on return, so that an address that is taken is an error here; nothing runs.
// Either [Agent.Run] or [Agent.Close] must be called.
func New(opts Options) (_ *Agent, err error) {
	rt, warnings, err := config.Load(opts.Config)
	if err != nil {
		return nil, err
	}
	a := &Agent{opts: opts, rt: rt, stop: func() {}}
	defer func() {
		if err != nil {
			a.Close()
		}
	}()
	if err := a.openLog(rt); err != nil {
		return nil, err
	}
	for _, w := range warnings {
		a.log.Warn(w.String())
	}
	if keys := withoutEffect(rt); len(keys) > 0 {
		a.log.Warn("these keys have no effect in this version", "keys", strings.Join(keys, ", "))
	}
	if rt.Node.DataDir != "" {
		if err := os.MkdirAll(rt.Node.DataDir, 0o700); err != nil {
			return nil, fmt.Errorf("open data directory: %w", err)
		}
		if a.lock, err = lockDataDir(rt.Node.DataDir); err != nil {
			return nil, err
		}
	}
	id, err := rt.Node.EnsureID()
	if err != nil {
		return nil, err
	}
	a.node = &catalog.Node{
		ID: id, Node: rt.Node.Name, Address: rt.Network.Advertise.String(), Datacenter: rt.Node.Datacenter,
		TaggedAddresses: rt.Network.TaggedAddresses, Meta: nodeMeta(rt, opts), Locality: rt.Node.Locality,
	}

	// Telemetry first: raft and serf report to the global sink from their start.
	if a.telemetry, err = telemetry.Open(rt.Telemetry, true); err != nil {
		return nil, err
	}
	if a.member, err = newMember(rt, id, opts, a.log); err != nil {
		return nil, err
	}

	// What this node is. The registry wants to tell the checks of TTL updates, and
	// the checks to tell the registry of results: one of the two is told late.
	a.registry, err = local.Open(local.Config{
		Node: a.node, Datacenter: rt.Node.Datacenter, DataDir: rt.Node.DataDir,
		SidecarMinPort: rt.Network.SidecarPorts.Min, SidecarMaxPort: rt.Network.SidecarPorts.Max,
		DeregisterCritical: rt.Connect.DeregisterCritical,
		CheckSupported:     check.Supported,
		Beat:               func(id string) { a.checks.Beat(id) },
		Logger:             a.log.Named("local"),
	})
	if err != nil {
		return nil, err
	}
	output := rt.Health.OutputMaxSize
	if rt.Health.DiscardOutput {
		output = -1
	}
	a.checks = check.New(check.Config{Update: a.registry.SetStatus, MaxOutput: output, Logger: a.log.Named("check")})
	if err := a.replaceFiles(rt); err != nil {
		return nil, err
	}
	if err := a.endDrains(); err != nil {
		return nil, err
	}

	// The API, and through it the agent's own requests to its servers.
	a.handler = httpapi.New(httpapi.Config{
		Cluster: a.member, Agent: (*node)(a), FromRPC: cluster.FromRPC,
		Datacenter: rt.Node.Datacenter, PrimaryDatacenter: rt.Node.PrimaryDatacenter,
		NodeName: rt.Node.Name, NodeID: id,
		Version: opts.Version, Revision: opts.Revision, BuildDate: opts.BuildDate,
		DebugConfig:      func() map[string]any { return debugConfig(a.runtime(), opts) },
		DefaultQueryTime: rt.HTTP.DefaultQueryTime, MaxQueryTime: rt.HTTP.MaxQueryTime,
		HoldTimeout: rt.Performance.RPCHold, NoConnect: !rt.Connect.Enabled, WANFederationViaGateways: rt.Cluster.MeshGatewayWANFederation,
		Dev: rt.HTTP.Pretty, ResponseHeaders: rt.HTTP.ResponseHeaders, BlockEndpoints: rt.HTTP.BlockEndpoints,
		AllowWriteFrom: rt.HTTP.AllowWriteFrom,
		Metrics:        a.telemetry.Display, Prometheus: a.telemetry.Prometheus(),
		Logger: a.log,
	})
	a.member.SetHandler(a.handler)
	inProcess := &http.Client{Transport: a.handler.Transport()}

	// What the proxies need to know, and from where. Certificates are made from the
	// roots that the source reads, and the source has the certificates: one of the
	// two finds the other late.
	a.leaves = connect.NewLeafManager(connect.LeafConfig{
		Signer: signer{inProcess}, Datacenter: rt.Node.Datacenter, Logger: a.log,
		Roots: func(ws memdb.WatchSet) (*connect.Roots, error) {
			roots, _, err := a.source.Roots(ws)
			return roots, err
		},
	})
	a.remote = view.NewRemote(view.RemoteConfig{Client: inProcess, Datacenter: rt.Node.Datacenter, Leaves: a.leaves, Logger: a.log})
	a.source = a.remote
	if server, ok := a.member.(*cluster.Server); ok {
		a.source = view.NewLocal(view.LocalConfig{
			Store: server.Store, LastContact: server.LastContact, Remote: a.remote, Leaves: a.leaves,
			Datacenter: rt.Node.Datacenter, Ready: server.CaughtUp(),
		})
	}
	a.central = &local.Central{Registry: a.registry, Entry: a.source.ConfigEntry, Logger: a.log.Named("local")}
	a.syncer = &local.Syncer{
		Registry: a.registry, Client: inProcess, Full: rt.Cluster.SyncInterval, OutputInterval: rt.Health.UpdateInterval,
		Nodes: func() int { return len(a.member.LANMembers()) }, Logger: a.log.Named("sync"),
	}

	// What runs the proxies.
	a.proxies = proxycfg.NewManager(proxycfg.Config{Source: a.source, Proxies: a.registeredProxies, Logger: a.log})
	keep := ""
	if rt.Node.DataDir != "" {
		keep = filepath.Join(rt.Node.DataDir, "tables")
	}
	a.runner, err = gateway.NewRunner(gateway.RunnerConfig{
		Latest: a.proxies.Latest, Factory: a.dataPlane, DataPlane: rt.DataPlane.Default, KeepDir: keep, Logger: a.log,
	})
	if err != nil {
		return nil, err
	}

	a.reporter = &gateway.Reporter{Status: a.runner.Status, Sink: a.telemetry.Sink(), Interval: telemetry.Interval}

	if a.listeners, err = bindHTTP(rt); err != nil {
		return nil, err
	}
	if a.pidFile = rt.Log.PIDFile; a.pidFile != "" {
		if err := os.WriteFile(a.pidFile, fmt.Appendf(nil, "%d", os.Getpid()), 0o644); err != nil { //nolint:gosec // others may know it
			return nil, fmt.Errorf("write pid_file: %w", err)
		}
	}
	return a, nil
}

// Close gives up what New took hold of. It is for an agent that does not run;
// the end of Run does it by itself.
func (a *Agent) Close() {
	var errs []error
	for _, l := range a.listeners {
		if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	a.listeners = nil
	if a.telemetry != nil {
		a.telemetry.Close()
	}
	if a.pidFile != "" {
		errs = append(errs, os.Remove(a.pidFile))
		a.pidFile = ""
	}
	if a.lock != nil {
		errs = append(errs, a.lock.Close())
		a.lock = nil
	}
	if err := errors.Join(errs...); err != nil {
		a.log.Warn("agent not closed cleanly", "error", err)
	}
	if a.logFile != nil {
		_ = a.logFile.Close() // there is no log left to tell of it
		a.logFile = nil
	}
}

// HTTPAddrs returns the addresses that the API is served at.
func (a *Agent) HTTPAddrs() []string {
	var addrs []string
	for _, l := range a.listeners {
		addrs = append(addrs, l.Addr().String())
	}
	return addrs
}

// Runtime returns the configuration in use. It must not be changed.
func (a *Agent) Runtime() *config.Runtime { return a.runtime() }

func (a *Agent) runtime() *config.Runtime {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.rt
}

// replaceFiles registers the services and checks of the configuration's files.
func (a *Agent) replaceFiles(rt *config.Runtime) error {
	var defs []*catalog.Definition
	for _, s := range rt.Services {
		defs = append(defs, catalog.CloneDefinition(&s.Definition))
	}
	var checks []catalog.CheckSpec
	for _, c := range rt.Checks {
		id := c.Definition.CheckID
		if id == "" {
			id = c.Definition.Name
		}
		checks = append(checks, catalog.CheckSpec{
			CheckID: id, Name: c.Definition.Name, Notes: c.Definition.Notes, ServiceID: c.ServiceID,
			Status: c.Definition.Status, Def: c.Definition,
		})
	}
	return a.registry.ReplaceFiles(defs, checks)
}

// registeredProxies returns what the data planes are to be run for.
func (a *Agent) registeredProxies(ws memdb.WatchSet) []proxycfg.Proxy {
	rt := a.runtime()
	var out []proxycfg.Proxy
	for _, s := range a.registry.Services(ws) {
		switch s.Registered.Kind {
		case api.ServiceKindConnectProxy, api.ServiceKindMeshGateway:
			out = append(out, proxycfg.Proxy{
				Service: s.Registered, Node: a.node, Datacenter: rt.Node.Datacenter, Token: s.Token,
				DefaultAllow: rt.Connect.DefaultAllow, Domain: strings.TrimSuffix(rt.Node.Domain, "."),
			})
		}
	}
	return out
}

// dataPlane makes the data plane of a proxy.
func (a *Agent) dataPlane(kind catalog.Kind, id string, conf map[string]any) (gateway.DataPlane, error) {
	if name, _ := conf["data_plane"].(string); name != gateway.DataPlaneBuiltin {
		return nil, fmt.Errorf("data_plane %q is not one this agent has: it can be %q or %q", name, gateway.DataPlaneBuiltin, gateway.DataPlaneNone)
	}
	log := a.log.With("proxy_id", id)
	switch kind {
	case api.ServiceKindMeshGateway:
		return sni.New(sni.Config{Engine: a.runtime().DataPlane.Engine, AccessLog: a.accessLog(log), Logger: log}), nil
	case api.ServiceKindConnectProxy:
		return sidecar.New(sidecar.Config{AccessLog: a.accessLog(log), Logger: log.Named("sidecar")}), nil
	}
	return nil, fmt.Errorf("there is no built-in data plane for services of kind %q", kind)
}
