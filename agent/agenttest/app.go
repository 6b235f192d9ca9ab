package agenttest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// Echo serves an application that sends back what it is sent, until the end of
// the test. With a name it sends that first.
func Echo(t testing.TB, addr, name string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	EchoOn(t, l, name)
}

// EchoOn is [Echo] on a listener, which it owns from then on.
func EchoOn(t testing.TB, l net.Listener, name string) {
	var wg sync.WaitGroup
	var mu sync.Mutex // guards open
	open := map[net.Conn]bool{}
	serve := func(c net.Conn) {
		defer func() {
			mu.Lock()
			delete(open, c)
			mu.Unlock()
			_ = c.Close() // it has been served
		}()
		if _, err := io.WriteString(c, name); err != nil {
			return
		}
		if _, err := io.Copy(c, c); err == nil {
			_ = c.(*net.TCPConn).CloseWrite() // the client may be gone
		}
	}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() { serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close() // it has served
		mu.Lock()
		for c := range open {
			_ = c.Close() // its test is over
		}
		mu.Unlock()
		wg.Wait()
	})
}

// Dialer connects to an address.
type Dialer func(addr string) (net.Conn, error)

// Direct dials in the test's own network.
func Direct(addr string) (net.Conn, error) { return net.DialTimeout("tcp", addr, callLimit) }

const callLimit = 10 * time.Second

// Call opens a connection to an [Echo] without a name, has it answer, and ends the
// connection in order.
func Call(dial Dialer, addr string) error {
	c, err := Open(dial, addr)
	if err != nil {
		return err
	}
	return errors.Join(c.Ping(), c.End())
}

// Conn is an open connection to an [Echo].
type Conn struct {
	net.Conn
	n int
}

// Open connects.
func Open(dial Dialer, addr string) (*Conn, error) {
	c, err := dial(addr)
	if err != nil {
		return nil, err
	}
	return &Conn{Conn: c}, nil
}

// Ping sends something and wants it back.
func (c *Conn) Ping() error {
	c.n++
	msg := fmt.Appendf(nil, "message %8d;", c.n)
	if err := c.SetDeadline(time.Now().Add(callLimit)); err != nil {
		return err
	}
	if _, err := c.Write(msg); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	got := make([]byte, len(msg))
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	if !bytes.Equal(got, msg) {
		return fmt.Errorf("received %q, sent %q", got, msg)
	}
	return nil
}

// End closes the sending side, wants the end of the other's, and closes.
func (c *Conn) End() error {
	err := c.Conn.(*net.TCPConn).CloseWrite()
	if err == nil {
		var n int64
		if n, err = io.Copy(io.Discard, c); err == nil && n > 0 {
			err = fmt.Errorf("%d bytes too many", n)
		}
	}
	return errors.Join(err, c.Close())
}
