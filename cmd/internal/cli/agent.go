package cli

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/sluicemesh/sluice/agent"
	"github.com/sluicemesh/sluice/agent/config"
)

// version is the version of Sluice, and compat the version of Consul whose API
// it speaks: clients read the version of an agent as one of Consul.
const (
	version = "0.1.0"
	compat  = "1.21.4"
)

// revision is set by the linker.
var revision = ""

// revisionOf returns the revision this was built from, as far as it is known.
func revisionOf() string {
	if revision != "" {
		return revision
	}
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, s := range bi.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown"
}

func versionLine() string {
	return fmt.Sprintf("Sluice v%s (Consul API %s)\nRevision %s", version, compat, revisionOf())
}

func (e *env) agentCommands() []*command {
	var format string
	return []*command{
		{
			name: "agent", synopsis: "Run an agent",
			help: config.Usage(),
			raw:  e.runAgent,
		},
		{
			name: "validate", args: "FILE_OR_DIRECTORY...", synopsis: "Check configuration files and directories",
			help: "Reads configuration as an agent would, and reports everything that is wrong with it, by file and line. Nothing is started.",
			run: func(c *call) error {
				if len(c.args) == 0 {
					return usage("name at least one file or directory")
				}
				if err := config.Validate(c.args); err != nil {
					fmt.Fprintf(c.err, "Config validation failed: %v\n", err)
					return errSilent
				}
				fmt.Fprintln(c.out, "Configuration is valid!")
				return nil
			},
		},
		{
			name: "version", synopsis: "Print the version",
			flags: func(fs *flag.FlagSet) {
				fs.StringVar(&format, "format", "pretty", "`form` of the output: pretty or json")
			},
			run: func(c *call) error {
				switch format {
				case "pretty":
					fmt.Fprintln(c.out, versionLine())
				case "json":
					// Version is Consul's: test harnesses decide by it what an agent can do.
					b, err := json.MarshalIndent(map[string]string{
						"Version": compat, "Revision": revisionOf(), "HumanVersion": versionLine(), "SluiceVersion": version,
					}, "", "  ")
					if err != nil {
						return err
					}
					fmt.Fprintln(c.out, string(b))
				default:
					return usage("-format %q is neither pretty nor json", format)
				}
				return nil
			},
		},
	}
}

// runAgent runs an agent in the foreground.
func (e *env) runAgent(args []string) int {
	opts, err := config.ParseFlags(args, e.err)
	if err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return exitOK
		}
		fmt.Fprintf(e.err, "==> %v\n", err)
		return exitUsage
	}
	a, err := agent.New(agent.Options{Config: opts, Log: e.out, Version: compat, Revision: revisionOf()})
	if err != nil {
		fmt.Fprintf(e.err, "==> %v\n", err)
		return exitError
	}
	// From here on a signal is this agent's to answer.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)

	e.banner(a)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	code := exitOK
	for {
		select {
		case err := <-ended:
			if err != nil {
				fmt.Fprintf(e.err, "==> %v\n", err)
				return exitError
			}
			return code
		case s := <-signals:
			if s == syscall.SIGHUP {
				// What is wrong has been logged with the reason; the agent goes on.
				if err := a.Reload(ctx); err != nil {
					fmt.Fprintf(e.err, "==> %v\n", err)
				}
				continue
			}
			code = e.stop(a, s, signals, ended, cancel)
		}
	}
}

// stop ends the agent as its configuration says for the signal: a client agent
// leaves the cluster first, a server just stops. It returns the exit code.
func (e *env) stop(a *agent.Agent, s os.Signal, signals <-chan os.Signal, ended chan error, cancel context.CancelFunc) int {
	rt := a.Runtime()
	if s == syscall.SIGTERM && rt.DataPlane.DrainOnTerminate {
		fmt.Fprintf(e.out, "==> Caught signal: %v\n==> Draining gateways...\n", s)
		if !drain(a, signals) {
			cancel()
			return exitError
		}
	}
	graceful := s == syscall.SIGTERM && rt.Cluster.LeaveOnTerminate || s == os.Interrupt && !rt.Cluster.SkipLeaveOnInterrupt
	if !graceful {
		fmt.Fprintf(e.out, "==> Caught signal: %v\n==> Graceful shutdown disabled. Exiting\n", s)
		cancel()
		return exitError
	}
	fmt.Fprintf(e.out, "==> Caught signal: %v\n==> Gracefully shutting down agent...\n", s)
	const limit = 15 * time.Second
	ctx, done := context.WithTimeout(context.Background(), limit)
	defer done()
	left := make(chan error, 1)
	go func() { left <- a.Leave(ctx) }()
	select {
	case err := <-left:
		if err != nil {
			fmt.Fprintf(e.err, "==> leave: %v\n", err)
			cancel()
			return exitError
		}
		return exitOK
	case <-signals: // a second signal does not wait
	case <-ctx.Done():
	}
	cancel()
	return exitError
}

// drain drains the agent's gateways. It returns false when a second signal did not
// wait for that.
func drain(a *agent.Agent, signals <-chan os.Signal) bool {
	ctx, done := context.WithCancel(context.Background())
	defer done()
	drained := make(chan error, 1)
	go func() { drained <- a.Drain(ctx) }()
	select {
	case <-drained: //nolint:errcheck // the only error there is, is that of ctx
		return true
	case <-signals:
		done()
		<-drained //nolint:errcheck // the same
		return false
	}
}

// banner says what is starting.
func (e *env) banner(a *agent.Agent) {
	rt := a.Runtime()
	id := rt.Node.Name
	dataPlane := rt.DataPlane.Default
	fmt.Fprintf(e.out, "==> Starting Sluice agent...\n")
	for _, l := range [][2]string{
		{"Version", version + " (Consul API " + compat + ")"},
		{"Node name", id},
		{"Datacenter", fmt.Sprintf("%s (primary: %s)", rt.Node.Datacenter, rt.Node.PrimaryDatacenter)},
		{"Server", fmt.Sprintf("%v (bootstrap: %v)", rt.Cluster.Server, rt.Cluster.Bootstrap || rt.Cluster.BootstrapExpect == 1)},
		{"HTTP", strings.Join(a.HTTPAddrs(), ", ")},
		{"Cluster", fmt.Sprintf("%s (RPC: %d, LAN: %d, WAN: %d)", rt.Network.Advertise, rt.Network.RPC.Port(), rt.Network.SerfLAN.Port(), rt.Network.SerfWAN.Port())},
		{"Data plane", dataPlane},
	} {
		fmt.Fprintf(e.out, "%16s: %s\n", l[0], l[1])
	}
	fmt.Fprintf(e.out, "\n==> Log data will now stream in as it occurs:\n\n")
}
