// Package demo is a lab: two federated datacenters on loopback addresses, a
// service in each, and a request that goes from one to the other through both
// mesh gateways. The agents are processes of this same binary with configuration
// directories that stay to be read and changed.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"
)

// Options of a demo.
type Options struct {
	// Dir is where the configuration and data go; "" makes a temporary directory,
	// which is removed at the end.
	Dir string
	// Once ends after the first success instead of waiting for ctx to end.
	Once bool
	// Timeout bounds the start; 0 is 60 seconds.
	Timeout time.Duration
	// Binary is the sluice to run; "" is this process's own.
	Binary string
	Out    io.Writer
}

// site is a datacenter of the demo.
type site struct {
	name     string
	ip       string
	base     int // added to every port, where the datacenters share one address
	dir      string
	primary  string
	peer     *site
	app      string // name of the service
	appPort  int
	process  *exec.Cmd
	exited   chan error
	logPath  string
	upstream int
}

// Ports of a site, before base.
const (
	portHTTP, portRPC, portLAN, portWAN = 8500, 8300, 8301, 8302
	portGateway, portSidecar            = 8443, 21000
	portWeb, portAPI, portUpstream      = 8080, 9090, 9191
)

func (s *site) addr(port int) string   { return fmt.Sprintf("%s:%d", s.ip, port+s.base) }
func (s *site) url(path string) string { return "http://" + s.addr(portHTTP) + path }

// Run starts the demo and blocks until ctx ends or, with Once, the first request
// has come back. The error names the hop that is broken.
func Run(ctx context.Context, o Options) (err error) {
	if o.Timeout <= 0 {
		o.Timeout = time.Minute
	}
	if o.Binary == "" {
		if o.Binary, err = os.Executable(); err != nil {
			return fmt.Errorf("find this binary: %w", err)
		}
	}
	if o.Dir == "" {
		if o.Dir, err = os.MkdirTemp("", "sluice-demo-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.Dir)) }()
	}
	d := &demo{Options: o, start: time.Now()}
	defer func() { err = errors.Join(err, d.stop()) }()
	if err := d.layOut(); err != nil {
		return err
	}
	sctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	if err := d.up(sctx); err != nil {
		if ctx.Err() != nil {
			return nil // interrupted, which is no failure
		}
		return d.withLog(err)
	}
	path, err := d.await(sctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return d.withLog(err)
	}
	d.report(path)
	if o.Once {
		return nil
	}
	d.suggest()
	return d.watch(ctx)
}

// watch stays until ctx ends or no agent is left. One that ends, as whoever tries
// things may want, is told of with the command that starts it again.
func (d *demo) watch(ctx context.Context) error {
	one, two := d.dc1.exited, d.dc2.exited
	for one != nil || two != nil {
		var s *site
		var err error
		select {
		case <-ctx.Done():
			fmt.Fprintf(d.Out, "\nStopping both agents.\n")
			return nil
		case err = <-one:
			s, one = d.dc1, nil
		case err = <-two:
			s, two = d.dc2, nil
		}
		fmt.Fprintf(d.Out, "\nThe agent of %s ended: %v\n  start it again   %s agent -config-dir %s\n", s.name, orEnded(err), d.Binary, filepath.Join(s.dir, "config"))
	}
	return errors.New("both agents have ended")
}

func orEnded(err error) error {
	if err == nil {
		return errors.New("by itself")
	}
	return err
}

// demo is one run.
type demo struct {
	Options
	start    time.Time
	dc1, dc2 *site
	apps     []*http.Server
	wg       sync.WaitGroup
}

// step tells of progress.
func (d *demo) step(format string, args ...any) {
	fmt.Fprintf(d.Out, "%6.2fs  %s\n", time.Since(d.start).Seconds(), fmt.Sprintf(format, args...))
}

// layOut chooses addresses and writes the configuration directories.
func (d *demo) layOut() error {
	d.dc1 = &site{name: "dc1", ip: "127.0.11.1", app: "web", appPort: portWeb, upstream: portUpstream}
	d.dc2 = &site{name: "dc2", ip: "127.0.12.1", app: "api", appPort: portAPI}
	if runtime.GOOS != "linux" { // elsewhere loopback has one address
		d.dc1.ip, d.dc2.ip, d.dc2.base = "127.0.0.1", "127.0.0.1", 1000
	}
	d.dc1.peer, d.dc2.peer = d.dc2, d.dc1
	for _, s := range []*site{d.dc1, d.dc2} {
		s.primary = "dc1"
		s.dir = filepath.Join(d.Dir, s.name)
		s.logPath = filepath.Join(s.dir, "agent.log")
		for _, port := range []int{portHTTP, portRPC, portLAN, portWAN, portGateway, portSidecar, s.appPort} {
			l, err := net.Listen("tcp", s.addr(port)) //nolint:noctx // binding does not block
			if err != nil {
				return fmt.Errorf("address %s is not free (is another demo running?): %w", s.addr(port), err)
			}
			if err := l.Close(); err != nil {
				return err
			}
		}
		if err := s.write(); err != nil {
			return fmt.Errorf("write configuration of %s: %w", s.name, err)
		}
	}
	fmt.Fprintf(d.Out, "Two datacenters on this machine:\n\n")
	for _, s := range []*site{d.dc1, d.dc2} {
		fmt.Fprintf(d.Out, "  %s  service %-4s  HTTP API http://%s  gateway %s\n       configuration in %s\n", s.name, s.app, s.addr(portHTTP), s.addr(portGateway), filepath.Join(s.dir, "config"))
	}
	fmt.Fprintln(d.Out)
	return nil
}

// write writes the site's configuration directory.
func (s *site) write() error {
	files := map[string]string{"agent.hcl": fmt.Sprintf(`# An agent that is the one server of its datacenter.
node_name          = "%[1]s-server"
datacenter         = "%[1]s"
primary_datacenter = "%[2]s"
data_dir           = "%[3]s"
server             = true
bootstrap_expect   = 1

bind_addr   = "%[4]s"
client_addr = "%[4]s"
ports {
  http     = %[5]d
  server   = %[6]d
  serf_lan = %[7]d
  serf_wan = %[8]d
  sidecar_min_port = %[9]d
  sidecar_max_port = %[10]d
}

# The other datacenter's server: joining one is enough.
retry_join_wan = ["%[11]s"]

performance { raft_multiplier = 1 }
`, s.name, s.primary, filepath.Join(s.dir, "data"), s.ip, portHTTP+s.base, portRPC+s.base, portLAN+s.base, portWAN+s.base,
		portSidecar+s.base, portSidecar+s.base+255, s.peer.addr(portWAN)),

		"gateway.hcl": fmt.Sprintf(`# The mesh gateway. The agent runs it, by its built-in forwarder.
services {
  kind    = "mesh-gateway"
  name    = "mesh-gateway"
  address = "%[1]s"
  port    = %[2]d
  tagged_addresses {
    lan { address = "%[1]s" port = %[2]d }
    wan { address = "%[1]s" port = %[2]d }
  }
  check { name = "listening" tcp = "%[1]s:%[2]d" interval = "2s" }
}
`, s.ip, portGateway+s.base)}
	check := fmt.Sprintf(`  check { name = "alive" http = "http://%s/health" interval = "2s" }`, s.addr(s.appPort))
	if s.upstream != 0 {
		files["web.hcl"] = fmt.Sprintf(`# A service with a sidecar, which carries calls to %[1]s to the service api in dc2.
services {
  name    = "web"
  address = "%[2]s"
  port    = %[3]d
%[4]s
  connect {
    sidecar_service {
      proxy {
        local_service_address = "%[2]s"
        upstreams {
          destination_name   = "api"
          datacenter         = "dc2"
          local_bind_address = "%[2]s"
          local_bind_port    = %[5]d
        }
      }
    }
  }
}
`, s.addr(s.upstream), s.ip, s.appPort+s.base, check, s.upstream+s.base)
		files["mode.yaml"] = `# Calls to other datacenters leave through the gateways of the caller's own.
config_entries:
  bootstrap:
    - kind: proxy-defaults
      name: global
      mesh_gateway:
        mode: local
`
	} else {
		files["api.hcl"] = fmt.Sprintf(`# A service with a sidecar, which takes calls from the mesh.
services {
  name    = "api"
  address = "%[1]s"
  port    = %[2]d
%[3]s
  connect {
    sidecar_service {
      proxy { local_service_address = "%[1]s" }
    }
  }
}
`, s.ip, s.appPort+s.base, check)
	}
	dir := filepath.Join(s.dir, "config")
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// up starts the services and the agents.
func (d *demo) up(ctx context.Context) error {
	for _, s := range []*site{d.dc1, d.dc2} {
		if err := d.serveApp(s); err != nil {
			return err
		}
		if err := d.startAgent(s); err != nil {
			return err
		}
	}
	d.step("both agents started (logs: %s, %s)", d.dc1.logPath, d.dc2.logPath)
	for _, s := range []*site{d.dc1, d.dc2} {
		if err := d.until(ctx, s, "elect a leader", func() error {
			var leader string
			if err := getJSON(ctx, s.url("/v1/status/leader"), &leader); err != nil {
				return err
			}
			if leader == "" {
				return errors.New("no leader yet")
			}
			return nil
		}); err != nil {
			return err
		}
		d.step("%s has a leader", s.name)
	}
	if err := d.until(ctx, d.dc1, "join dc2", func() error {
		var dcs []string
		if err := getJSON(ctx, d.dc1.url("/v1/catalog/datacenters"), &dcs); err != nil {
			return err
		}
		if len(dcs) < 2 {
			return fmt.Errorf("it knows only %s", strings.Join(dcs, ", "))
		}
		return nil
	}); err != nil {
		return err
	}
	d.step("the datacenters are federated")
	if err := d.until(ctx, d.dc2, "get its certificate authority signed by dc1", func() error {
		var roots struct{ ActiveRootID string }
		if err := getJSON(ctx, d.dc2.url("/v1/connect/ca/roots"), &roots); err != nil {
			return err
		}
		if roots.ActiveRootID == "" {
			return errors.New("no active root yet")
		}
		return nil
	}); err != nil {
		return err
	}
	d.step("dc2 signs certificates with an intermediate of dc1's authority")
	return nil
}

// until asks f again and again, because what it asks for is about to happen in
// another process.
func (d *demo) until(ctx context.Context, s *site, what string, f func() error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		if last = f(); last == nil {
			return nil
		}
		select {
		case err := <-s.exited:
			s.exited <- err
			return fmt.Errorf("the agent of %s ended before it could %s: %w", s.name, what, orEnded(err))
		case <-ctx.Done():
			return fmt.Errorf("%s did not %s in time: %w", s.name, what, last)
		case <-tick.C:
		}
	}
}

func (d *demo) startAgent(s *site) error {
	log, err := os.Create(s.logPath)
	if err != nil {
		return err
	}
	// It gets its own end by a signal, so that it can leave in order.
	cmd := exec.Command(d.Binary, "agent", "-config-dir", filepath.Join(s.dir, "config")) //nolint:noctx // stop ends it
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = ownGroup()
	if err := cmd.Start(); err != nil {
		return errors.Join(fmt.Errorf("start the agent of %s: %w", s.name, err), log.Close())
	}
	s.process, s.exited = cmd, make(chan error, 1)
	d.wg.Go(func() {
		err := cmd.Wait()
		s.exited <- errors.Join(err, log.Close())
	})
	return nil
}

// stop ends the agents and the services, and waits for them.
func (d *demo) stop() error {
	for _, s := range []*site{d.dc1, d.dc2} {
		if s != nil && s.process != nil {
			_ = s.process.Process.Signal(os.Interrupt) // it may have ended already
		}
	}
	const limit = 10 * time.Second
	timer := time.AfterFunc(limit, func() {
		for _, s := range []*site{d.dc1, d.dc2} {
			if s != nil && s.process != nil {
				_ = s.process.Process.Kill() // it did not listen
			}
		}
	})
	defer timer.Stop()
	var errs []error
	for _, a := range d.apps {
		errs = append(errs, a.Close())
	}
	d.wg.Wait()
	return errors.Join(errs...)
}

// withLog adds the end of the logs to an error.
func (d *demo) withLog(err error) error {
	var b strings.Builder
	for _, s := range []*site{d.dc1, d.dc2} {
		log, e := os.ReadFile(s.logPath)
		if e != nil {
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(log)), "\n")
		const last = 12
		fmt.Fprintf(&b, "\n--- the last lines of %s's log:\n%s", s.name, strings.Join(lines[max(0, len(lines)-last):], "\n"))
	}
	return fmt.Errorf("%w%s", err, b.String())
}

// serveApp runs the site's service: web calls its upstream, api answers.
func (d *demo) serveApp(s *site) error {
	mux := http.NewServeMux()
	mux.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	if s.upstream == 0 {
		mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "hello from %s in %s, you asked for %s\n", s.app, s.name, r.URL.Path)
		})
	} else {
		client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, "http://"+s.addr(s.upstream)+r.URL.Path, nil)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			resp, err := client.Do(req)
			if err != nil {
				http.Error(w, "web could not reach api: "+err.Error(), http.StatusBadGateway)
				return
			}
			defer resp.Body.Close() //nolint:errcheck // it has been read
			fmt.Fprintf(w, "web in %s says that api answered: ", s.name)
			_, _ = io.Copy(w, resp.Body) // the caller sees what came
		})
	}
	l, err := net.Listen("tcp", s.addr(s.appPort)) //nolint:noctx // binding does not block
	if err != nil {
		return fmt.Errorf("start service %s: %w", s.app, err)
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	d.apps = append(d.apps, srv)
	d.wg.Go(func() { _ = srv.Serve(l) }) // ends by Close
	return nil
}

func (d *demo) suggest() {
	one, two := d.dc1, d.dc2
	fmt.Fprintf(d.Out, `
Try:
  call the service         curl http://%[1]s/
  the same, by the sidecar curl http://%[2]s/
  what dc1 has, and dc2    curl http://%[3]s/v1/catalog/services
                           curl 'http://%[3]s/v1/catalog/services?dc=dc2'
  what a gateway does      curl http://%[3]s/v1/agent/proxy/mesh-gateway
  switch the mode live     %[4]s config write -http-addr %[3]s - <<< 'Kind = "proxy-defaults"  Name = "global"  MeshGateway { Mode = "remote" }'
  forbid the call          %[4]s intention create -http-addr %[3]s -deny web api
  and allow it again       %[4]s intention delete -http-addr %[3]s web api
  kill dc2 and look        kill -9 %[5]d; curl http://%[1]s/

Ctrl-C stops everything.
`, one.addr(one.appPort), one.addr(one.upstream), one.addr(portHTTP), d.Binary, two.process.Process.Pid)
}
