package cli

import (
	"bytes"
	"flag"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/gateway"
)

func TestTable(t *testing.T) {
	var out bytes.Buffer
	c := &call{env: &env{out: &out}}
	c.table([]string{"Node", "Address", "DC"}, []string{"a-long-name", "10.0.0.1", "dc1"}, []string{"b", "", "dc2"}, []string{"c", "", ""}, nil)
	want := strings.Join([]string{
		"Node         Address   DC",
		"a-long-name  10.0.0.1  dc1",
		"b                      dc2",
		"c",
		"", "",
	}, "\n")
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("table (-want +got):\n%s", diff)
	}
}

func TestParseUpstream(t *testing.T) {
	for in, want := range map[string]api.Upstream{
		"api:9191":                 {DestinationName: "api", LocalBindPort: 9191},
		"api:127.0.0.2:9191":       {DestinationName: "api", LocalBindAddress: "127.0.0.2", LocalBindPort: 9191},
		"api:[::1]:9191":           {DestinationName: "api", LocalBindAddress: "::1", LocalBindPort: 9191},
		"api?dc=dc2:9191":          {DestinationName: "api", Datacenter: "dc2", LocalBindPort: 9191},
		"api?dc=dc2:[::1]:9191":    {DestinationName: "api", Datacenter: "dc2", LocalBindAddress: "::1", LocalBindPort: 9191},
		"my-api?dc=dc-2:0.0.0.0:1": {DestinationName: "my-api", Datacenter: "dc-2", LocalBindAddress: "0.0.0.0", LocalBindPort: 1},
	} {
		want.DestinationType = api.UpstreamDestTypeService
		got, err := parseUpstream(in)
		if err != nil {
			t.Errorf("parseUpstream(%q): %v", in, err)
			continue
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("parseUpstream(%q) (-want +got):\n%s", in, diff)
		}
	}
}

func TestParseUpstreamErrors(t *testing.T) {
	for in, want := range map[string]string{
		"":                  "is not of the form",
		"api":               "is not of the form",
		":9191":             "is not of the form",
		"?dc=dc2:9191":      "names no service",
		"api?dc=:9191":      "names no datacenter",
		"api?peer=x:9191":   `not "peer"`,
		"api:0":             "no port from 1 to 65535",
		"api:65536":         "no port from 1 to 65535",
		"api:":              "no port from 1 to 65535",
		"api:host:80":       "is no IP address",
		"api:::1:80":        "too many colons",
		"api?dc=%zz:9191":   "invalid URL escape",
		"api:127.0.0.1:":    "no port from 1 to 65535",
		"api:127.0.0.1:80x": "no port from 1 to 65535",
	} {
		if u, err := parseUpstream(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("parseUpstream(%q) = %+v, %v, want an error with %q", in, u, err, want)
		}
	}
}

func TestUpstreamsFlag(t *testing.T) {
	var l upstreams
	for _, s := range []string{"api:9191", "db?dc=dc2:127.0.0.2:9191"} {
		if err := l.Set(s); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := l.String(), "api:9191,db?dc=dc2:127.0.0.2:9191"; got != want {
		t.Errorf("String() = %q, want %q", got, want)
	}
	if err := l.Set("web:127.0.0.1:9191"); err == nil || !strings.Contains(err.Error(), "same local address") {
		t.Errorf("Set of an address that is taken = %v, want that it is", err)
	}
	if len(l) != 2 {
		t.Errorf("%d upstreams after a refused one, want 2", len(l))
	}
}

func TestProxyFlags(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"", "No proxy ID specified"},
		{"-sidecar-for web -proxy-id p", "exclude each other"},
		{"-sidecar-for web -upstream api:1", "describe a proxy of -service"},
		{"-proxy-id p -register", "describe a proxy of -service"},
		{"-service web", "nothing to do"},
		{"-service web -listen :1", "need each other"},
		{"-service web -upstream api:1 -service-addr :1", "need each other"},
		{"-service web -upstream api:1 -register", "-register needs -listen"},
		{"-service web -upstream api:1 -register-id a", "-register-id needs -register"},
		{"-service web -upstream api:1", ""},
		{"-service web -listen :1 -service-addr :2 -register -register-id a", ""},
		{"-sidecar-for web", ""},
		{"-proxy-id p", ""},
	} {
		t.Run(test.args, func(t *testing.T) {
			var f proxyFlags
			fs := flag.NewFlagSet("", flag.ContinueOnError)
			fs.StringVar(&f.sidecarFor, "sidecar-for", "", "")
			fs.StringVar(&f.proxyID, "proxy-id", "", "")
			fs.StringVar(&f.service, "service", "", "")
			fs.Var(&f.upstreams, "upstream", "")
			fs.StringVar(&f.listen, "listen", "", "")
			fs.StringVar(&f.serviceAddr, "service-addr", "", "")
			fs.BoolVar(&f.register, "register", false, "")
			fs.StringVar(&f.registerID, "register-id", "", "")
			if err := fs.Parse(strings.Fields(test.args)); err != nil {
				t.Fatal(err)
			}
			err := f.check()
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("check() = %v, want %q", err, test.want)
			}
		})
	}
}

// TestDescribe checks what a proxy of flags is, and what the agent is told of it:
// to leave it alone.
func TestDescribe(t *testing.T) {
	f := proxyFlags{service: "web", listen: "0.0.0.0:20000", serviceAddr: ":8080", registerID: "b", upstreams: upstreams{{DestinationName: "api", LocalBindPort: 1}}}
	s, err := f.describe()
	if err != nil {
		t.Fatal(err)
	}
	if s.ID != "web-proxy-b" || s.Service != "web-proxy" || s.Address != "" || s.Port != 20000 {
		t.Errorf("describe() = ID %q, service %q, %q:%d, want web-proxy-b, web-proxy, port 20000 of the node's address", s.ID, s.Service, s.Address, s.Port)
	}
	if diff := cmp.Diff(map[string]any{"bind_address": "0.0.0.0", "data_plane": "builtin"}, s.Proxy.Config); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
	if s.Proxy.LocalServiceAddress != "127.0.0.1" || s.Proxy.LocalServicePort != 8080 {
		t.Errorf("the service is at %s:%d, want 127.0.0.1:8080", s.Proxy.LocalServiceAddress, s.Proxy.LocalServicePort)
	}
	reg := registrationOf(s)
	if got := reg.Proxy.Config["data_plane"]; got != "none" {
		t.Errorf("the agent is told data_plane %v, want none", got)
	}
	if reg.Check.TCP != "127.0.0.1:20000" {
		t.Errorf("the check connects to %q, want 127.0.0.1:20000", reg.Check.TCP)
	}
	if got := s.Proxy.Config["data_plane"]; got != "builtin" {
		t.Errorf("registering has changed the proxy's own data_plane to %v", got)
	}
	for _, listen := range []string{"20000", "127.0.0.1:0", "127.0.0.1:x"} {
		if _, err := (&proxyFlags{service: "web", listen: listen, serviceAddr: ":1"}).describe(); err == nil {
			t.Errorf("describe with -listen %s: no error", listen)
		}
	}
}

func TestNearest(t *testing.T) {
	names := []string{"agent", "catalog", "catalog nodes", "config", "config read", "connect", "connect ca get-config", "force-leave", "join", "leave", "members", "services", "services register", "validate"}
	for typed, want := range map[string]string{
		"servces":              "services",
		"service":              "services",
		"agnet":                "agent",
		"Members":              "members",
		"laeve":                "leave",
		"config raed":          "config read",
		"connect ca getconfig": "connect ca get-config",
		"val":                  "validate",
		"xyzzy":                "",
		"q":                    "",
	} {
		if got := nearest(typed, names); got != want {
			t.Errorf("nearest(%q) = %q, want %q", typed, got, want)
		}
	}
}

// TestCommandsAreListed fails when a command is in no section of the overview.
func TestCommandsAreListed(t *testing.T) {
	commands := (&env{}).commands()
	listed := map[string]bool{}
	for _, s := range sections {
		for _, name := range s.names {
			listed[name] = true
			if commands[name] == nil {
				t.Errorf("the overview lists %q, which there is not", name)
			}
		}
	}
	for _, name := range sorted(commands) {
		if !strings.Contains(name, " ") && !listed[name] {
			t.Errorf("command %q is in no section of the overview", name)
		}
	}
}

// TestHelp asks every command for its help: each must say how it is used.
func TestHelp(t *testing.T) {
	for _, name := range sorted((&env{}).commands()) {
		t.Run(name, func(t *testing.T) {
			for _, flag := range []string{"-h", "--help"} {
				var out, errw bytes.Buffer
				if code := Run(append(strings.Fields(name), flag), nil, &out, &errw); code != 0 || errw.Len() > 0 {
					t.Errorf("sluice %s %s: code %d, standard error %q, want 0 and nothing", name, flag, code, errw.String())
				}
				if want := "Usage: sluice " + name; !strings.HasPrefix(out.String(), want) {
					t.Errorf("sluice %s %s prints %q, want it to begin with %q", name, flag, out.String(), want)
				}
				for line := range strings.Lines(out.String()) {
					if line = strings.TrimSuffix(line, "\n"); line != strings.TrimRight(line, " ") {
						t.Errorf("sluice %s %s: %q has blanks at its end", name, flag, line)
					}
				}
			}
		})
	}
}

func TestProgressLine(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		p    gateway.Progress
		want string
	}{
		{gateway.Progress{Phase: gateway.DrainWaiting, Open: 12, ETA: now.Add(35 * time.Second)}, "gw: waiting    open 12  ETA 35s"},
		{gateway.Progress{Phase: gateway.DrainFinishing, Open: 7, Finished: 5, Rate: 2.5, ETA: now.Add(90 * time.Second)}, "gw: finishing  open 7  finished 5  closed 0  2.5/s  ETA 1m30s"},
		{gateway.Progress{Phase: gateway.DrainClosing, Open: 3, Finished: 5, Closed: 4, Rate: 50, ETA: now.Add(-time.Second)}, "gw: closing    open 3  finished 5  closed 4  50.0/s  ETA 0s"},
		{gateway.Progress{Phase: gateway.DrainDrained, Finished: 5, Closed: 7, Since: now.Add(-61500 * time.Millisecond)}, "gw: drained    open 0  finished 5  closed 7  after 1m1.5s"},
	} {
		if got := progressLine("gw", &test.p, now); got != test.want {
			t.Errorf("got  %q\nwant %q", got, test.want)
		}
	}
}
