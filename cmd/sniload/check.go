package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

// checker checks one forwarder that has the routes of the benchmark.
type checker struct {
	target string
	hellos [][]byte // of names that are routed
	pki    *pki
}

// check is something that every forwarder should do.
type check struct {
	name string
	run  func(k *checker, ctx context.Context) error
}

var checks = []check{
	{"hello is answered", (*checker).plain},
	{"64 MiB come back as they were", (*checker).echo},
	{"half-close: 32 MiB, the end, then the answer", (*checker).halfClose},
	{"half-close of small connections, 200 times", (*checker).halfCloseSmall},
	{"a slow reader holds the sender back", (*checker).backPressure},
	{"hello in 50-byte segments", (*checker).segments},
	{"hello in several TLS records", (*checker).records},
	{"a reset client is gone at the server", (*checker).reset},
	{"the server's end reaches the client", (*checker).serverEnds},
	{"half a hello and the end is closed", (*checker).earlyEnd},
	{"an unknown name is refused", (*checker).unknown},
	{"mutual TLS 1.3: 16 times 8 MiB by HTTP", (*checker).realTLS},
}

func newChecker(target string, certs *pki) (*checker, error) {
	hellos, err := newHellos(8, 64)
	if err != nil {
		return nil, err
	}
	return &checker{target, hellos, certs}, nil
}

// connect returns a connection that has said nothing yet.
func (k *checker) connect(ctx context.Context) (*net.TCPConn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", k.target)
	if err != nil {
		return nil, err
	}
	tc, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("dial %s: a %T", k.target, c)
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(20 * time.Second)
	}
	if err := tc.SetDeadline(deadline); err != nil {
		tc.Close()
		return nil, err
	}
	return tc, nil
}

// open returns a connection whose hello has been answered, and which was sent a
// command.
func (k *checker) open(ctx context.Context, i int, command ...byte) (*net.TCPConn, error) {
	c, err := k.connect(ctx)
	if err != nil {
		return nil, err
	}
	_, err = c.Write(k.hellos[i%len(k.hellos)])
	if err == nil {
		err = expectHello(c)
	}
	if err == nil && len(command) > 0 {
		_, err = c.Write(command)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func expectHello(c io.Reader) error {
	var b [1]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return fmt.Errorf("answer to hello: %w", err)
	}
	if b[0] != 'H' {
		return fmt.Errorf("answer to hello: %q", b)
	}
	return nil
}

func (k *checker) plain(ctx context.Context) error {
	c, err := k.open(ctx, 0)
	if err != nil {
		return err
	}
	return c.Close()
}

func (k *checker) echo(ctx context.Context) error {
	c, err := k.open(ctx, 1, 'E')
	if err != nil {
		return err
	}
	defer c.Close()
	const size = 64 << 20
	sent, got := sha256.New(), sha256.New()
	ended := make(chan error, 1)
	go func() {
		// Odd pieces, so that ends of buffers fall everywhere.
		_, err := io.CopyBuffer(onlyWriter{c, sent}, io.LimitReader(rand.Reader, size), make([]byte, 97001))
		ended <- err
	}()
	_, err = io.CopyN(got, c, size)
	if err != nil {
		c.Close() // the writer gives up
	}
	if err := errors.Join(err, <-ended); err != nil {
		return err
	}
	if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		return errors.New("other bytes came back than were sent")
	}
	return nil
}

// onlyWriter writes to both and hides how else c might be written to.
type onlyWriter struct{ c, sum io.Writer }

// Write implements [io.Writer].
func (w onlyWriter) Write(b []byte) (int, error) {
	n, err := w.c.Write(b)
	w.sum.Write(b[:n])
	return n, err
}

// count reads what the backend counted, and then the end.
func count(c io.Reader, want uint64) error {
	b, err := io.ReadAll(c)
	if err != nil {
		return fmt.Errorf("read the count: %w", err)
	}
	if len(b) != 8 {
		return fmt.Errorf("read the count: %d bytes, not 8", len(b))
	}
	if got := binary.BigEndian.Uint64(b); got != want {
		return fmt.Errorf("the backend received %d bytes of %d", got, want)
	}
	return nil
}

func (k *checker) halfClose(ctx context.Context) error {
	c, err := k.open(ctx, 2, 'C')
	if err != nil {
		return err
	}
	defer c.Close()
	const size = 32 << 20
	for range size / len(pattern) {
		if _, err := c.Write(pattern); err != nil {
			return err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	return count(c, size)
}

func (k *checker) halfCloseSmall(ctx context.Context) error {
	for i := range 200 {
		c, err := k.open(ctx, i, []byte("Cabcdef")...)
		if err != nil {
			return err
		}
		err = c.CloseWrite()
		if err == nil {
			err = count(c, 6)
		}
		c.Close()
		if err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
	}
	return nil
}

// gauge asks the backend how much it has sent and how many connections it has.
func gauge(c *net.TCPConn) (sent, open uint64, err error) {
	if _, err := c.Write([]byte{'Q'}); err != nil {
		return 0, 0, err
	}
	var b [16]byte
	if _, err := io.ReadFull(c, b[:]); err != nil {
		return 0, 0, fmt.Errorf("read the gauge: %w", err)
	}
	return binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:]), nil
}

// awaitGauge asks the backend until ok is true of the answer.
func awaitGauge(ctx context.Context, c *net.TCPConn, ok func(sent, open uint64) bool) error {
	for {
		sent, open, err := gauge(c)
		if err != nil || ok(sent, open) {
			return err
		}
		t := time.NewTimer(50 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("the backend has sent %d bytes and has %d connections: %w", sent, open, context.Cause(ctx))
		}
	}
}

func (k *checker) backPressure(ctx context.Context) error {
	// More than all buffers on the way can hold.
	const size, bound = 192 << 20, 96 << 20
	watch, err := k.open(ctx, 3)
	if err != nil {
		return err
	}
	defer watch.Close()
	before, _, err := gauge(watch)
	if err != nil {
		return err
	}
	c, err := k.open(ctx, 3, binary.BigEndian.AppendUint64([]byte{'D'}, size)...)
	if err != nil {
		return err
	}
	defer c.Close()
	// Nothing is read until the backend has not sent anything for a while.
	var last, quiet uint64
	if err := awaitGauge(ctx, watch, func(sent, _ uint64) bool {
		if quiet++; sent != last || sent == before {
			last, quiet = sent, 0
		}
		return quiet == 3 || last-before > bound
	}); err != nil {
		return err
	}
	if last-before > bound {
		return fmt.Errorf("%d bytes were taken that nobody read", last-before)
	}
	buf := make([]byte, 64<<10)
	for got := 0; got < size; {
		n, err := c.Read(buf[:min(len(buf), size-got)])
		if !bytes.Equal(buf[:n], pattern[got%256:][:n]) {
			return fmt.Errorf("other bytes than were sent, from %d on", got)
		}
		if got += n; err != nil {
			return fmt.Errorf("read after %d of %d bytes: %w", got, size, err)
		}
	}
	return nil
}

func (k *checker) segments(ctx context.Context) error {
	c, err := k.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	for hello := k.hellos[4]; len(hello) > 0; {
		n, err := c.Write(hello[:min(50, len(hello))])
		if err != nil {
			return err
		}
		hello = hello[n:]
		t := time.NewTimer(500 * time.Microsecond) // so that they are read one by one
		<-t.C
	}
	return expectHello(c)
}

func (k *checker) records(ctx context.Context) error {
	c, err := k.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write(splitRecords(k.hellos[5], 100)); err != nil {
		return err
	}
	return expectHello(c)
}

func (k *checker) reset(ctx context.Context) error {
	watch, err := k.open(ctx, 0)
	if err != nil {
		return err
	}
	defer watch.Close()
	// Connections of checks before may still be on their way out.
	if err := awaitGauge(ctx, watch, func(_, open uint64) bool { return open == 1 }); err != nil {
		return fmt.Errorf("before: %w", err)
	}
	const n = 50
	var all []*net.TCPConn
	defer func() {
		for _, c := range all {
			c.Close()
		}
	}()
	for i := range n {
		c, err := k.open(ctx, i)
		if err != nil {
			return err
		}
		all = append(all, c)
	}
	if err := awaitGauge(ctx, watch, func(_, open uint64) bool { return open == n+1 }); err != nil {
		return err
	}
	for _, c := range all {
		if err := errors.Join(c.SetLinger(0), c.Close()); err != nil {
			return err
		}
	}
	return awaitGauge(ctx, watch, func(_, open uint64) bool { return open == 1 })
}

func (k *checker) serverEnds(ctx context.Context) error {
	// The client goes on sending nothing and does not close: what ends it is the
	// server, which takes no such command.
	c, err := k.open(ctx, 6, '!')
	if err != nil {
		return err
	}
	defer c.Close()
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		return fmt.Errorf("want the end, got %d bytes, %w", len(b), err)
	}
	return nil
}

// refused wants the connection closed without a byte.
func refused(c *net.TCPConn) error {
	var b [1]byte
	n, err := c.Read(b[:])
	if n > 0 {
		return fmt.Errorf("want it closed, got the byte %q", b)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return errors.New("it is left open")
	}
	return nil // closed or reset
}

func (k *checker) earlyEnd(ctx context.Context) error {
	c, err := k.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write(k.hellos[0][:700]); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	return refused(c)
}

func (k *checker) unknown(ctx context.Context) error {
	hello, err := newHello("nobody.invalid")
	if err != nil {
		return err
	}
	c, err := k.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Write(hello); err != nil {
		return err
	}
	return refused(c)
}

func (k *checker) realTLS(ctx context.Context) error {
	errs := make([]error, 16)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = k.download(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (k *checker) download(ctx context.Context) error {
	tr := &http.Transport{DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&tls.Dialer{Config: k.pki.clientConfig()}).DialContext(ctx, "tcp", k.target)
	}}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+tlsName+"/8m", http.NoBody)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err != nil {
		return err
	}
	if n != 8<<20 {
		return fmt.Errorf("%d bytes, not 8 MiB", n)
	}
	return nil
}

// newTLSServer answers /8m with so much, and anything else with the server name
// and the length of the body.
func newTLSServer(certs *pki) *http.Server {
	big := make([]byte, 8<<20)
	return &http.Server{
		TLSConfig:         certs.serverConfig(),
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/8m" {
				_, _ = w.Write(big)
				return
			}
			n, err := io.Copy(io.Discard, r.Body)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			fmt.Fprintf(w, "%s got %d bytes\n", r.TLS.ServerName, n)
		}),
	}
}
