package gateway_test

import (
	"bytes"
	"encoding/json"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/gateway"
)

func TestAccessLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		l := &gateway.AccessLog{Logger: hclog.New(&hclog.LoggerOptions{Output: &out, JSONFormat: true}).With("proxy_id", "gw"), Sample: 1}
		c := gateway.Connection{
			Listener: "default", Client: "10.0.0.9:1", ServerName: "api.dc2", Cluster: "api", Endpoint: "10.0.0.1:80",
			Since: time.Now(), BytesIn: 1, BytesOut: 2,
		}
		time.Sleep(1500 * time.Millisecond)
		l.Write(&c, gateway.CloseDone)
		var got map[string]any
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		delete(got, "@timestamp")
		if diff := cmp.Diff(map[string]any{
			"@level": "info", "@message": "connection", "proxy_id": "gw", "listener": "default", "peer": "10.0.0.9:1", "server_name": "api.dc2",
			"cluster": "api", "endpoint": "10.0.0.1:80", "bytes_in": 1.0, "bytes_out": 2.0, "duration_ms": 1500.0, "reason": "done",
		}, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

func TestAccessLogSample(t *testing.T) {
	const n = 10_000
	for sample, want := range map[float64][2]int{0: {0, 0}, 0.1: {700, 1300}, 1: {n, n}} {
		l, got := &gateway.AccessLog{Sample: sample}, 0
		for range n {
			if l.Sampled() {
				got++
			}
		}
		if got < want[0] || got > want[1] {
			t.Errorf("sample %v: %d of %d, want from %d to %d", sample, got, n, want[0], want[1])
		}
	}
	if (*gateway.AccessLog)(nil).Sampled() {
		t.Error("none writes something")
	}
}
