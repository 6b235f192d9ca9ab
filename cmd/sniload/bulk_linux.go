package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// stream is a connection on which much is sent: what is left each way.
type stream struct {
	fd          int
	write, read uint64
}

func runBulk(ctx context.Context, fs *flag.FlagSet, args []string) error {
	l := newLoad(fs, 8)
	dir := fs.String("dir", "down", "up, down or echo")
	gb := fs.Float64("gb", 4, "gigabytes (1e9) over all connections, one way")
	ctx, cancel, err := l.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	runtime.GOMAXPROCS(1)
	each := uint64(*gb * 1e9 / float64(l.conns))
	var command []byte
	var s stream
	switch *dir {
	case "up":
		command, s = binary.BigEndian.AppendUint64([]byte{'S'}, each), stream{write: each, read: 1}
	case "down":
		command, s = binary.BigEndian.AppendUint64([]byte{'D'}, each), stream{read: each}
	case "echo":
		command, s = []byte{'E'}, stream{write: each, read: each}
	default:
		return fmt.Errorf("-dir %q is none of up, down and echo", *dir)
	}

	var out outcome
	streams := map[int]*stream{}
	for i := range l.conns {
		fd, err := l.dial(i)
		if err != nil {
			out.fail(err)
			continue
		}
		streams[fd] = &stream{fd, s.write, s.read}
	}
	l.begin()
	for fd, s := range streams {
		if _, e := rawSend(fd, command); e != 0 {
			return fmt.Errorf("send command: %w", e)
		}
		events := uint32(unix.EPOLLIN)
		if s.write > 0 {
			events |= unix.EPOLLOUT
		}
		l.poll.add(fd, events)
	}
	var moved uint64
	for len(streams) > 0 {
		events := l.poll.wait(waitLong)
		if ctx.Err() != nil {
			return fmt.Errorf("%d connections have not ended: %w", len(streams), context.Cause(ctx))
		}
		for _, ev := range events {
			s := streams[int(ev.Fd)]
			n, err := l.move(s, ev.Events)
			moved += n
			if err != nil {
				out.fail(err)
			}
			if err != nil || s.write == 0 && s.read == 0 {
				delete(streams, s.fd)
				rawClose(s.fd)
			}
		}
	}
	wall := time.Since(l.began)
	settle(ctx, 100*time.Millisecond)
	out.Metrics = l.finish(float64(moved)/1e9, wall)
	return out.print()
}

// move reads and writes what an event allows, in turns, and returns how much.
func (l *load) move(s *stream, events uint32) (moved uint64, err error) {
	if events&unix.EPOLLERR != 0 {
		return 0, errors.New("the connection failed")
	}
	const turns = 4
	for i := 0; i < turns && events&(unix.EPOLLIN|unix.EPOLLHUP) != 0 && s.read > 0; i++ {
		n, e := rawDiscard(s.fd, l.buf)
		if e == unix.EAGAIN {
			break
		}
		if e != 0 || n == 0 {
			return moved, fmt.Errorf("receive with %d bytes to come: %d, %w", s.read, n, e)
		}
		s.read -= min(s.read, uint64(n))
		moved += uint64(n)
		if n < len(l.buf) {
			break
		}
	}
	if events&unix.EPOLLOUT == 0 || s.write == 0 {
		return moved, nil
	}
	for i := 0; i < turns && s.write > 0; i++ {
		n, e := rawSend(s.fd, pattern[:min(uint64(len(pattern)), s.write)])
		if e == unix.EAGAIN {
			break
		}
		if e != 0 {
			return moved, fmt.Errorf("send with %d bytes to go: %w", s.write, e)
		}
		s.write -= uint64(n)
		moved += uint64(n)
	}
	if s.write == 0 {
		l.poll.mod(s.fd, unix.EPOLLIN)
	}
	return moved, nil
}
