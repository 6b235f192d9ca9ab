package sni

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/gateway"
)

// Routes are the routes of a file and the clusters they lead to.
type Routes struct {
	Routes   []gateway.Route
	Clusters []gateway.Cluster
}

// staticConnectTimeout is that of Consul's gateways.
const staticConnectTimeout = 5 * time.Second

// maxFileErrors bounds how many faulty lines of a file are told.
const maxFileErrors = 20

// ParseRoutes reads lines "name host:port" and "*.suffix host:port"; several
// lines of the same name are several endpoints, "#" begins a comment. Names
// with the same endpoints share a cluster, which is named after them. The error
// tells every faulty line by its number, up to a bound.
func ParseRoutes(r io.Reader) (*Routes, error) {
	var data strings.Builder // once in memory, and the names are parts of it
	if _, err := io.Copy(&data, r); err != nil {
		return nil, fmt.Errorf("read routes: %w", err)
	}
	type line struct{ name, target string }
	var (
		lines []line
		errs  []error
		seen  = map[string]gateway.Endpoint{}
		rest  = data.String()
	)
	lines = make([]line, 0, strings.Count(rest, "\n")+1)
	for no := 1; rest != ""; no++ {
		var text string
		text, rest, _ = strings.Cut(rest, "\n")
		text, _, _ = strings.Cut(text, "#")
		text = strings.TrimSpace(text)
		if text == "" {
			continue
		}
		bad := func(format string, args ...any) {
			if len(errs) < maxFileErrors {
				errs = append(errs, fmt.Errorf("line %d: "+format, append([]any{no}, args...)...))
			} else if len(errs) == maxFileErrors {
				errs = append(errs, errors.New("more faulty lines follow"))
			}
		}
		name, target, ok := cutFields(text)
		if !ok {
			bad("want \"name host:port\", have %q", text)
			continue
		}
		if name, ok = routeName(name); !ok {
			bad("%q is no host name", name)
			continue
		}
		if _, ok := seen[target]; !ok {
			ep, err := parseEndpoint(target)
			if err != nil {
				bad("%v", err)
				continue
			}
			seen[target] = ep
		}
		lines = append(lines, line{name, target})
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("parse routes: %w", errors.Join(errs...))
	}
	slices.SortStableFunc(lines, func(a, b line) int { return strings.Compare(a.name, b.name) })
	out := &Routes{Routes: make([]gateway.Route, 0, len(lines))}
	known := map[string]string{} // cluster names, so that each string is kept once
	for i := 0; i < len(lines); {
		j := i + 1
		for j < len(lines) && lines[j].name == lines[i].name {
			j++
		}
		name := lines[i].target
		if j > i+1 {
			targets := make([]string, 0, j-i)
			for _, l := range lines[i:j] {
				targets = append(targets, l.target)
			}
			slices.Sort(targets)
			name = strings.Join(slices.Compact(targets), ",")
		}
		shared, ok := known[name]
		if !ok {
			shared = strings.Clone(name)
			known[shared] = shared
			c := gateway.Cluster{Name: shared, ConnectTimeout: staticConnectTimeout, Origin: fileOrigin}
			for t := range strings.SplitSeq(shared, ",") {
				c.Endpoints = append(c.Endpoints, seen[t])
			}
			slices.SortFunc(c.Endpoints, func(a, b gateway.Endpoint) int {
				return cmp.Or(strings.Compare(a.Address, b.Address), cmp.Compare(a.Port, b.Port))
			})
			out.Clusters = append(out.Clusters, c)
		}
		out.Routes = append(out.Routes, gateway.Route{Match: lines[i].name, Cluster: shared, Origin: fileOrigin})
		i = j
	}
	slices.SortFunc(out.Clusters, func(a, b gateway.Cluster) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

var fileOrigin = gateway.Origin{Object: "routes-file"}

func cutFields(s string) (a, b string, ok bool) {
	i := strings.IndexAny(s, " \t")
	if i < 0 {
		return "", "", false
	}
	a, b = s[:i], strings.TrimLeft(s[i:], " \t")
	return a, b, !strings.ContainsAny(b, " \t")
}

func routeName(s string) (string, bool) {
	s = strings.ToLower(strings.TrimSuffix(s, "."))
	var h hello
	host := strings.TrimPrefix(s, "*.")
	return s, host != "" && h.setName([]byte(host))
}

func parseEndpoint(target string) (gateway.Endpoint, error) {
	host, port, err := net.SplitHostPort(target)
	if err != nil {
		return gateway.Endpoint{}, fmt.Errorf("%q is no host:port", target)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return gateway.Endpoint{}, fmt.Errorf("%q has no port from 1 to 65535", target)
	}
	if _, err := netip.ParseAddr(host); err != nil {
		var h hello
		if host == "" || !h.setName([]byte(host)) {
			return gateway.Endpoint{}, fmt.Errorf("%q has neither an IP address nor a host name", target)
		}
	}
	return gateway.Endpoint{
		Address: strings.Clone(host), Port: int(n), Healthy: true, Weight: 1, Origin: fileOrigin,
	}, nil
}

// StaticTable is a table that listens on each of listen ("ip:port", or ":port"
// for every address of the host) and forwards by routes.
func StaticTable(listen []string, routes *Routes) *gateway.Table {
	t := &gateway.Table{
		Proxy: "static", Kind: catalog.KindMeshGateway, Index: 1, AsOf: time.Now(),
		Routes: routes.Routes, Clusters: routes.Clusters,
	}
	for _, addr := range listen {
		if strings.HasPrefix(addr, ":") {
			addr = "[::]" + addr
		}
		t.Listeners = append(t.Listeners, gateway.Listener{
			Name: "static:" + addr, Network: "tcp", Address: addr, Mode: gateway.ListenSNI,
			Origin: gateway.Origin{Object: "command-line"},
		})
	}
	slices.SortFunc(t.Listeners, func(a, b gateway.Listener) int { return strings.Compare(a.Name, b.Name) })
	return t
}
