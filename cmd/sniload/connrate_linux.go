package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// attempt is a short connection: connect, send the hello, read the answer, close.
type attempt struct {
	fd    int
	began time.Time
	left  []byte // of the hello
}

// connRate opens connections as fast as the answers to others allow.
type connRate struct {
	*load
	byFD    map[int]*attempt
	started int
	out     outcome
	lat     []time.Duration
	next    func() [][]byte // the hellos to use; nil are those of the load
}

func runConnRate(ctx context.Context, fs *flag.FlagSet, args []string) error {
	r := &connRate{load: newLoad(fs, 32), byFD: map[int]*attempt{}}
	n := fs.Int("n", 20000, "connections")
	most := fs.Duration("most", 0, "`time` after which no more are opened; 0 is none")
	ctx, cancel, err := r.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	runtime.GOMAXPROCS(1)
	if err := r.open(ctx, min(500, *n), *most/5); err != nil { // warms up
		return err
	}
	settle(ctx, 200*time.Millisecond)
	r.out, r.lat, r.started = outcome{}, make([]time.Duration, 0, *n), 0
	r.begin()
	if err := r.open(ctx, *n, *most); err != nil {
		return err
	}
	wall := time.Since(r.began)
	settle(ctx, 300*time.Millisecond)
	r.out.Metrics = r.finish(float64(len(r.lat)), wall)
	latencies(r.out.Metrics, r.lat)
	return r.out.print()
}

// open makes n connections, or as many as can be begun in a time that is not 0.
func (r *connRate) open(ctx context.Context, n int, most time.Duration) error {
	r.lat = r.lat[:0]
	began := time.Now()
	for len(r.lat)+r.out.Failed < n {
		if most > 0 && time.Since(began) > most {
			n = r.started
		}
		for r.started < n && len(r.byFD) < r.conns {
			r.start()
		}
		events := r.poll.wait(waitLong)
		if len(events) == 0 && ctx.Err() != nil {
			return fmt.Errorf("%d of %d connections have ended: %w", len(r.lat)+r.out.Failed, n, context.Cause(ctx))
		}
		r.handle(events)
	}
	return nil
}

func (r *connRate) handle(events []unix.EpollEvent) {
	for _, ev := range events {
		if a := r.byFD[int(ev.Fd)]; a != nil {
			r.event(a, ev.Events)
		}
	}
}

func (r *connRate) start() {
	hellos := r.hellos
	if r.next != nil {
		hellos = r.next()
	}
	hello := hellos[r.started%len(hellos)]
	r.started++
	fd, err := r.socket()
	if err != nil {
		r.out.fail(err)
		return
	}
	a := &attempt{fd: fd, began: time.Now(), left: hello}
	r.byFD[fd] = a
	if e := rawConnect(fd, &r.sa); e != 0 && e != unix.EINPROGRESS {
		r.end(a, os.NewSyscallError("connect", e))
		return
	}
	// On loopback it is connected by now, most often.
	if !r.push(a) {
		return
	}
	events := uint32(unix.EPOLLIN)
	if len(a.left) > 0 {
		events |= unix.EPOLLOUT
	}
	r.poll.add(fd, events)
}

// push sends of the hello what it can; false when the connection ended.
func (r *connRate) push(a *attempt) bool {
	for len(a.left) > 0 {
		n, e := rawSend(a.fd, a.left)
		if e == unix.EAGAIN || e == unix.ENOTCONN {
			return true
		}
		if e != 0 {
			r.end(a, os.NewSyscallError("send", e))
			return false
		}
		a.left = a.left[n:]
	}
	return true
}

func (r *connRate) event(a *attempt, events uint32) {
	if len(a.left) > 0 && events&unix.EPOLLOUT != 0 {
		if !r.push(a) {
			return
		}
		if len(a.left) == 0 {
			r.poll.mod(a.fd, unix.EPOLLIN)
		}
	}
	if events&(unix.EPOLLIN|unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		if err := r.answer(a.fd); !errors.Is(err, unix.EAGAIN) {
			r.end(a, err)
		}
	}
}

func (r *connRate) end(a *attempt, err error) {
	if err != nil {
		r.out.fail(err)
	} else {
		r.lat = append(r.lat, time.Since(a.began))
	}
	delete(r.byFD, a.fd)
	rawClose(a.fd)
}
