package gateway_test

import (
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/gateway"
)

// TestHoldOff wants what is queued to be accepted, and nobody else.
func TestHoldOff(t *testing.T) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // the test closes it
	queued, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer queued.Close() //nolint:errcheck // it was only to connect
	if err := gateway.HoldOffConn(l.(*net.TCPListener)); errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOPROTOOPT) {
		t.Skipf("this kernel has no filters for TCP sockets: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	const moment = 200 * time.Millisecond
	if c, err := net.DialTimeout("tcp", l.Addr().String(), moment); !timedOut(err) {
		t.Errorf("connect to a socket that is held off: %v, %v; want a timeout", c, err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // it has served
	// It works both ways, past the filter.
	for _, dir := range [][2]net.Conn{{queued, c}, {c, queued}} {
		if _, err := dir[0].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := dir[1].SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := dir[1].Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := net.DialTimeout("tcp", l.Addr().String(), moment); err == nil || timedOut(err) {
		t.Errorf("connect to a closed socket: %v, want that it is refused", err)
	}
}

func timedOut(err error) bool {
	ne := net.Error(nil)
	return errors.As(err, &ne) && ne.Timeout()
}
