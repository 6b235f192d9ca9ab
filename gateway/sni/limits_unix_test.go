//go:build unix

package sni

import (
	"io"
	"net"
	"runtime"
	"syscall"
	"testing"

	"github.com/sluicemesh/sluice/gateway"
)

// setLimit sets a limit, whose type is not the same on all systems.
func setLimit[T int64 | uint64](limit *T, n int) { *limit = T(n) }

// fewDescriptors leaves this process with n more descriptors to open, and
// returns a function that makes it more.
func fewDescriptors(t *testing.T, n int) (more func(n int)) {
	t.Helper()
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	top, err := syscall.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	syscall.Close(top)
	low := was
	setLimit(&low.Cur, top+64)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	var fill []int
	more = func(n int) {
		for ; n > 0 && len(fill) > 0; n-- {
			syscall.Close(fill[len(fill)-1])
			fill = fill[:len(fill)-1]
		}
	}
	t.Cleanup(func() {
		more(len(fill))
		syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was)
	})
	for {
		fd, err := syscall.Dup(0)
		if err != nil {
			break
		}
		fill = append(fill, fd)
	}
	more(n)
	return more
}

func TestOutOfDescriptors(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := serve(t, func(c *net.TCPConn) {
			if expect(c, hello) == nil {
				io.WriteString(c, "H")
			}
		})
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		first := f.dial(hello)
		expectTag(t, first, "H")
		first.Close()
		f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 0 })

		// One for the client: it waits in the backlog until there are more.
		more := fewDescriptors(t, 1)
		c := f.dial(hello)
		f.untilCounted(func(s gateway.Status) bool { return s.LastError != "" })
		more(8)
		expectTag(t, c, "H")
		if ep := f.cluster("web").Endpoints[0]; ep.Failed != 0 {
			t.Errorf("the endpoint is blamed: %+v", ep)
		}
	})
}

func TestOutOfDescriptorsToConnect(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		web := clusterOf("web", closedPort(t))
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{web}, "web.example", "web"))
		f.addr()
		fewDescriptors(t, 2) // the two ends of the client's connection
		if got := f.refused(f.dial(hello)); got.Reason != gateway.RefuseLimit || got.Detail != "socket: too many open files" {
			t.Errorf("refusal: %+v", got)
		}
		if c := f.cluster("web"); c.Active != 0 || c.Failed != 0 {
			t.Errorf("cluster: %+v", c)
		}
	})
}

func TestFallsBackWithoutEpoll(t *testing.T) {
	if runtime.GOOS == "linux" {
		fewDescriptors(t, 5) // two for each of 100 loops there are not
	}
	before := openFDs(t)
	eng, err := New(Config{Engine: EngineAuto, Workers: 100}).newEngine()
	if err != nil {
		t.Fatal(err)
	}
	defer eng.stop()
	if _, ok := eng.(*netpoll); !ok {
		t.Errorf("the engine is %T", eng)
	}
	if _, err := New(Config{Engine: EngineEpoll, Workers: 100}).newEngine(); err == nil {
		t.Error("an engine that was asked for by name is replaced by another")
	}
	if after := openFDs(t); after != before {
		t.Errorf("%d descriptors are left of an engine that did not start", after-before)
	}
}
