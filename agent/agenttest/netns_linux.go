package agenttest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Network is a set of hosts, each a network namespace, and the bridges that join
// them. Nothing of it is to be seen outside.
type Network struct {
	t      testing.TB
	prefix string
	// hub is the namespace that has all bridges.
	hub string
}

// NewNetwork makes a network with no hosts, which the end of the test removes. The
// test is skipped where this process may not make one.
func NewNetwork(t testing.TB) *Network {
	t.Helper()
	n := &Network{t: t, prefix: fmt.Sprintf("sluice%d-", os.Getpid())}
	n.hub = n.prefix + "hub"
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if out, err := exec.Command("ip", "netns", "add", n.hub).CombinedOutput(); err != nil {
		t.Skipf("network namespaces are not permitted here: ip netns add: %v: %s", err, out)
	}
	t.Cleanup(func() { n.ip("netns", "delete", n.hub) })
	return n
}

func (n *Network) ip(args ...string) {
	n.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		n.t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// Bridge makes a bridge.
func (n *Network) Bridge(name string) {
	n.t.Helper()
	n.ip("-n", n.hub, "link", "add", name, "type", "bridge")
	n.ip("-n", n.hub, "link", "set", name, "up")
}

// Host is a network namespace.
type Host struct {
	net  *Network
	name string
	ns   *os.File
}

// Host makes a host that has only loopback.
func (n *Network) Host(name string) *Host {
	n.t.Helper()
	h := &Host{net: n, name: name}
	n.ip("netns", "add", n.prefix+name)
	n.t.Cleanup(func() { n.ip("netns", "delete", n.prefix+name) })
	n.ip("-n", n.prefix+name, "link", "set", "lo", "up")
	var err error
	if h.ns, err = os.Open(filepath.Join("/run/netns", n.prefix+name)); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = h.ns.Close() }) // it was only read
	return h
}

// port is the name of the host's end in the hub.
func (h *Host) port(bridge string) string { return h.name + "-" + bridge }

// Join puts the host on a bridge, with an interface of the bridge's name.
func (h *Host) Join(bridge, cidr string) {
	h.net.t.Helper()
	ns := h.net.prefix + h.name
	h.net.ip("-n", h.net.hub, "link", "add", h.port(bridge), "type", "veth", "peer", "name", bridge, "netns", ns)
	h.net.ip("-n", ns, "addr", "add", cidr, "dev", bridge)
	h.net.ip("-n", ns, "link", "set", bridge, "up")
	h.net.ip("-n", h.net.hub, "link", "set", h.port(bridge), "up")
	h.Plug(bridge)
}

// Plug connects the host's interface with its bridge again.
func (h *Host) Plug(bridge string) {
	h.net.t.Helper()
	h.net.ip("-n", h.net.hub, "link", "set", h.port(bridge), "master", bridge)
}

// Unplug lets everything that the host sends to the bridge disappear, as a broken
// line does: the host is not told.
func (h *Host) Unplug(bridge string) {
	h.net.t.Helper()
	h.net.ip("-n", h.net.hub, "link", "set", h.port(bridge), "nomaster")
}

// Start runs the binary on the host.
func (h *Host) Start(t testing.TB, c Config) *Node {
	t.Helper()
	c.Dial = h.Dial
	return StartProcess(t, c, "ip", "netns", "exec", h.net.prefix+h.name)
}

// in runs f on a thread that is in the namespace. What f opens stays there.
func (h *Host) in(f func() error) error {
	runtime.LockOSThread()
	old, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer old.Close() //nolint:errcheck // it was only read
	if err := unix.Setns(int(h.ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter namespace of %s: %w", h.name, err)
	}
	ferr := f()
	if err := unix.Setns(int(old.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("leave namespace of %s: %w", h.name, err) // the thread stays locked, and ends with the goroutine
	}
	runtime.UnlockOSThread()
	return ferr
}

// Dial connects from the host. The address has an IP address.
func (h *Host) Dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	err = h.in(func() (err error) {
		c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Dialer is [Host.Dial] for [Call].
func (h *Host) Dialer() Dialer {
	return func(addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(context.Background(), callLimit)
		defer cancel()
		return h.Dial(ctx, "tcp", addr)
	}
}

// Listen listens on the host.
func (h *Host) Listen(addr string) (l net.Listener, err error) {
	err = h.in(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	return l, err
}
