// Package agenttest runs whole agents for tests: in this process, or as
// processes of the real binary, in a network namespace of their own where the
// test wants that. Every agent has a loopback address of its own, so that all
// keep the default ports and no port is ever guessed.
//
// Put a test lower than this where it can go lower: what is here costs seconds.
package agenttest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"go.uber.org/goleak"

	"github.com/sluicemesh/sluice/agent"
	"github.com/sluicemesh/sluice/agent/config"
	"github.com/sluicemesh/sluice/gateway"
)

// Limit is how long anything may take that has no tighter limit of its own.
const Limit = 30 * time.Second

// Leaks makes the test fail when it ends with goroutines that were not there when
// Leaks was called. Call it first: what it checks is what all other cleanups left.
func Leaks(t testing.TB) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		// A probe of gossip that is under way when gossip stops ends with its timeout,
		// which over a WAN is seconds.
		const limit = 10 * time.Second
		var err error
		for start := time.Now(); time.Since(start) < limit; {
			if err = goleak.Find(before); err == nil {
				return
			}
		}
		t.Errorf("goroutines are left: %v", err)
	})
}

// Config of an agent.
type Config struct {
	// Name is the node's, and in the log.
	Name string
	// IP is bound, advertised, and serves the API.
	IP string
	// HCL is configuration beside what Start writes.
	HCL string
	// Dir holds config and data directory; "" makes one. An agent that is started
	// in the directory of one before it takes over its data.
	Dir string
	// NoAddress leaves addresses and data directory to HCL.
	NoAddress bool
	// Dial reaches the agent's addresses where the network is not the test's own;
	// nil is the test's network.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

// Node is a running agent, seen through its API.
type Node struct {
	*api.Client
	IP, Dir string
	// Agent is nil for one that runs as a process.
	Agent *agent.Agent

	t    testing.TB
	http *http.Client
	log  *output
	stop func()
}

// Log returns what the agent has logged.
func (n *Node) Log() string { return n.log.text() }

// write writes the configuration directory and returns the node without an agent.
func write(t testing.TB, c Config) *Node {
	t.Helper()
	n := &Node{IP: c.IP, Dir: c.Dir, t: t}
	if n.Dir == "" {
		n.Dir = t.TempDir()
	}
	if err := os.MkdirAll(n.configDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	base := ""
	if !c.NoAddress {
		base = fmt.Sprintf("node_name = %q\nbind_addr = %q\nclient_addr = %q\ndata_dir = %q\nperformance { raft_multiplier = 1 }\n",
			c.Name, c.IP, c.IP, filepath.Join(n.Dir, "data"))
	}
	n.WriteConfig("agent.hcl", base+c.HCL)

	transport := &http.Transport{DisableKeepAlives: true, DialContext: c.Dial}
	n.http = &http.Client{Transport: transport}
	client, err := api.NewClient(&api.Config{Address: c.IP + ":8500", HttpClient: n.http})
	if err != nil {
		t.Fatal(err)
	}
	n.Client = client
	return n
}

func (n *Node) configDir() string { return filepath.Join(n.Dir, "config") }

// WriteConfig writes a file of the configuration directory.
func (n *Node) WriteConfig(name, text string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.configDir(), name), []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// Start runs an agent in this process until Stop or the end of the test.
func Start(t testing.TB, c Config) *Node {
	t.Helper()
	n := write(t, c)
	log := &output{w: t.Output(), name: c.Name}
	n.log = log
	a, err := agent.New(agent.Options{
		Config: config.Options{Paths: []string{n.configDir()}}, Log: log, Version: "1.21.4", Revision: "test",
	})
	if err != nil {
		t.Fatalf("start agent %s: %v", c.Name, err)
	}
	n.Agent = a
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("agent %s: %v", c.Name, err)
		}
		log.end()
	})
	t.Cleanup(n.stop)
	return n
}

// Stop ends the agent as the end of its context does: it does not leave. It
// returns when nothing of it runs. A process is killed.
func (n *Node) Stop() { n.stop() }

// output gives what an agent logs to the test that runs it, and to nobody after.
type output struct {
	name string

	mu  sync.Mutex // guards w and all
	w   io.Writer
	all strings.Builder
}

func (o *output) text() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.all.String()
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.all.Write(p)
	if o.w == nil {
		return len(p), nil
	}
	for line := range strings.Lines(string(p)) {
		if _, err := fmt.Fprintf(o.w, "%-5s %s\n", o.name, strings.TrimSuffix(line, "\n")); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

func (o *output) end() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.w = nil
}

// Until calls f until it returns nil and returns how long that took; the test
// fails when that is longer than limit. It asks again after a moment, so it is for
// what has no blocking query to wait by: use [Node.Watch] for the rest.
func Until(t testing.TB, limit time.Duration, what string, f func() error) time.Duration {
	t.Helper()
	const pause = 10 * time.Millisecond
	start := time.Now()
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for {
		err := f()
		took := time.Since(start)
		if err == nil {
			return took
		}
		if took > limit {
			t.Fatalf("%s: not within %v: %v", what, limit, err)
		}
		select {
		case <-t.Context().Done():
			t.Fatalf("%s: the test ended: %v", what, err)
		case <-tick.C:
		}
	}
}

// Watch calls f with the options of a blocking query until it says that it is
// done; the test fails when that takes longer than [Limit].
func (n *Node) Watch(what string, f func(q *api.QueryOptions) (done bool, meta *api.QueryMeta, err error)) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), Limit)
	defer cancel()
	q := (&api.QueryOptions{WaitTime: Limit}).WithContext(ctx)
	var last error
	for ctx.Err() == nil {
		done, meta, err := f(q)
		if done && err == nil {
			return
		}
		if err != nil { // no leader yet, or no agent
			last, q.WaitIndex = err, 0
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
			continue
		}
		if meta.LastIndex == q.WaitIndex {
			last = fmt.Errorf("index %d brought nothing", meta.LastIndex)
		}
		q.WaitIndex = meta.LastIndex
	}
	n.t.Fatalf("%s: %s: not within %v: %v", n.IP, what, Limit, last)
}

// AwaitCatalog waits until the datacenter's catalog has that many instances of the
// service that are passing.
func (n *Node) AwaitCatalog(service string, want int) {
	n.t.Helper()
	n.Watch(fmt.Sprintf("%d passing instances of %s", want, service), func(q *api.QueryOptions) (bool, *api.QueryMeta, error) {
		got, meta, err := n.Health().Service(service, "", true, q)
		return len(got) == want, meta, err
	})
}

// Get fills out with the answer to a GET of the API.
func (n *Node) Get(path string, out any) error {
	ctx, cancel := context.WithTimeout(n.t.Context(), Limit)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+n.IP+":8500"+path, nil)
	if err != nil {
		return err
	}
	resp, err := n.http.Do(req)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(resp.Body)
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s: %s", path, resp.Status, b)
	}
	if s, ok := out.(*string); ok {
		*s = string(b)
		return nil
	}
	return json.Unmarshal(b, out)
}

// Proxy returns what the agent tells of one of its proxies.
func (n *Node) Proxy(id string) (*gateway.ProxyStatus, error) {
	st := new(gateway.ProxyStatus)
	return st, n.Get("/v1/agent/proxy/"+id, st)
}

// Connected returns how many connections a proxy has brought to an endpoint.
func (n *Node) Connected(id string) uint64 {
	n.t.Helper()
	st, err := n.Proxy(id)
	if err != nil {
		n.t.Fatal(err)
	}
	var sum uint64
	if st.Plane != nil {
		for _, c := range st.Plane.Clusters {
			sum += c.Connected
		}
	}
	return sum
}
