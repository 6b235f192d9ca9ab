package main

import (
	"os"
	"strings"
	"testing"
)

func TestPeerConfigs(t *testing.T) {
	set := setup{Port: 21007, Workers: 3, Files: 1000, Dir: t.TempDir(), Routes: newRoutes(2, backendAddrs(), tlsAddr)}
	want := map[string][]string{
		"haproxy":        {"nbthread 3", "maxconn 480\ndefaults", "bind 127.0.0.1:21007", "backend b1\n    server s 127.1.0.2:19443"},
		"haproxy-splice": {"maxpipes 50", "option splice-request"},
		"nginx":          {"worker_processes 3;", "*.w001.bench.test 127.1.0.2:19443;", "h000000.bench.test 127.1.0.1:19443;"},
		"sniproxy":       {"    h000001\\.bench\\.test 127.1.0.2:19443", "    .*\\.w000\\.bench\\.test 127.1.0.1:19443"},
		"envoy":          {`- "*.w001.bench.test"`, `cluster: "btls"`, "{address: 127.1.0.200, port_value: 19444}"},
	}
	for _, c := range contenders("sluice", "bench") {
		if c.config == "" {
			continue
		}
		path, err := c.writeConfig(set)
		if err != nil {
			t.Error(err)
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range append(want[c.name], "21007") {
			if !strings.Contains(string(b), s) {
				t.Errorf("%s has no %q:\n%s", c.name, s, b)
			}
		}
		delete(want, c.name)
	}
	if len(want) > 0 {
		t.Errorf("no contender has a configuration of %v", want)
	}
	b, err := os.ReadFile(set.Dir + "/haproxy.map")
	if err != nil {
		t.Fatal(err)
	}
	// What is left are the lines of names, wildcards being no names to HAProxy's map.
	if got := strings.Fields(string(b)); strings.Join(got, " ") != "h000000.bench.test b0 h000001.bench.test b1 tls.bench.test btls" {
		t.Errorf("map: %q", got)
	}
}

func TestStageTestsAreShown(t *testing.T) {
	shown := map[string]bool{}
	for _, tab := range tables {
		shown[tab.test] = true
	}
	for _, s := range stages(fullSizes, 2) {
		for _, test := range s.tests {
			if !shown[test.name] {
				t.Errorf("stage %s: no table shows %s", s.name, test.name)
			}
		}
	}
}

func TestLoadRefusesOthers(t *testing.T) {
	for _, target := range []string{"192.0.2.1:443", "[::1]:443", "localhost:443"} {
		if err := run([]string{"connrate", "-target", target}); err == nil {
			t.Errorf("it loads %s", target)
		}
	}
}
