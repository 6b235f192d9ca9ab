package memnet

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// connected returns both ends of a connection from a to b.
func connected(t *testing.T, n *Network) (a, b net.Conn) {
	t.Helper()
	l, err := n.Host("b", "10.0.0.2").Listen("10.0.0.2:1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	if a, err = n.Host("a", "10.0.0.1").Dial(t.Context(), "10.0.0.2:1"); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func TestStreamCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := connected(t, &Network{})
		if _, err := io.WriteString(a, "last words"); err != nil {
			t.Fatal(err)
		}
		_ = a.Close()
		if got, err := io.ReadAll(b); err != nil || string(got) != "last words" {
			t.Errorf("read %q, %v", got, err)
		}
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after close: %v", err)
		}
		_ = b.Close()
	})
}

func TestDeadlineWakesReaderAndWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := connected(t, &Network{})
		began := time.Now()
		_ = a.SetReadDeadline(began.Add(time.Hour))
		go func() {
			synctest.Wait() // the reader waits
			_ = a.SetReadDeadline(began.Add(time.Second))
		}()
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != time.Second {
			t.Errorf("read: %v after %v", err, time.Since(began))
		}
		_ = a.SetWriteDeadline(began.Add(time.Minute))
		n, err := a.Write(make([]byte, maxBuffered+1))
		if n != maxBuffered || !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != time.Minute {
			t.Errorf("write: %d, %v after %v", n, err, time.Since(began))
		}
	})
}

func TestPartitionHoldsWhatIsWrittenUntilHeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n Network
		a, b := connected(t, &n)
		ga, gb := n.Host("a", "10.0.0.1").Gossip(7), n.Host("b", "10.0.0.2").Gossip(7)
		n.Partition([]string{"a"}, []string{"b"})
		if _, err := io.WriteString(a, "x"); err != nil {
			t.Fatal(err)
		}
		_ = b.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read over the cut: %v", err)
		}
		_ = b.SetReadDeadline(time.Time{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.Host("a", "10.0.0.1").Dial(ctx, "10.0.0.2:1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial over the cut: %v", err)
		}
		if _, err := ga.WriteTo([]byte("lost"), "10.0.0.2:7"); err != nil {
			t.Errorf("packet over the cut: %v", err)
		}
		n.Heal()
		if _, err := io.ReadFull(b, make([]byte, 1)); err != nil {
			t.Errorf("read after healing: %v", err)
		}
		if _, err := ga.WriteTo([]byte("kept"), "10.0.0.2:7"); err != nil {
			t.Error(err)
		}
		if p := <-gb.PacketCh(); string(p.Buf) != "kept" || p.From.String() != "10.0.0.1:7" {
			t.Errorf("got packet %q from %v", p.Buf, p.From)
		}
	})
}

func TestCrashResets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n Network
		a, _ := connected(t, &n)
		n.Host("b", "10.0.0.2").Gossip(7)
		n.Crash("b")
		if _, err := a.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v", err)
		}
		if _, err := n.Host("a", "10.0.0.1").Dial(t.Context(), "10.0.0.2:1"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v", err)
		}
		if _, err := n.Host("b", "10.0.0.2").Listen(":1"); err == nil {
			t.Error("a host that is down listens")
		}
		n.Restart("b")
		l, err := n.Host("b", "10.0.0.2").Listen(":1")
		if err != nil {
			t.Fatal(err)
		}
		_ = l.Close()
		n.Host("b", "10.0.0.2").Gossip(7)
	})
}
