package gateway_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/gateway"
)

// TestRefusals tells of each kind once a minute, and then how many there were.
func TestRefusals(t *testing.T) {
	var out strings.Builder
	l := &gateway.Refusals{Logger: hclog.New(&hclog.LoggerOptions{Output: &out, Level: hclog.Info})}
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	add := func(after time.Duration, reason, detail string) string {
		out.Reset()
		l.Add(gateway.Refusal{At: start.Add(after), Listener: "upstream", Peer: "10.0.0.1:1", Reason: reason, Detail: detail})
		return out.String()
	}
	const a, b = "dial tcp 10.2.0.3:21000: unreachable", "dial tcp 10.2.0.4:21000: unreachable"
	if got := add(0, gateway.RefuseConnect, a); !strings.Contains(got, "[WARN]") || !strings.Contains(got, a) {
		t.Errorf("the first: %q", got)
	}
	if got := add(time.Second, gateway.RefuseConnect, a); got != "" {
		t.Errorf("one like it: %q", got)
	}
	if got := add(time.Second, gateway.RefuseConnect, b); !strings.Contains(got, b) {
		t.Errorf("one to another endpoint: %q", got)
	}
	if got := add(61*time.Second, gateway.RefuseConnect, a); !strings.Contains(got, "more_like_it=1") {
		t.Errorf("a minute later: %q", got)
	}
	// What a client chooses makes no kinds of its own.
	if got := add(0, gateway.RefuseNotTLS, "x"); !strings.Contains(got, "[INFO]") {
		t.Errorf("the first that is not TLS: %q", got)
	}
	if got := add(time.Second, gateway.RefuseNotTLS, "y"); got != "" {
		t.Errorf("another that is not TLS: %q", got)
	}
	// Very many kinds are told of together.
	lines := 0
	for i := range 1000 {
		lines += strings.Count(add(time.Hour+time.Duration(i)*time.Millisecond, gateway.RefuseConnect, fmt.Sprint("endpoint ", i)), "\n")
	}
	if lines < 100 || lines > 200 {
		t.Errorf("%d lines of 1000 endpoints in a second", lines)
	}
	// The newest are remembered.
	kept := l.Newest()
	if len(kept) != gateway.KeptRefusals || kept[0].Detail != "endpoint 999" || kept[gateway.KeptRefusals-1].Detail != "endpoint 936" {
		t.Errorf("%d are remembered, from %+v", len(kept), kept[0])
	}
	if kept := new(gateway.Refusals).Newest(); len(kept) != 0 {
		t.Errorf("remembered of nothing: %v", kept)
	}
}
