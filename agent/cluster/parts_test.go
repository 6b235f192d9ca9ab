package cluster

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/serf/serf"

	"github.com/sluicemesh/sluice/agent/cluster/memnet"
)

func TestValidateNamesEveryProblem(t *testing.T) {
	c := Config{
		Bootstrap: true, BootstrapExpect: 3, RaftMultiplier: 11, BindLAN: "zz",
		AdvertiseWAN: "0.0.0.0", SerfLANPort: 70000, GossipKey: "not base64",
	}
	err := c.Validate()
	if err == nil {
		t.Fatal("valid")
	}
	for _, want := range []string{
		"node_name cannot be empty",
		"'bootstrap_expect > 0' and 'bootstrap = true' are mutually exclusive",
		"performance.raft_multiplier cannot be 11. Must be between 1 and 10",
		"bind_addr: invalid ip address: zz",
		"Advertise address cannot be 0.0.0.0, :: or [::]",
		"ports.serf_lan: invalid port 70000",
		"encrypt has invalid key: ",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %q", want, err)
		}
	}
	if strings.Contains(err.Error(), "not base64") {
		t.Errorf("the key is in %q", err)
	}
}

func TestSortDatacenters(t *testing.T) {
	const ms = time.Millisecond
	got := sortDatacenters("own", map[string][]time.Duration{
		"own": {0}, "far": {90 * ms, 80 * ms, ms}, "near": {70 * ms, 20 * ms, 10 * ms},
		"b": {unknownDistance}, "a": {unknownDistance},
	})
	if want := []string{"own", "near", "far", "a", "b"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestServerList(t *testing.T) {
	m := func(name, port string) serf.Member {
		return serf.Member{Name: name, Addr: net.IPv4(10, 0, 0, 1), Status: serf.StatusAlive, Tags: map[string]string{
			tagRole: roleServer, tagDatacenter: "dc1", tagPort: port,
		}}
	}
	var l serverList
	event := func(typ serf.EventType, members ...serf.Member) {
		l.update(serf.MemberEvent{Type: typ, Members: members})
	}
	check := func(what string, known bool, want ...string) {
		t.Helper()
		servers, k := l.healthy("dc1")
		var got []string
		for _, s := range servers {
			got = append(got, s.name)
		}
		slices.Sort(got)
		if !slices.Equal(got, want) || k != known {
			t.Errorf("%s: healthy %v, known %v; want %v, %v", what, got, k, want, known)
		}
	}
	check("empty", false)
	client := m("client", "8300")
	client.Tags = map[string]string{tagRole: roleClient, tagDatacenter: "dc1"}
	event(serf.EventMemberJoin, m("a", "1"), m("b", "2"), client, m("broken", "no port"))
	check("joined", true, "a", "b")
	event(serf.EventMemberFailed, m("a", "1"))
	check("one failed", true, "b")
	event(serf.EventMemberLeave, m("b", "2"))
	check("one left", true)
	event(serf.EventMemberReap, m("a", "1"))
	check("one reaped", false)
	event(serf.EventMemberJoin, m("a", "1"), m("b", "2"), m("c", "3"))
	first, _ := l.healthy("dc1")
	l.demote(first[0].address)
	if now, _ := l.healthy("dc1"); now[2].name != first[0].name || now[0].name != first[1].name {
		t.Errorf("%s was demoted: %v", first[0].name, now)
	}
	l.sync([]serf.Member{m("c", "3"), m("d", "4")})
	check("synced", true, "c", "d")
}

func TestRewindable(t *testing.T) {
	for _, tc := range []struct {
		size   int
		length int64
		again  bool
	}{{10, 10, true}, {10, -1, true}, {maxRetryBody, -1, true}, {maxRetryBody + 1, -1, false}, {maxRetryBody + 1, maxRetryBody + 1, false}} {
		want := bytes.Repeat([]byte("x"), tc.size)
		r, err := http.NewRequest(http.MethodPut, "http://agent/", io.NopCloser(bytes.NewReader(want)))
		if err != nil {
			t.Fatal(err)
		}
		r.ContentLength = tc.length
		r, again, err := rewindable(r)
		if err != nil || again != tc.again {
			t.Errorf("size %d, length %d: again %v, %v", tc.size, tc.length, again, err)
		}
		if got, err := io.ReadAll(r.Body); err != nil || !bytes.Equal(got, want) {
			t.Errorf("size %d: read %d bytes, %v", tc.size, len(got), err)
		}
		if !again {
			continue
		}
		body, err := r.GetBody()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, want) {
			t.Errorf("size %d again: read %d bytes, %v", tc.size, len(got), err)
		}
	}
}

func TestMuxEndsWhatSaysNothingOrNonsense(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n memnet.Network
		h := n.Host("a", "10.0.0.1")
		l, err := h.Listen("10.0.0.1:8300")
		if err != nil {
			t.Fatal(err)
		}
		m := newMux(l, nil, hclog.NewNullLogger())
		ended := make(chan struct{})
		go func() { m.serve(); close(ended) }()
		for _, tc := range []struct {
			name, send string
			after      time.Duration
		}{{"silence", "", helloWithin}, {"nonsense", "GET / HTTP/1.1\r\n", 0}, {"tls where there is none", "\x16\x03\x01", 0}} {
			began := time.Now()
			c, err := h.Dial(t.Context(), "10.0.0.1:8300")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(c, tc.send); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("%s: read %v, want end of file", tc.name, err)
			}
			if took := time.Since(began); took != tc.after {
				t.Errorf("%s: closed after %v, want %v", tc.name, took, tc.after)
			}
			_ = c.Close()
		}
		open, err := h.Dial(t.Context(), "10.0.0.1:8300")
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		m.close()
		<-ended
		if _, err := open.Read(make([]byte, 1)); err == nil {
			t.Error("a connection outlived the mux")
		}
		_ = open.Close()
	})
}
