package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/gateway/sni"
)

// TestForwarder runs the checks against the forwarder, with each of its engines.
func TestForwarder(t *testing.T) {
	certs, err := newPKI()
	if err != nil {
		t.Fatal(err)
	}
	for _, engine := range []string{sni.EngineEpoll, sni.EngineNetpoll} {
		t.Run(engine, func(t *testing.T) {
			backend, secure := startServers(t, certs)
			k, err := newChecker(startForwarder(t, engine, backend, secure), certs)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range checks {
				t.Run(c.name, func(t *testing.T) {
					ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
					defer cancel()
					if err := c.run(k, ctx); err != nil {
						t.Error(err)
					}
				})
			}
		})
	}
}

// TestChecksFail runs the checks against what is no forwarder: the backend
// itself, which answers every name and speaks no TLS.
func TestChecksFail(t *testing.T) {
	certs, err := newPKI()
	if err != nil {
		t.Fatal(err)
	}
	backend, _ := startServers(t, certs)
	k, err := newChecker(backend.String(), certs)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{"an unknown name is refused": true, "mutual TLS 1.3: 16 times 8 MiB by HTTP": true}
	for _, c := range checks {
		limit := 30 * time.Second
		if want[c.name] {
			limit = time.Second // one of them ends by it
		}
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		if err := c.run(k, ctx); (err != nil) != want[c.name] {
			t.Errorf("%s: %v", c.name, err)
		}
		cancel()
	}
}

// TestFeatured runs some of the checks with every feature on, and wants the features
// to be there.
func TestFeatured(t *testing.T) {
	certs, err := newPKI()
	if err != nil {
		t.Fatal(err)
	}
	one, secure := startServers(t, certs)
	two, _ := startServers(t, certs)
	three, _ := startServers(t, certs)
	four, _ := startServers(t, certs)
	table, err := featured("127.0.0.1:0", routesFile(newRoutes(64, []netip.AddrPort{one, two, three, four}, secure)), secure.String())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range table.Clusters {
		if n := len(c.Endpoints); n != 4 && c.Name != secure.String() || n != 1 && c.Name == secure.String() {
			t.Errorf("cluster %s has %d endpoints", c.Name, n)
		}
	}
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			r, err := runForwarder(t.Context(), sni.Config{Engine: engine, Workers: 2}, table)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := r.stop(); err != nil {
					t.Error(err)
				}
			}()
			k, err := newChecker(r.addr, certs)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range checks {
				switch c.name {
				case "64 MiB come back as they were", "a slow reader holds the sender back":
					continue // they take long, and no feature has to do with them
				case "a reset client is gone at the server":
					continue // which of the backends has it is a matter of luck
				}
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				if err := c.run(k, ctx); err != nil {
					t.Errorf("%s: %v", c.name, err)
				}
				cancel()
			}
			st := r.fw.Status()
			if st.LastError != "" || st.Listeners[0].Error != "" {
				t.Errorf("a feature cannot be had: %+v", st)
			}
			if n := st.Listeners[0].Refused[gateway.RefuseLimit]; n > 0 {
				t.Errorf("%d connections were beyond a limit", n)
			}
			for _, c := range st.Clusters {
				var used []uint64
				for _, e := range c.Endpoints {
					used = append(used, e.Connected)
				}
				if slices.Sort(used); c.Connected > 50 && (used[2] == 0 || used[1] > 0) {
					t.Errorf("cluster %s: of its endpoints two are near, and share the connections: %v", c.Name, used)
				}
			}
		})
	}
}

func startServers(t *testing.T, certs *pki) (backend, secure netip.AddrPort) {
	t.Helper()
	b, err := newBackend([]netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b.run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := newTLSServer(certs)
	served := make(chan error, 1)
	go func() { served <- server.Serve(tls.NewListener(ln, server.TLSConfig)) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-served; err != http.ErrServerClosed {
			t.Error(err)
		}
	})
	return b.addrs[0], netip.MustParseAddrPort(ln.Addr().String())
}

// startForwarder returns its address.
func startForwarder(t *testing.T, engine string, backend, secure netip.AddrPort) string {
	t.Helper()
	set, err := sni.ParseRoutes(bytes.NewReader(routesFile(newRoutes(64, []netip.AddrPort{backend}, secure))))
	if err != nil {
		t.Fatal(err)
	}
	f := sni.New(sni.Config{Engine: engine, Workers: 2})
	f.Apply(sni.StaticTable([]string{"127.0.0.1:0"}, set))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	deadline := time.After(10 * time.Second)
	for {
		changed := f.Changed()
		if s := f.Status(); len(s.Listeners) > 0 && s.Listeners[0].Bound {
			return s.Listeners[0].Address
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("not bound: %+v", f.Status())
		}
	}
}
