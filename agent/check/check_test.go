package check

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicemesh/sluice/agent/catalog"
)

func TestTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		got := make(chan string, 10)
		s := New(Config{Update: func(id, status, output string) { got <- id + " " + status + " " + output }})
		ctx, cancel := context.WithCancel(t.Context())
		s.Set(ctx, map[string]catalog.CheckDefinition{"a": {TTL: "10s"}})
		synctest.Wait()
		for range 5 { // beats keep it from expiring
			time.Sleep(9 * time.Second)
			s.Beat("a")
			synctest.Wait()
		}
		if len(got) != 0 {
			t.Fatalf("expired in spite of beats: %s", <-got)
		}
		time.Sleep(10*time.Second + time.Millisecond)
		if g := <-got; g != "a critical TTL expired" {
			t.Errorf("got %q", g)
		}
		cancel()
		s.Wait()
	})
}

func TestThresholds(t *testing.T) {
	for _, tc := range []struct {
		name string
		th   thresholds
		in   string // p and c
		want string // reported statuses, - for none
	}{
		{"at once", thresholds{}, "pcp", "passing critical passing"},
		{"three failures", thresholds{critical: 3}, "cccp", "- - critical passing"},
		{"warning on the way", thresholds{critical: 3, warning: 2}, "ccc", "- warning critical"},
		{"two successes", thresholds{success: 2}, "cpcpp", "critical - critical - passing"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := ""
			for _, r := range tc.in {
				in := map[rune]string{'p': Passing, 'c': Critical}[r]
				status, ok := tc.th.add(in)
				if !ok {
					status = "-"
				}
				if got != "" {
					got += " "
				}
				got += status
			}
			if got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestProbes(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var code int
		if _, err := fmt.Sscanf(r.URL.Path, "/%d", &code); err != nil {
			code = 500
		}
		w.WriteHeader(code)
	}))
	defer srv.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		p    prober
		want string
	}{
		{"http 200", httpProber(catalog.CheckDefinition{HTTP: srv.URL + "/200"}, MaxOutput), Passing},
		{"http 429", httpProber(catalog.CheckDefinition{HTTP: srv.URL + "/429"}, MaxOutput), Warning},
		{"http 503", httpProber(catalog.CheckDefinition{HTTP: srv.URL + "/503"}, MaxOutput), Critical},
		{"http refused", httpProber(catalog.CheckDefinition{HTTP: "http://" + closed}, MaxOutput), Critical},
		{"tcp open", tcpProber(catalog.CheckDefinition{TCP: srv.Listener.Addr().String()}), Passing},
		{"tcp refused", tcpProber(catalog.CheckDefinition{TCP: closed}), Critical},
	} {
		t.Run(tc.name, func(t *testing.T) {
			defer tc.p.close()
			if got, out := tc.p.probe(t.Context()); got != tc.want {
				t.Errorf("got %s (%s), want %s", got, out, tc.want)
			}
		})
	}
}

// TestSet starts, changes and stops checks, and sees that exactly those that
// should run do.
func TestSet(t *testing.T) {
	hits := make(chan string)
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case hits <- r.URL.Path:
		case <-r.Context().Done():
		}
	}))
	defer srv.Close()
	s := New(Config{Update: func(string, string, string) {}, Jitter: func(time.Duration) time.Duration { return 0 }})
	ctx, cancel := context.WithCancel(t.Context())
	s.Set(ctx, map[string]catalog.CheckDefinition{"a": {HTTP: srv.URL + "/one", Interval: "1h"}})
	if p := <-hits; p != "/one" {
		t.Errorf("first check asked %s", p)
	}
	s.Set(ctx, map[string]catalog.CheckDefinition{"a": {HTTP: srv.URL + "/two", Interval: "1h"}})
	if p := <-hits; p != "/two" {
		t.Errorf("changed check asked %s", p)
	}
	s.Set(ctx, nil)
	if n := len(s.running); n != 0 {
		t.Errorf("%d checks run after all were taken away", n)
	}
	cancel()
	s.Wait()
}

// TestStarting sees a service as soon as it is up, and not an interval later.
func TestStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		passed := make(chan time.Duration, 100)
		var ran []time.Duration
		s := New(Config{Update: func(_, status, _ string) {
			if status == Passing {
				passed <- time.Since(start)
			}
		}, Jitter: func(time.Duration) time.Duration { return 0 }})
		p := probeFunc(func() string {
			ran = append(ran, time.Since(start))
			if time.Since(start) < 3*time.Second {
				return Critical
			}
			return Passing
		})
		ctx, cancel := context.WithCancel(t.Context())
		s.wg.Go(func() { s.periodic("a", catalog.CheckDefinition{Interval: "1m"}, p)(ctx, nil) })
		if at := <-passed; at > 4*time.Second {
			t.Errorf("seen only after %v", at)
		}
		time.Sleep(10 * time.Minute)
		cancel()
		s.Wait()
		if n := len(ran); n < 14 || n > 16 { // five on the way, then one a minute
			t.Errorf("ran %d times: %v", n, ran)
		}
	})
}

type probeFunc func() string

func (f probeFunc) probe(context.Context) (string, string) { return f(), "" }

func (probeFunc) close() {}
