package sidecar

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/gateway"
)

// drain begins to drain s and returns what it tells; stop takes it back.
func drain(t *testing.T, s *Sidecar, p gateway.Plan) (told <-chan gateway.Progress, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context())) // until stop, see runWith
	ch := make(chan gateway.Progress, 1000)
	done := make(chan error, 1)
	go func() { done <- s.Drain(ctx, p, func(p gateway.Progress) { ch <- p }) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Drain: %v", err)
		}
	})
	t.Cleanup(stop)
	return ch, stop
}

// until returns the first progress of the phase.
func until(t *testing.T, told <-chan gateway.Progress, phase gateway.DrainPhase) gateway.Progress {
	t.Helper()
	limit := time.After(10 * time.Second)
	var last gateway.Progress
	for {
		select {
		case p := <-told:
			last = p
			if p.Phase == phase {
				return p
			}
		case <-limit:
			t.Fatalf("it did not come to %s but to %+v", phase, last)
		}
	}
}

func ping(t *testing.T, c net.Conn) {
	t.Helper()
	var b [4]byte
	if _, err := c.Write([]byte("ping")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, b[:]); err != nil {
		t.Fatal(err)
	}
}

// pair is a sidecar of web that reaches one of api.
func pair(t *testing.T, log *gateway.AccessLog) (web *Sidecar, local string) {
	t.Helper()
	ca := newAuthority(t)
	public, local := free(t), free(t)
	run(t).Apply(inboundTable(ca.identity(t, "api", "dc2"), public, echoes(t), allow))
	_ = dial(t, public).Close()
	web = runWith(t, Config{AccessLog: log})
	web.Apply(upstreamTable(ca.identity(t, "web", "dc1"), local, apiCluster("api", apiID, public)))
	return web, local
}

// echoes serves any number of connections at one time.
func echoes(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				echo(c.(*net.TCPConn))
				_ = c.Close() // it has been served
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return l.Addr().String()
}

// TestDrain lets an open connection finish, refuses new ones, for a new table too,
// and accepts again when it is taken back.
func TestDrain(t *testing.T) {
	web, local := pair(t, nil)
	c := dial(t, local)
	ping(t, c)
	await(t, func() (int, bool) { // the bytes come before they are counted
		open := web.Connections(10)
		return 0, len(open) == 1 && open[0].BytesIn == 4 && open[0].BytesOut == 4
	})
	if diff := cmp.Diff([]gateway.Connection{{
		Listener: "api", Client: c.LocalAddr().String(), Cluster: "api", Endpoint: web.Status().Clusters[0].Endpoints[0].Address,
		ServerName: "api.default.dc2.internal." + clusterID + ".consul", BytesIn: 4, BytesOut: 4,
	}}, web.Connections(10), cmpopts.IgnoreFields(gateway.Connection{}, "Since")); diff != "" {
		t.Errorf("connections (-want +got):\n%s", diff)
	}
	told, stop := drain(t, web, gateway.Plan{Timeout: time.Hour, Rate: 50})
	if p := until(t, told, gateway.DrainFinishing); p.Open != 1 {
		t.Errorf("open while draining: %+v", p)
	}
	again := *web.current.Load().table
	again.Index++
	again.Listeners = append(again.Listeners[:1:1], again.Listeners[0])
	again.Listeners[1].Name, again.Listeners[1].Address = "new", free(t)
	web.Apply(&again)
	await(t, func() (int, bool) { return 0, web.Status().Applied == again.Index })
	for _, l := range again.Listeners {
		if c, err := net.Dial("tcp", l.Address); err == nil {
			t.Errorf("%s accepts during the drain: %v", l.Name, c.Close())
		}
	}
	for _, l := range web.Status().Listeners {
		if l.Bound {
			t.Errorf("%s is bound", l.Name)
		}
	}
	ping(t, c)
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Errorf("the end of the open connection: %q, %v", b, err)
	}
	if p := until(t, told, gateway.DrainDrained); p.Open != 0 || p.Finished != 1 || p.Closed != 0 {
		t.Errorf("drained: %+v", p)
	}
	stop()
	for _, l := range again.Listeners {
		ping(t, dial(t, l.Address))
	}
}

// TestDrainCloses ends what does not end by itself, at the pace, the oldest first.
func TestDrainCloses(t *testing.T) {
	var out syncBuffer
	web, local := pair(t, &gateway.AccessLog{Sample: 1, Logger: hclog.New(&hclog.LoggerOptions{Output: &out, JSONFormat: true})})
	var conns []*net.TCPConn
	for range 4 {
		c := dial(t, local)
		ping(t, c)
		conns = append(conns, c)
	}
	told, _ := drain(t, web, gateway.Plan{Timeout: 50 * time.Millisecond, Rate: 20})
	start := time.Now()
	var ends []time.Time
	for _, c := range conns {
		if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
			t.Errorf("a connection was not ended in order: %q, %v", b, err)
		}
		ends = append(ends, time.Now())
		_ = c.Close()
	}
	if took := ends[3].Sub(start); took < 50*time.Millisecond+settle+75*time.Millisecond {
		t.Errorf("the last of four ended after %v, at 20 a second after %v", took, 50*time.Millisecond+settle)
	}
	if p := until(t, told, gateway.DrainDrained); p.Closed != 4 || p.Finished != 0 {
		t.Errorf("drained: %+v", p)
	}
	if l := web.Status().Listeners[0]; l.Closed[gateway.CloseDrain] != 4 {
		t.Errorf("ends counted: %v", l.Closed)
	}
	if lines := strings.Split(strings.TrimSpace(out.String()), "\n"); len(lines) != 4 {
		t.Errorf("%d lines in the access log, want 4:\n%s", len(lines), out.String())
	}
	var line struct {
		Reason   string `json:"reason"`
		Cluster  string `json:"cluster"`
		BytesIn  int    `json:"bytes_in"`
		BytesOut int    `json:"bytes_out"`
	}
	if err := json.NewDecoder(strings.NewReader(out.String())).Decode(&line); err != nil {
		t.Fatal(err)
	}
	if line.Reason != gateway.CloseDrain || line.Cluster != "api" || line.BytesIn != 4 || line.BytesOut != 4 {
		t.Errorf("the access log says %+v", line)
	}
}

// TestAccessLogRefused writes a line for a connection that reaches nothing.
func TestAccessLogRefused(t *testing.T) {
	var out syncBuffer
	s := runWith(t, Config{AccessLog: &gateway.AccessLog{Sample: 1, Logger: hclog.New(&hclog.LoggerOptions{Output: &out, JSONFormat: true})}})
	local := free(t)
	s.Apply(upstreamTable(nil, local, apiCluster("api", apiID)))
	c := dial(t, local)
	_, _ = io.ReadAll(c)
	await(t, func() (int, bool) {
		return 0, strings.Contains(out.String(), `"reason":"`+gateway.RefuseNoEndpoint+`"`)
	})
}

// TestDrainQueue has a connection wait to be accepted while the listener is to
// close: it is served.
func TestDrainQueue(t *testing.T) {
	web, local := pair(t, nil)
	_ = dial(t, local).Close()
	var wg sync.WaitGroup
	var mu sync.Mutex // guards broken
	broken := 0
	begin, stopped := make(chan struct{}), make(chan struct{})
	once := sync.OnceFunc(func() { close(begin) })
	for range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				if i == 3 {
					once()
				}
				select {
				case <-stopped:
					return
				default:
				}
				c, err := net.DialTimeout("tcp", local, 100*time.Millisecond)
				if err != nil {
					continue // it goes elsewhere
				}
				_, err = c.Write([]byte("x"))
				if err == nil {
					_, err = io.ReadFull(c, make([]byte, 1))
				}
				if err != nil {
					mu.Lock()
					broken++
					mu.Unlock()
				}
				_ = c.Close()
			}
		})
	}
	<-begin
	told, _ := drain(t, web, gateway.Plan{Timeout: time.Hour})
	until(t, told, gateway.DrainDrained)
	close(stopped)
	wg.Wait()
	if broken > 0 {
		t.Errorf("%d connections were accepted by the kernel and reset", broken)
	}
}

// syncBuffer may be written by one goroutine and read by another.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
