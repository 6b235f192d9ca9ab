package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The plan of the drains that are measured.
const (
	drainTimeout = 5 * time.Second
	drainRate    = 200
)

// draining takes a forwarder out of use under load: flows that are established must
// not notice until the drain's time for them is over, and calls that begin must come
// to their answer by the other forwarder of their list.
type draining struct {
	list    []string // addresses of forwarders; the first is drained
	hellos  [][]byte
	flows   int
	rate    int // calls per second
	quiet   time.Duration
	timeout time.Duration     // the drain's, for flows to finish
	begin   func() error      // the drain
	ended   func() (yes bool) // whether it is over, and the forwarder gone

	mu     sync.Mutex // guards what follows
	out    outcome
	calm   []time.Duration // set-up times before the drain
	during []time.Duration // and since it began
	moved  int             // calls that the other forwarder answered
	begun  time.Time       // when the drain began; zero before
	last   time.Duration   // when the last flow was ended by it
	held   int             // flows that were
}

func (d *draining) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.out.fail(err)
}

// stays is how many of ten flows are still there when the drain's time is over.
const stays = 2

// flow exchanges bytes until finish is closed, and then ends; every so many stay on,
// and must be ended by the drain, not before its time.
func (d *draining) flow(ctx context.Context, i int, opened func(), finish <-chan struct{}) {
	err := func() error {
		k := &checker{target: d.list[0], hellos: d.hellos}
		c, err := k.open(ctx, i, 'E')
		opened()
		if err != nil {
			return fmt.Errorf("open: %w", err)
		}
		defer c.Close()
		b, want := make([]byte, 64), bytes.Repeat([]byte{byte(i)}, 64)
		for {
			if _, err = c.Write(want); err == nil {
				_, err = io.ReadFull(c, b)
			}
			switch {
			case err == nil && !bytes.Equal(b, want):
				return errors.New("other bytes came back than were sent")
			case err != nil && i%10 < stays:
				return d.atLast(err)
			case err != nil:
				return err
			}
			select {
			case <-finish:
				if i%10 >= stays {
					return d.finish(c)
				}
				settle(ctx, 50*time.Millisecond)
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	}()
	if err != nil {
		d.fail(fmt.Errorf("flow %d: %w", i, err))
	}
}

// finish ends a flow from its own side.
func (d *draining) finish(c *net.TCPConn) error {
	if err := c.CloseWrite(); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err == nil && len(b) > 0 {
		err = fmt.Errorf("%d bytes came that nobody sent", len(b))
	}
	return err
}

// atLast judges the end of a flow that nobody wanted to end.
func (d *draining) atLast(cause error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	after := time.Since(d.begun)
	if d.begun.IsZero() || after < d.timeout {
		return fmt.Errorf("broken before its time: %w", cause)
	}
	d.held++
	d.last = max(d.last, after)
	return nil
}

// call asks the forwarders of the list, one after another until one can be connected
// to, as clients with a list of gateways do. One that it has connected to must answer.
func (d *draining) call(ctx context.Context, i int) {
	began := time.Now()
	for at, addr := range d.list {
		limited, cancel := context.WithTimeout(ctx, answerLimit)
		k := &checker{target: addr}
		c, err := k.connect(limited)
		if errors.Is(err, unix.ECONNREFUSED) && at < len(d.list)-1 {
			cancel()
			continue
		}
		if err == nil {
			if _, err = c.Write(d.hellos[i%len(d.hellos)]); err == nil {
				err = expectHello(c)
			}
			c.Close()
		}
		cancel()
		d.mu.Lock()
		switch {
		case err != nil:
			d.out.fail(fmt.Errorf("call %d, %s after the drain began, by forwarder %d: %w", i, time.Since(d.begun).Round(time.Millisecond), at+1, err))
		case d.begun.IsZero():
			d.calm = append(d.calm, time.Since(began))
		default:
			d.during = append(d.during, time.Since(began))
		}
		if at > 0 {
			d.moved++
		}
		d.mu.Unlock()
		return
	}
}

// calls makes them at the rate until stop is closed, and waits for all.
func (d *draining) calls(ctx context.Context, stop <-chan struct{}) {
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(time.Second / time.Duration(d.rate))
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-tick.C:
			wg.Go(func() { d.call(ctx, i) })
		case <-stop:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (d *draining) run(ctx context.Context) error {
	var flows, opened, calls sync.WaitGroup
	finish, stop := make(chan struct{}), make(chan struct{})
	for i := range d.flows {
		opened.Add(1)
		flows.Go(func() { d.flow(ctx, i, opened.Done, finish) })
	}
	opened.Wait()
	calls.Go(func() { d.calls(ctx, stop) })
	defer func() { flows.Wait() }()
	defer func() { close(stop); calls.Wait() }()

	settle(ctx, d.quiet)
	d.mu.Lock()
	d.begun = time.Now()
	d.mu.Unlock()
	if err := d.begin(); err != nil {
		close(finish)
		return fmt.Errorf("begin the drain: %w", err)
	}
	settle(ctx, d.timeout*6/10)
	close(finish)
	for !d.ended() {
		if time.Since(d.begun) > 3*d.timeout || ctx.Err() != nil {
			return fmt.Errorf("the drain is not over after %s", time.Since(d.begun).Round(time.Millisecond))
		}
		settle(ctx, 10*time.Millisecond)
	}
	took := time.Since(d.begun)
	settle(ctx, 500*time.Millisecond) // calls go on
	d.mu.Lock()
	defer d.mu.Unlock()
	d.out.Metrics = map[string]float64{"took": took.Seconds()}
	return nil
}

// tell adds what is known once everything has ended.
func (d *draining) tell() {
	m := d.out.Metrics
	if want := d.flows / 10 * stays; d.held != want {
		d.out.fail(fmt.Errorf("the drain has ended %d flows that stayed, not %d", d.held, want))
	}
	if d.moved == 0 {
		d.out.fail(errors.New("no call went by the other forwarder"))
	}
	m["flows"], m["calls"], m["moved"] = float64(d.flows), float64(len(d.calm)+len(d.during)), float64(d.moved)
	m["held"], m["last"] = float64(d.held), d.last.Seconds()
	m["p99quiet"], m["p99"] = percentile(d.calm, .99), percentile(d.during, .99)
	if len(d.during) > 0 {
		m["longest"] = slices.Max(d.during).Seconds()
	}
}

// runDraining drains a process.
func runDraining(ctx context.Context, fs *flag.FlagSet, args []string) error {
	l := newLoad(fs, 1)
	second := fs.String("second", "", "`ip:port` of the forwarder that is not drained")
	d := &draining{}
	fs.IntVar(&d.flows, "flows", 400, "flows that are established before")
	fs.IntVar(&d.rate, "rate", 300, "calls per second")
	fs.DurationVar(&d.quiet, "quiet", 2*time.Second, "time before the drain")
	fs.DurationVar(&d.timeout, "drain-timeout", drainTimeout, "the forwarder's")
	ctx, cancel, err := l.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	if *second == "" || l.proxy == 0 {
		return errors.New("-second and -pid are needed: calls move to the one, and the other is drained")
	}
	runtime.GOMAXPROCS(2)
	d.list, d.hellos = []string{l.target, *second}, l.hellos
	d.begin = func() error { return unix.Kill(l.proxy, unix.SIGTERM) }
	d.ended = func() bool {
		_, err := os.Stat(procFile(l.proxy, "stat"))
		return errors.Is(err, os.ErrNotExist)
	}
	if err := d.run(ctx); err != nil {
		return err
	}
	d.tell()
	return d.out.print()
}
