package agent

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/agent/config"
)

// TestWithoutEffect names what was set, and nothing where nothing was.
func TestWithoutEffect(t *testing.T) {
	for _, tc := range []struct {
		name, hcl string
		dev       bool
		want      []string
	}{
		{"nothing set", `data_dir = "d" bind_addr = "127.0.0.1"`, false, nil},
		{"what -dev sets", ``, true, nil},
		{"some", `data_dir = "d" bind_addr = "127.0.0.1" translate_wan_addrs = true ports { grpc = 8502 } limits { rpc_handshake_timeout = "1s" }`, false,
			[]string{"translate_wan_addrs", "limits.rpc_handshake_timeout", "ports.grpc"}},
		{"tokens", `data_dir = "d" bind_addr = "127.0.0.1" acl { tokens { agent = "s3cret" replication = "used" } }`, false,
			[]string{"acl.tokens.agent"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			rt, _, err := config.Load(config.Options{Dev: tc.dev, HCL: []string{tc.hcl}})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, slices.Clip(withoutEffect(rt))); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
