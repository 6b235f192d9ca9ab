package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/config"
)

// part is something that runs as long as the agent does.
type part struct {
	name string
	run  func(context.Context) error
}

// parts returns what runs, in the order in which it starts; it stops in the
// opposite order, each part having ended before the one it depends on is told to.
func (a *Agent) parts() []part {
	return []part{
		// The cluster comes first and goes last: everything else asks it.
		{"cluster", a.member.Run},
		// Reads and certificates before those who wait for them.
		{"view", a.remote.Run},
		{"leaves", a.leaves.Run},
		// What this node has to say, before what is made of it.
		{"registry", a.registry.Run},
		{"checks", a.runChecks},
		{"central", a.central.Run},
		{"sync", a.syncer.Run},
		// The data planes get their last known good tables at once.
		{"proxycfg", a.proxies.Run},
		{"runner", a.runner.Run},
		// It reads what the data planes say, and reports once more before they stop.
		{"metrics", a.reporter.Run},
		{"runtime metrics", a.telemetry.Run},
		// The API is served from the moment there is something to answer with, and
		// is the first to stop: nothing new comes in while the rest goes.
		{"http", a.serveHTTP},
	}
}

// Run runs the agent until ctx ends, somebody asks it to leave, or a part fails
// for good; then everything has stopped, and every goroutine is gone. It may be
// called once.
func (a *Agent) Run(ctx context.Context) error {
	defer a.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a.mu.Lock()
	a.stop = cancel
	a.mu.Unlock()

	type running struct {
		part
		cancel context.CancelFunc
		done   chan error
	}
	var all []running
	failed := make(chan error, 1)
	for _, p := range a.parts() {
		// Parts do not end with ctx but one after the other, below.
		pctx, pcancel := context.WithCancel(context.WithoutCancel(ctx))
		r := running{p, pcancel, make(chan error, 1)}
		go func() {
			err := r.run(pctx)
			if pctx.Err() == nil {
				if err == nil {
					err = errors.New("ended by itself")
				}
				select {
				case failed <- fmt.Errorf("%s: %w", r.name, err):
				default: // the first failure is told
				}
			}
			r.done <- err
		}()
		all = append(all, r)
	}
	a.log.Info("Consul agent running!", "node", a.node.Node, "datacenter", a.node.Datacenter, "http", strings.Join(a.HTTPAddrs(), " "))

	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
		a.log.Error("agent stops", "error", err)
	}
	for _, r := range slices.Backward(all) {
		r.cancel()
		if e := <-r.done; e != nil && !errors.Is(e, context.Canceled) && err == nil {
			err = fmt.Errorf("stop %s: %w", r.name, e)
		}
	}
	a.handler.Wait()
	a.log.Info("agent stopped")
	return err
}

// runChecks runs the checks that the registry has.
func (a *Agent) runChecks(ctx context.Context) error {
	for ctx.Err() == nil {
		ws := memdb.NewWatchSet()
		a.checks.Set(ctx, a.registry.Definitions(ws))
		_ = ws.WatchCtx(ctx) // its end is the loop's
	}
	a.checks.Wait()
	return nil
}

// serveHTTP serves the API on every listener.
func (a *Agent) serveHTTP(ctx context.Context) error {
	rt := a.runtime()
	var wg sync.WaitGroup
	failed := make(chan error, len(a.listeners))
	var servers []*http.Server
	for _, l := range a.listeners {
		srv := a.handler.Server()
		srv.TLSConfig = l.tls
		if n := rt.HTTP.MaxHeaderBytes; n > 0 {
			srv.MaxHeaderBytes = n
		}
		if l.tls != nil { // the server bounds the handshake by the same time
			srv.ReadHeaderTimeout = min(srv.ReadHeaderTimeout, rt.Limits.HTTPSHandshake)
		}
		servers = append(servers, srv)
		wg.Go(func() {
			var err error
			if l.tls != nil {
				err = srv.ServeTLS(l, "", "")
			} else {
				err = srv.Serve(l)
			}
			if !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serve %s: %w", l.Addr(), err)
			}
		})
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	// Blocking queries would hold a graceful end up for minutes, and their clients
	// ask again; answers under way get a moment.
	const grace = 200 * time.Millisecond
	gctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	for _, srv := range servers {
		if srv.Shutdown(gctx) != nil {
			_ = srv.Close() // what is still open is cut
		}
	}
	wg.Wait()
	return err
}

// Reload reads the configuration again. It is checked as a whole before anything
// of it is used; what can change without a restart then does: the log level, and
// the services and checks of the files.
func (a *Agent) Reload(context.Context) error {
	rt, warnings, err := config.Load(a.opts.Config)
	if err != nil {
		return fmt.Errorf("reload: nothing was changed: %w", err)
	}
	for _, w := range warnings {
		a.log.Warn(w.String())
	}
	if names := needRestart(a.runtime(), rt); len(names) > 0 {
		a.log.Warn("some changes of the configuration take effect only after a restart", "sections", names)
	}
	if err := a.replaceFiles(rt); err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	a.log.SetLevel(hclog.LevelFromString(rt.Log.Level))
	a.mu.Lock()
	n := *a.rt
	n.Services, n.Checks, n.Log.Level = rt.Services, rt.Checks, rt.Log.Level
	a.rt = &n
	a.mu.Unlock()
	a.log.Info("configuration reloaded", "services", len(rt.Services), "checks", len(rt.Checks), "log_level", rt.Log.Level)
	return nil
}

// needRestart names the sections that differ and are not reloaded.
func needRestart(old, now *config.Runtime) []string {
	var names []string
	a, b := *old, *now
	a.Services, b.Services, a.Checks, b.Checks = nil, nil, nil, nil
	a.Log.Level, b.Log.Level = "", ""
	va, vb := reflect.ValueOf(a), reflect.ValueOf(b)
	for i := range va.NumField() {
		if !reflect.DeepEqual(va.Field(i).Interface(), vb.Field(i).Interface()) {
			names = append(names, va.Type().Field(i).Name)
		}
	}
	return names
}

// Leave leaves the cluster gracefully, and then ends Run.
func (a *Agent) Leave(ctx context.Context) error {
	err := a.member.Leave(ctx)
	a.mu.Lock()
	stop := a.stop
	a.mu.Unlock()
	stop()
	return err
}
