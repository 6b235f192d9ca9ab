package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/gateway/sni"
)

// forwarding is what the flags of forward say.
type forwarding struct {
	listen                          list
	routes, table, engine, logLevel string
	generation                      uint64
}

func (e *env) forwardCommands() []*command {
	f := forwarding{}
	return []*command{{
		name: "forward", synopsis: "Forward TLS connections by server name, without an agent",
		help: "Listens, reads the server name that a TLS client asks for, and forwards the\nbytes undecrypted: by a routes file, or by a forwarding table that was saved from\n/v1/agent/proxy/ID/table. SIGHUP reads the file again; one with errors changes\nnothing.\n\n" +
			"A line of a routes file is \"name host:port\" or \"*.suffix host:port\"; the same\nname on several lines has several endpoints, and # begins a comment.",
		flags: func(fs *flag.FlagSet) {
			f = forwarding{}
			fs.Var(&f.listen, "listen", "`ip:port` to listen on, or :port; may be repeated. With -table it replaces the table's own")
			fs.StringVar(&f.routes, "routes", "", "`file` of routes")
			fs.StringVar(&f.table, "table", "", "`file` with a saved forwarding table (JSON)")
			fs.StringVar(&f.engine, "engine", sni.EngineAuto, "`engine` that moves the bytes: auto, epoll or netpoll")
			fs.StringVar(&f.logLevel, "log-level", "info", "`level` of the log on standard error: trace, debug, info, warn or error; at trace there is a line per connection")
		},
		run: func(c *call) error { return f.run(c) },
	}}
}

func (f *forwarding) run(c *call) error {
	switch {
	case (f.routes == "") == (f.table == ""):
		return usage("give either -routes or -table")
	case f.routes != "" && len(f.listen) == 0:
		return usage("-listen says where to listen")
	}
	for _, addr := range f.listen {
		if _, err := netip.ParseAddrPort(addr); err != nil {
			if _, err := netip.ParseAddrPort("[::]" + addr); err != nil {
				return usage("-listen %q is neither ip:port nor :port", addr)
			}
		}
	}
	logger, err := c.logger("forward", f.logLevel)
	if err != nil {
		return err
	}
	conf := sni.Config{Engine: f.engine, Logger: logger}
	if err := conf.Validate(); err != nil {
		return err
	}
	table, err := f.read()
	if err != nil {
		return err
	}

	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)

	ctx, cancel := context.WithCancel(context.Background())
	fw := sni.New(conf)
	fw.Apply(table)
	ended := make(chan error, 1)
	go func() { ended <- fw.Run(ctx) }()
	stop := func(err error) error {
		cancel()
		if e := <-ended; err == nil {
			err = e
		}
		return err
	}
	// An address that is taken is retried later on, but at the start it is a mistake
	// that somebody is there to see.
	for changed := fw.Changed(); fw.Status().Applied == 0; changed = fw.Changed() {
		select {
		case <-changed:
		case err := <-ended:
			cancel()
			return err
		case <-signals:
			return stop(nil)
		}
	}
	if err := unbound(fw.Status()); err != nil {
		return stop(err)
	}
	for _, l := range fw.Status().Listeners {
		fmt.Fprintf(c.out, "Forwarding on %s (%s)\n", l.Address, counted(table))
	}
	release(&table)
	for {
		select {
		case err := <-ended:
			cancel()
			if err == nil {
				err = errors.New("the forwarder ended")
			}
			return err
		case s := <-signals:
			if s != syscall.SIGHUP {
				return stop(nil)
			}
			next, err := f.read()
			if err != nil {
				c.fail(fmt.Errorf("reload: nothing was changed: %w", err))
				continue
			}
			fw.Apply(next)
			fmt.Fprintf(c.out, "Reloaded (%s)\n", counted(next))
			release(&next)
		}
	}
}

// read makes a table of the file that the flags name.
func (f *forwarding) read() (*gateway.Table, error) {
	f.generation++
	if f.routes != "" {
		b, err := os.ReadFile(f.routes)
		if err != nil {
			return nil, fmt.Errorf("read routes: %w", err)
		}
		routes, err := sni.ParseRoutes(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.routes, err)
		}
		t := sni.StaticTable(f.listen, routes)
		t.Index = f.generation
		return t, nil
	}
	b, err := os.ReadFile(f.table)
	if err != nil {
		return nil, fmt.Errorf("read table: %w", err)
	}
	t := new(gateway.Table)
	if err := json.Unmarshal(b, t); err != nil {
		return nil, fmt.Errorf("read table %s: %w", f.table, err)
	}
	if t.Kind != catalog.KindMeshGateway {
		return nil, hinted{
			fmt.Errorf("read table %s: it is of a proxy of kind %q, and only a mesh gateway's forwards by server name", f.table, t.Kind),
			"a saved table has no private key: `sluice connect proxy` runs a sidecar",
		}
	}
	if len(f.listen) > 0 {
		t.Listeners = sni.StaticTable(f.listen, &sni.Routes{}).Listeners
	}
	if err := t.Check(); err != nil {
		return nil, fmt.Errorf("read table %s: %w", f.table, err)
	}
	if len(t.Listeners) == 0 {
		return nil, fmt.Errorf("read table %s: it has no listeners; give -listen", f.table)
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
// little that the system would not get it back for long.
func release(t **gateway.Table) {
	*t = nil
	debug.FreeOSMemory()
}

func counted(t *gateway.Table) string {
	return fmt.Sprintf("%d routes, %d clusters", len(t.Routes), len(t.Clusters))
}

// logger returns a logger to standard error.
func (e *env) logger(name, level string) (hclog.Logger, error) {
	l := hclog.LevelFromString(level)
	if l == hclog.NoLevel {
		return nil, usage("-log-level %q is none of trace, debug, info, warn and error", level)
	}
	return hclog.New(&hclog.LoggerOptions{Name: name, Level: l, Output: e.err}), nil
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
