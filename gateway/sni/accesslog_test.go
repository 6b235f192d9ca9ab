package sni

import (
	"bufio"
	"encoding/json"
	"io"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/gateway"
)

func TestAccessLog(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", echo)
		r, w := io.Pipe()
		defer r.Close()
		lines := bufio.NewScanner(r)
		log := &gateway.AccessLog{Sample: 1, Logger: hclog.New(&hclog.LoggerOptions{Output: w, JSONFormat: true})}
		tab := table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web")
		tab.Listeners[0].ProxyProtocol = &gateway.ProxyProtocol{Accept: gateway.ProxyOptional, Trusted: []string{"127.0.0.0/8"}}
		f := start(t, Config{Engine: engine, AccessLog: log}, tab)
		defer f.stop()
		want := func(m map[string]any) {
			t.Helper()
			if !lines.Scan() {
				t.Fatal("no line: ", lines.Err())
			}
			got := map[string]any{}
			if err := json.Unmarshal(lines.Bytes(), &got); err != nil {
				t.Fatal(err)
			}
			if d, ok := got["duration_ms"].(float64); !ok || d < 0 || d > 60_000 {
				t.Errorf("duration: %v", got["duration_ms"])
			}
			for _, k := range []string{"@level", "@message", "@timestamp", "duration_ms"} {
				delete(got, k)
			}
			if d := cmp.Diff(m, got); d != "" {
				t.Errorf("line (-want +got):\n%s", d)
			}
		}
		line := func(peer, name, reason string, in, out int) map[string]any {
			m := map[string]any{
				"listener": "default", "peer": peer, "server_name": name, "cluster": "", "endpoint": "",
				"bytes_in": float64(in), "bytes_out": float64(out), "reason": reason,
			}
			if out > 0 {
				m["cluster"], m["endpoint"] = "web", b.addr
			}
			return m
		}
		c := f.dial(hello)
		expectTag(t, c, "H")
		c.Write(make([]byte, 100_000))
		c.CloseWrite()
		if n, err := io.Copy(io.Discard, c); n != 100_000 || err != nil {
			t.Fatal(n, err)
		}
		want(line(c.LocalAddr().String(), "web.example", gateway.CloseDone, len(hello)+100_000, 100_001))

		const head = "PROXY TCP4 192.0.2.7 192.0.2.8 1234 443\r\n"
		f.refused(f.dial(append([]byte(head), helloFor(t, "no.example")...)))
		want(line("192.0.2.7:1234", "no.example", gateway.RefuseNoRoute, 0, 0))

		c = f.dial(append([]byte(head), hello...))
		expectTag(t, c, "H")
		alive(t, c)
		if cs := f.Connections(1); len(cs) != 1 || cs[0].ServerName != "web.example" {
			t.Errorf("connections: %+v", cs)
		}
		c.SetLinger(0)
		c.Close()
		want(line("192.0.2.7:1234", "web.example", gateway.CloseReset, len(hello)+1, 2))

		c = f.dial([]byte("GET /"))
		f.refused(c)
		want(line(c.LocalAddr().String(), "", gateway.RefuseNotTLS, 0, 0))

		// A log that is not read holds nobody up.
		for range 50 {
			c := f.dial(hello)
			expectTag(t, c, "H")
			c.Close()
		}
		r.Close()
	})
}

func TestAccessLogDropsWhatItCannotKeep(t *testing.T) {
	r, w := io.Pipe()
	a := newAccessLog(&gateway.AccessLog{Sample: 1, Logger: hclog.New(&hclog.LoggerOptions{Output: w, JSONFormat: true})})
	a.start()
	const n = keptLines + 100
	for range n {
		a.add(gateway.Connection{Since: time.Now()}, gateway.CloseDone)
	}
	missing, written := 0.0, 0
	read := make(chan struct{})
	go func() {
		defer close(read)
		for s := bufio.NewScanner(r); s.Scan(); {
			var m map[string]any
			if err := json.Unmarshal(s.Bytes(), &m); err != nil {
				t.Error(err)
			}
			if k, ok := m["count"].(float64); ok {
				missing += k
			} else {
				written++
			}
		}
	}()
	a.stop()
	w.Close()
	<-read
	if missing < 90 || missing+float64(written) != n {
		t.Errorf("%d were written, and %v are told to be missing, of %d", written, missing, n)
	}
}
