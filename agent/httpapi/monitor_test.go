package httpapi

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-hclog"
)

func TestMonitor(t *testing.T) {
	log := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "agent", Output: io.Discard, Level: hclog.Warn})
	s := newServer(t, newFakeServer(), func(c *Config) { c.Logger = log })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	opts := (&api.QueryOptions{}).WithContext(ctx)

	// More than the agent's own level lets through.
	text, err := s.api.Agent().Monitor("debug", nil, opts)
	if err != nil {
		t.Fatal(err)
	}
	asJSON, err := s.api.Agent().MonitorJSON("info", nil, opts)
	if err != nil {
		t.Fatal(err)
	}
	log.Named("x").Debug("first", "a", 1)
	log.Info("second")
	if got := <-text; !strings.HasSuffix(got, "[DEBUG] agent.x: first: a=1") {
		t.Errorf("line %q", got)
	}
	if got := <-text; !strings.HasSuffix(got, "[INFO]  agent: second") {
		t.Errorf("line %q", got)
	}
	var line map[string]any
	if got := <-asJSON; json.Unmarshal([]byte(got), &line) != nil || line["@message"] != "second" || line["@level"] != "info" {
		t.Errorf("line %q", got)
	}

	s.do(t, "GET", "/v1/agent/monitor?loglevel=loud", "").want(t, 400, "Unknown log level: loud")
	s.do(t, "HEAD", "/v1/agent/monitor", "").want(t, 200, "")
	newServer(t, newFakeServer(), nil).do(t, "GET", "/v1/agent/monitor", "").want(t, 404, "this agent's log cannot be streamed")
}

// TestMonitorDoesNotHoldUpTheLog has a client that reads nothing for a while.
func TestMonitorDoesNotHoldUpTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := hclog.NewInterceptLogger(&hclog.LoggerOptions{Output: io.Discard})
		s := newServer(t, newFakeServer(), func(c *Config) { c.Logger = log })
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://agent/v1/agent/monitor", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := s.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		log.Info("line 0")
		synctest.Wait() // it is being written to the client
		for i := range logLinesKept + 3 {
			log.Info(fmt.Sprint("line ", i+1))
		}
		var got []string
		for lines := bufio.NewScanner(resp.Body); len(got) < 3 && lines.Scan(); {
			got = append(got, lines.Text())
		}
		if err := resp.Body.Close(); err != nil {
			t.Error(err)
		}
		if len(got) < 3 || !strings.HasSuffix(got[0], "line 0") || !strings.HasPrefix(got[1], "[INFO] 3 lines dropped") || !strings.HasSuffix(got[2], "line 1") {
			t.Errorf("lines %q", got)
		}
	})
}
