package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// flood is many connections that send half a hello, or nothing, and stay. One that
// the forwarder closes is opened again.
type flood struct {
	*load
	size     int
	deadline time.Duration // the forwarder's, for a hello

	open  map[int]time.Time // by descriptor, since when
	shed  []time.Duration   // how long connections lived
	early int               // closed long before the deadline
	most  int               // open at a time
	out   outcome
}

// slack is how much later than its deadline a connection may be closed.
const slack = 1500 * time.Millisecond

func newFlood(l *load, size int, deadline time.Duration) (*flood, error) {
	f := &flood{load: &load{target: l.target, sa: l.sa, hellos: l.hellos, buf: make([]byte, 64), sources: 1 << 7}, size: size, deadline: deadline}
	var err error
	f.poll, err = newPoller()
	return f, err
}

// one opens a connection; every other says nothing at all.
func (f *flood) one() error {
	fd, err := f.socket()
	if err != nil {
		return err
	}
	if e := rawConnect(fd, &f.sa); e != 0 && e != unix.EINPROGRESS {
		rawClose(fd)
		return os.NewSyscallError("connect", e)
	}
	if hello := f.hellos[0]; f.sources%2 == 0 {
		if _, e := rawSend(fd, hello[:len(hello)/2]); e != 0 && e != unix.EAGAIN {
			rawClose(fd)
			return os.NewSyscallError("send", e)
		}
	}
	f.open[fd] = time.Now()
	f.poll.add(fd, unix.EPOLLIN|unix.EPOLLRDHUP)
	return nil
}

func (f *flood) ended(fd int) {
	since, ok := f.open[fd]
	if !ok {
		return
	}
	lived := time.Since(since)
	if n, e := rawRecv(fd, f.buf); e == 0 && n > 0 {
		f.out.fail(fmt.Errorf("half a hello was answered with %q", f.buf[:n]))
	}
	f.shed = append(f.shed, lived)
	switch {
	case lived < f.deadline*8/10:
		f.early++
	case lived > f.deadline+slack:
		f.out.fail(fmt.Errorf("half a hello was left open for %s", lived.Round(time.Millisecond)))
	}
	delete(f.open, fd)
	rawClose(fd)
}

// run keeps the connections open until ctx ends, and closes them.
func (f *flood) run(ctx context.Context) {
	f.open = map[int]time.Time{}
	// They come one by one: all at once, or many, would measure the accept queue, and
	// what this process itself takes from those it measures.
	gap := time.Second / time.Duration(f.size)
	pause := unix.NsecToTimespec(int64(gap / 4))
	for next := time.Now(); ctx.Err() == nil; {
		if now := time.Now(); len(f.open) < f.size && !now.Before(next) {
			// As many a second as it says, but not in a burst what was late.
			if next = next.Add(gap); now.Sub(next) > 4*gap {
				next = now
			}
			if err := f.one(); err != nil {
				f.out.fail(err)
			}
			f.most = max(f.most, len(f.open))
		}
		for _, ev := range f.poll.wait(0) {
			f.ended(int(ev.Fd))
		}
		unix.Nanosleep(&pause, nil)
	}
	for fd, since := range f.open {
		if d := time.Since(since); d > f.deadline+slack {
			f.out.fail(fmt.Errorf("half a hello was left open for %s", d.Round(time.Millisecond)))
		}
		rawClose(fd)
	}
}

// start floods until stop is called.
func (f *flood) start(ctx context.Context) (stop func() error, err error) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		f.run(ctx)
	}()
	return func() error {
		cancel()
		<-ended
		return nil
	}, nil
}

// runFlood measures what a flood does to others.
func runFlood(ctx context.Context, fs *flag.FlagSet, args []string) error {
	p := newPaced(fs, 8*time.Second)
	size := fs.Int("half", 4000, "connections that send half a hello, or nothing")
	deadline := fs.Duration("deadline", 5*time.Second, "the forwarder's deadline for a hello")
	ctx, cancel, err := p.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	runtime.GOMAXPROCS(2)
	f, err := newFlood(p.load, *size, *deadline)
	if err != nil {
		return err
	}
	if err := p.flood(ctx, f); err != nil {
		return err
	}
	return p.out.print()
}

func (p *paced) flood(ctx context.Context, f *flood) error {
	if err := p.run(ctx, f.start); err != nil {
		return err
	}
	p.out.Failed += f.out.Failed
	p.out.Problems = append(p.out.Problems, f.out.Problems...)
	m := p.out.Metrics
	m["held"], m["shed"], m["early"] = float64(f.most), float64(len(f.shed)), float64(f.early)
	if len(f.shed) > 0 {
		m["shedp50"] = percentile(f.shed, .5)
		m["shedlast"] = slices.Max(f.shed).Seconds()
	}
	return nil
}
