package sni

import (
	"cmp"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/gateway"
)

// congestionOf is the algorithm of a connection.
func congestionOf(t *testing.T, c syscall.Conn) (name string) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		name, err = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimRight(name, "\x00")
}

// otherCongestion is an algorithm that is not the system's default.
func otherCongestion(t *testing.T) string {
	t.Helper()
	read := func(name string) string {
		b, err := os.ReadFile("/proc/sys/net/ipv4/" + name)
		if err != nil {
			t.Skip(err)
		}
		return strings.TrimSpace(string(b))
	}
	own := read("tcp_congestion_control")
	for _, name := range strings.Fields(read("tcp_available_congestion_control")) {
		if name != own && checkCongestion(name) == nil {
			return name
		}
	}
	t.Skip("the kernel has one algorithm of congestion control")
	return ""
}

// socketsOf returns the algorithms of the forwarder's sockets: those that listen,
// those that were accepted, and those to an endpoint.
func socketsOf(t *testing.T, f *testForwarder, endpoint string) (listening, accepted, dialled []string) {
	t.Helper()
	want := addrPort(func() net.Addr { a, _ := net.ResolveTCPAddr("tcp", f.addr()); return a }()).Port()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	for _, e := range dir {
		n := 0
		for _, c := range e.Name() {
			n = 10*n + int(c-'0')
		}
		sa, err := unix.Getsockname(n)
		if err != nil {
			continue
		}
		in, ok := sa.(*unix.SockaddrInet4)
		if !ok {
			continue
		}
		to := false
		if sa, err := unix.Getpeername(n); err == nil {
			in, ok := sa.(*unix.SockaddrInet4)
			to = ok && in.Port == int(netip.MustParseAddrPort(endpoint).Port())
		}
		if in.Port != int(want) && !to {
			continue
		}
		cc, err := unix.GetsockoptString(n, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		if err != nil {
			continue
		}
		cc = strings.TrimRight(cc, "\x00")
		if to {
			dialled = append(dialled, cc)
		} else if l, err := unix.GetsockoptInt(n, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && l == 1 {
			listening = append(listening, cc)
		} else {
			accepted = append(accepted, cc)
		}
	}
	return listening, accepted, dialled
}

func TestCongestionControl(t *testing.T) {
	hello := helloFor(t, "web.example")
	other := otherCongestion(t)
	onEngines(t, func(t *testing.T, engine string) {
		b := greeter(t, hello, "H", echo)
		web := clusterOf("web", b.addr)
		tab := table([]gateway.Cluster{web}, "web.example", "web")
		with := func(client, endpoint string) *gateway.Table {
			next := *tab
			next.Listeners = []gateway.Listener{tab.Listeners[0]}
			next.Listeners[0].CongestionControl = client
			next.Clusters = []gateway.Cluster{web}
			next.Clusters[0].CongestionControl = endpoint
			return &next
		}
		f := start(t, Config{Engine: engine}, with("", ""))
		own := ""
		check := func(client, endpoint string) {
			t.Helper()
			c := f.dial(hello)
			expectTag(t, c, "H")
			defer c.Close()
			if own == "" {
				own = congestionOf(t, c)
			}
			client, endpoint = cmp.Or(client, own), cmp.Or(endpoint, own)
			listening, accepted, dialled := socketsOf(t, f, b.addr)
			if len(listening) == 0 || len(accepted) == 0 || len(dialled) == 0 {
				t.Fatal("the sockets were not found")
			}
			for _, cc := range listening {
				if cc != client {
					t.Errorf("the listener has %s, want %s", cc, client)
				}
			}
			if !slices.Contains(accepted, client) {
				t.Errorf("what was accepted has %v, want %s", accepted, client)
			}
			if !slices.Contains(dialled, endpoint) {
				t.Errorf("to the endpoint there is %v, want %s", dialled, endpoint)
			}
		}
		check("", "")
		f.apply(with(other, other))
		check(other, other)
		if l := f.Status().Listeners[0]; !l.Bound || l.Error != "" {
			t.Errorf("listener: %+v", l)
		}
		f.apply(with("nonesuch", "nonesuch"))
		s := f.Status()
		if l := s.Listeners[0]; !l.Bound || !strings.Contains(l.Error, `congestion control "nonesuch": the kernel has none`) {
			t.Errorf("listener: %+v", l)
		}
		if !strings.Contains(s.LastError, `connect to endpoints: congestion control "nonesuch"`) {
			t.Errorf("last error: %s", s.LastError)
		}
		check(other, "")
		f.apply(with("", ""))
		check("", "")
		if l := f.Status().Listeners[0]; !l.Bound || l.Error != "" {
			t.Errorf("listener: %+v", l)
		}
	})
}
