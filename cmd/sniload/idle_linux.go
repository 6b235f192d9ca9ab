package main

import (
	"context"
	"flag"
	"fmt"
	"runtime"
	"time"
)

// enough connections are measured even when they are fewer than were wanted.
const enough = 1000

func runIdle(ctx context.Context, fs *flag.FlagSet, args []string) error {
	l := newLoad(fs, 3000)
	hold := fs.Duration("hold", time.Second, "time from the last connection to the measurement, and of the CPU that is spent on nothing")
	ctx, cancel, err := l.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	runtime.GOMAXPROCS(1)
	var out outcome
	if fd, err := l.dial(0); err != nil {
		out.fail(err)
	} else {
		rawClose(fd)
	}
	// Some are there before, so that what is made with the first of them, such as what
	// is known of their sources, is not taken for what each of them needs.
	ahead := make([]int, 0, min(l.conns/4, 500))
	for i := range cap(ahead) {
		if fd, err := l.dial(i); err == nil {
			ahead = append(ahead, fd)
		}
	}
	defer func() {
		for _, fd := range ahead {
			rawClose(fd)
		}
	}()
	settle(ctx, 300*time.Millisecond)

	before := memoryOf(l.proxies)
	fds := make([]int, 0, l.conns)
	l.begin()
	for i := range l.conns {
		fd, err := l.dial(i)
		if err != nil {
			out.fail(err)
			if out.Failed > 20 && len(fds) >= enough {
				out.Failed = l.conns - len(fds)
				break // the forwarder can have no more, which shows
			}
			if out.Failed > 20 {
				return fmt.Errorf("open idle connections: after %d of %d: %w", len(fds), l.conns, err)
			}
			continue
		}
		fds = append(fds, fd)
	}
	wall := time.Since(l.began)
	settle(ctx, *hold)
	n := float64(len(fds))
	out.Metrics = l.finish(n, wall)
	after := memoryOf(l.proxies)
	idle := spentBy(l.proxies)
	settle(ctx, *hold)
	idle = spentBy(l.proxies).minus(idle)
	for _, fd := range fds {
		rawClose(fd)
	}
	out.Metrics["user"] = float64(after.rss-before.rss) / n
	out.Metrics["kernel"] = float64(after.kernel-before.kernel) / n
	out.Metrics["files"] = float64(after.files-before.files) / n
	out.Metrics["idle"] = idle.cpu.Seconds() / hold.Seconds()
	out.Metrics["open"] = n
	out.Metrics["base"] = float64(before.rss)
	return out.print()
}
