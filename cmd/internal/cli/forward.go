package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/gateway/sni"
)

// forwarding is what the flags of forward say.
type forwarding struct {
	listen                           list
	routes, table, metrics, logLevel string
	logJSON                          bool
	sample                           float64 // of the access log
	drain                            gateway.Plan
	conf                             sni.Config

	generation uint64
}

func (e *env) forwardCommands() []*command {
	f := forwarding{}
	return []*command{{
		name: "forward", synopsis: "Forward TLS connections by server name, without an agent",
		help: "Listens, reads the server name that a TLS client asks for, and forwards the\nbytes undecrypted: by a routes file, or by a forwarding table that was saved from\n/v1/agent/proxy/ID/table, or both. SIGHUP reads the files again; one with errors\nchanges nothing.\n\n" +
			"A line of a routes file is \"name host:port\" or \"*.suffix host:port\"; the same\nname on several lines has several endpoints, and # begins a comment. With both\nfiles the routes are those of the routes file, and the table says the rest: where it\nhas a cluster of the name host:port (several joined by commas, in order), that is\nused.\n\n" +
			"With -drain-timeout SIGTERM closes the listeners, lets open connections finish,\nends those that are left then, and stops; a second signal does not wait. SIGINT,\nand SIGTERM without it, stop at once.",
		flags: func(fs *flag.FlagSet) {
			f = forwarding{}
			fs.Var(&f.listen, "listen", "`ip:port` to listen on, or :port; may be repeated. With -table it replaces the table's own")
			fs.StringVar(&f.routes, "routes", "", "`file` of routes")
			fs.StringVar(&f.table, "table", "", "`file` with a saved forwarding table (JSON)")
			fs.StringVar(&f.conf.Engine, "engine", sni.EngineAuto, "`engine` that moves the bytes: auto, epoll or netpoll")
			fs.DurationVar(&f.conf.HelloTimeout, "hello-timeout", 5*time.Second, "`time` that a client has to send its ClientHello")
			fs.DurationVar(&f.conf.IdleTimeout, "idle-timeout", 0, "`time` after which a connection on which no byte moved is ended; 0 is never. What a table says goes before")
			fs.IntVar(&f.conf.ConnectAttempts, "connect-attempts", 4, "`number` of addresses of endpoints that are tried for a connection")
			fs.StringVar(&f.metrics, "metrics", "", "`ip:port` to answer HTTP on: /metrics for Prometheus, /status, /connections and /ready. Whoever reaches it may read it")
			fs.Float64Var(&f.sample, "access-log", 0, "`part` of the connections, from 0 to 1, that have a line on standard error at their end")
			fs.DurationVar(&f.drain.Wait, "drain-wait", 0, "`time` from SIGTERM to closing the listeners, in which /ready says 503 already")
			fs.DurationVar(&f.drain.Timeout, "drain-timeout", 0, "`time` that open connections have to finish after SIGTERM")
			fs.Float64Var(&f.drain.Rate, "drain-rate", 50, "`number` of the rest that are ended per second; 0 is all at once")
			fs.StringVar(&f.logLevel, "log-level", "info", "`level` of the log on standard error: trace, debug, info, warn or error; at trace there is a line per connection")
			fs.BoolVar(&f.logJSON, "log-json", false, "log in JSON")
		},
		run: func(c *call) error { return f.run(c) },
	}}
}

// check tells what is wrong with the flags.
func (f *forwarding) check() error {
	switch {
	case f.routes == "" && f.table == "":
		return usage("give -routes or -table")
	case f.table == "" && len(f.listen) == 0:
		return usage("-listen says where to listen")
	case !(f.sample >= 0 && f.sample <= 1):
		return usage("-access-log %v is not from 0 to 1", f.sample)
	case f.drain.Wait < 0 || f.drain.Timeout < 0:
		return usage("-drain-wait and -drain-timeout are not negative")
	case !(f.drain.Rate >= 0 && f.drain.Rate <= 1e6):
		return usage("-drain-rate %v is not from 0 to 1000000", f.drain.Rate)
	}
	for _, addr := range f.listen {
		if _, err := netip.ParseAddrPort(addr); err != nil {
			if _, err := netip.ParseAddrPort("[::]" + addr); err != nil {
				return usage("-listen %q is neither ip:port nor :port", addr)
			}
		}
	}
	return f.conf.Validate()
}

func (f *forwarding) run(c *call) error {
	if err := f.check(); err != nil {
		return err
	}
	logger, err := c.logger("forward", f.logLevel, f.logJSON)
	if err != nil {
		return err
	}
	f.conf.Logger = logger
	if f.sample > 0 {
		// Whoever asks for these lines gets them, whatever the level of the others.
		lines, err := c.logger("forward.access", "info", f.logJSON)
		if err != nil {
			return err
		}
		f.conf.AccessLog = &gateway.AccessLog{Logger: lines, Sample: f.sample}
	}
	table, err := f.read()
	if err != nil {
		return err
	}

	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)

	s := newStandalone(f.conf, table)
	if f.metrics != "" {
		stop, err := s.serve(f.metrics, logger)
		if err != nil {
			return err
		}
		defer stop()
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.fw.Apply(table)
	ended := make(chan error, 1)
	go func() { ended <- s.fw.Run(ctx) }()
	stop := func(err error) error {
		cancel()
		return cmp.Or(err, <-ended)
	}
	// An address that is taken is retried later on, but at the start it is a mistake
	// that somebody is there to see.
	for changed := s.fw.Changed(); s.fw.Status().Applied == 0; changed = s.fw.Changed() {
		select {
		case <-changed:
		case err := <-ended:
			return err
		case <-signals:
			return stop(nil)
		}
	}
	if err := unbound(s.fw.Status()); err != nil {
		return stop(err)
	}
	for _, l := range s.fw.Status().Listeners {
		fmt.Fprintf(c.out, "Forwarding on %s (%s)\n", l.Address, counted(table))
	}
	release(&table)
	for drain := (*draining)(nil); ; {
		select {
		case err := <-ended:
			if err == nil {
				err = errors.New("the forwarder ended")
			}
			return err
		case <-drain.news():
			p := s.progress()
			fmt.Fprintln(c.out, progressLine(s.id(), p, time.Now()))
			if p.Phase == gateway.DrainDrained {
				return stop(nil)
			}
		case got := <-signals:
			switch {
			case got == syscall.SIGHUP:
				next, err := f.read()
				if err != nil {
					err = fmt.Errorf("reload: nothing was changed: %w", err)
					s.keeps(err)
					c.fail(err)
					continue
				}
				s.uses(next)
				s.fw.Apply(next)
				fmt.Fprintf(c.out, "Reloaded (%s)\n", counted(next))
			case got == syscall.SIGTERM && f.drain.Timeout > 0 && drain == nil:
				drain = s.drain(ctx, f.drain)
				defer drain.stop()
			default:
				return stop(nil)
			}
		}
	}
}

// read makes a table of the files that the flags name.
func (f *forwarding) read() (*gateway.Table, error) {
	t := sni.StaticTable(f.listen, &sni.Routes{})
	if f.table != "" {
		saved, err := f.readTable()
		if err != nil {
			return nil, fmt.Errorf("read table %s: %w", f.table, err)
		}
		if len(f.listen) > 0 {
			saved.Listeners = t.Listeners
		}
		if len(saved.Listeners) == 0 {
			return nil, fmt.Errorf("read table %s: it has no listeners; give -listen", f.table)
		}
		t = saved
	}
	if f.routes != "" {
		b, err := os.ReadFile(f.routes)
		if err != nil {
			return nil, fmt.Errorf("read routes: %w", err)
		}
		routes, err := sni.ParseRoutes(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.routes, err)
		}
		t.Routes = routes.Routes
		known := make(map[string]bool, len(t.Clusters))
		for i := range t.Clusters {
			known[t.Clusters[i].Name] = true
		}
		for i := range routes.Clusters {
			if c := &routes.Clusters[i]; !known[c.Name] {
				t.Clusters = append(t.Clusters, *c)
			}
		}
		slices.SortFunc(t.Clusters, func(a, b gateway.Cluster) int { return strings.Compare(a.Name, b.Name) })
		f.generation++
		t.Index = f.generation
	}
	if f.table != "" {
		if err := t.Check(); err != nil {
			return nil, fmt.Errorf("read table %s: %w", f.table, err)
		}
	}
	return t, nil
}

func (f *forwarding) readTable() (*gateway.Table, error) {
	b, err := os.ReadFile(f.table)
	if err != nil {
		return nil, err
	}
	t := new(gateway.Table)
	if err := json.Unmarshal(b, t); err != nil {
		return nil, err
	}
	if t.Kind != catalog.KindMeshGateway {
		return nil, hinted{
			fmt.Errorf("it is of a proxy of kind %q, and only a mesh gateway's forwards by server name", t.Kind),
			"a saved table has no private key: `sluice connect proxy` runs a sidecar",
		}
	}
	t.Index = max(t.Index, 1) // none has been applied where it is 0
	return t, nil
}

// unbound tells which listeners could not be bound.
func unbound(st gateway.Status) error {
	var errs []error
	for _, l := range st.Listeners {
		if !l.Bound {
			errs = append(errs, fmt.Errorf("listen on %s: %s", l.Address, l.Error))
		}
	}
	return errors.Join(errs...)
}

// release lets go of a table that the forwarder has taken in. A large file leaves
// more behind from being read than the routes need, and a forwarder allocates so
// little that the system would not get it back for long. It is for the start: the
// collection that it forces takes processors from connections.
func release(t **gateway.Table) {
	*t = nil
	debug.FreeOSMemory()
}

func counted(t *gateway.Table) string {
	return fmt.Sprintf("%d routes, %d clusters", len(t.Routes), len(t.Clusters))
}

// logger returns a logger to standard error.
func (e *env) logger(name, level string, inJSON bool) (hclog.Logger, error) {
	l := hclog.LevelFromString(level)
	if l == hclog.NoLevel {
		return nil, usage("-log-level %q is none of trace, debug, info, warn and error", level)
	}
	return hclog.New(&hclog.LoggerOptions{Name: name, Level: l, Output: e.err, JSONFormat: inJSON}), nil
}

// list is a flag that may be repeated.
type list []string

// String implements [flag.Value].
func (l *list) String() string { return strings.Join(*l, ",") }

// Set implements [flag.Value].
func (l *list) Set(s string) error {
	*l = append(*l, s)
	return nil
}
