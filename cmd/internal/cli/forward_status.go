package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/agent/config"
	"github.com/sluicemesh/sluice/agent/telemetry"
	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/gateway/sni"
)

// standalone is a forwarder without an agent, and what it tells of itself: the same
// as an agent tells of a gateway.
type standalone struct {
	fw *sni.Forwarder

	// mu guards base and told.
	mu   sync.Mutex
	base gateway.ProxyStatus // what does not come of the forwarder
	told *gateway.Progress   // of the drain; nil while it is in use
}

func newStandalone(conf sni.Config, table *gateway.Table) *standalone {
	s := &standalone{fw: sni.New(conf)}
	s.uses(table)
	return s
}

// uses says which table is applied next.
func (s *standalone) uses(t *gateway.Table) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.base = gateway.ProxyStatus{
		ID: t.Proxy, Kind: t.Kind, Service: t.Service, DataPlane: gateway.DataPlaneBuiltin, State: gateway.PhaseServing,
		TableIndex: t.Index, TableAsOf: t.AsOf, Warnings: slices.Clone(t.Warnings),
	}
}

// keeps says why the table in use stays.
func (s *standalone) keeps(cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.base.State, s.base.Stale, s.base.Reason = gateway.PhaseStale, true, cause.Error()
}

func (s *standalone) id() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.base.ID
}

func (s *standalone) progress() *gateway.Progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.told
}

func (s *standalone) status() gateway.ProxyStatus {
	plane := s.fw.Status()
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.base
	st.Plane, st.Drain = &plane, s.told
	if !st.TableAsOf.IsZero() {
		st.Age = gateway.Duration(max(0, time.Since(st.TableAsOf)))
	}
	if plane.Applied == 0 {
		st.State, st.Reason = gateway.PhasePending, "the table is not in use yet"
	}
	return st
}

// ready tells why new connections should go elsewhere; nil when they need not.
func (s *standalone) ready() error {
	if p := s.progress(); p != nil {
		return fmt.Errorf("draining: %s", p.Phase)
	}
	st := s.fw.Status()
	if st.Applied == 0 {
		return errors.New("no table is in use yet")
	}
	return unbound(st)
}

// draining is the drain of a forwarder. A nil one has no news.
type draining struct {
	changed chan struct{} // what [standalone.progress] says
	cancel  context.CancelFunc
	ended   chan struct{}
}

func (d *draining) news() <-chan struct{} {
	if d == nil {
		return nil
	}
	return d.changed
}

// stop ends the drain, which must not be that of a forwarder that still runs: it
// would accept again.
func (d *draining) stop() {
	d.cancel()
	<-d.ended
}

// drain begins to take the forwarder out of use. It stays so until ctx ends.
func (s *standalone) drain(ctx context.Context, p gateway.Plan) *draining {
	d := &draining{changed: make(chan struct{}, 1), ended: make(chan struct{})}
	ctx, d.cancel = context.WithCancel(ctx)
	began := time.Now()
	tell := func(now gateway.Progress) {
		now.Since = began
		s.mu.Lock()
		s.told = &now
		s.mu.Unlock()
		select {
		case d.changed <- struct{}{}:
		default: // whoever takes what is there reads what is newest
		}
	}
	open := 0
	for _, l := range s.fw.Status().Listeners {
		open += int(l.Active)
	}
	tell(gateway.Progress{Phase: gateway.DrainWaiting, Open: open, ETA: began.Add(p.Wait + p.Timeout)})
	go func() {
		defer close(d.ended)
		wait := time.NewTimer(p.Wait)
		defer wait.Stop()
		select {
		case <-wait.C:
			_ = s.fw.Drain(ctx, p, tell) // an error is that it does not run, which Run tells
		case <-ctx.Done():
		}
	}()
	return d
}

// listed is how many connections are listed where nobody says how many.
const listed = 1000

// serve answers HTTP on an address, and reports metrics, until stop is called.
func (s *standalone) serve(addr string, logger hclog.Logger) (stop func(), err error) {
	tel, err := telemetry.Open(config.Telemetry{Prefix: "consul", DisableHostname: true, PrometheusRetention: time.Minute, FilterDefault: true}, false)
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		tel.Close()
		return nil, fmt.Errorf("answer HTTP: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", tel.Prometheus())
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, s.status()) })
	mux.HandleFunc("GET /connections", func(w http.ResponseWriter, r *http.Request) {
		n := listed
		if v := r.FormValue("limit"); v != "" {
			var err error
			if n, err = strconv.Atoi(v); err != nil || n < 1 {
				http.Error(w, fmt.Sprintf("limit %q is no number from 1", v), http.StatusBadRequest)
				return
			}
		}
		writeJSON(w, s.fw.Connections(n))
	})
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := s.ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 5 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 5 * time.Minute,
		ErrorLog: logger.Named("http").StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
	}
	reporter := gateway.Reporter{
		Status: func() []gateway.ProxyStatus { return []gateway.ProxyStatus{s.status()} },
		Sink:   tel.Sink(), Interval: telemetry.Interval,
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
			logger.Error("metrics and status cannot be had any more", "error", err)
		}
	})
	wg.Go(func() { _ = reporter.Run(ctx) }) // it returns none
	wg.Go(func() { _ = tel.Run(ctx) })      // nor does this
	return func() {
		cancel()
		_ = server.Close() // readers are cut off
		wg.Wait()
		tel.Close()
	}, nil
}

// writeJSON answers.
func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	enc := json.NewEncoder(w)
	enc.SetIndent("", "    ")
	_ = enc.Encode(v) // whoever asked has gone
}
