package main

import (
	"context"
	"flag"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// player is a connection with a message on its way.
type player struct {
	fd   int
	sent time.Time
	got  int
}

// pingPong sends a message on every connection, and the next when it came back.
type pingPong struct {
	*load
	message []byte
	players map[int]*player
	out     outcome
	lat     []time.Duration
}

func runPingPong(ctx context.Context, fs *flag.FlagSet, args []string) error {
	p := &pingPong{load: newLoad(fs, 64), players: map[int]*player{}, lat: make([]time.Duration, 0, 1<<20)}
	size := fs.Int("size", 1, "bytes of a message")
	d := fs.Duration("d", 4*time.Second, "how long")
	ctx, cancel, err := p.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	if *size < 1 || *size > len(pattern) {
		return fmt.Errorf("-size %d is not from 1 to %d", *size, len(pattern))
	}
	runtime.GOMAXPROCS(1)
	p.message = pattern[:*size]
	for i := range p.conns {
		fd, err := p.dial(i)
		if err != nil {
			p.out.fail(err)
			continue
		}
		if _, e := rawSend(fd, []byte("E")); e != 0 {
			return fmt.Errorf("send command: %w", e)
		}
		p.players[fd] = &player{fd: fd}
		p.poll.add(fd, unix.EPOLLIN)
	}
	if err := p.play(ctx, min(*d, 300*time.Millisecond)); err != nil { // warms up
		return err
	}
	p.begin()
	if err := p.play(ctx, *d); err != nil {
		return err
	}
	p.out.Metrics = p.finish(float64(len(p.lat)), time.Since(p.began))
	latencies(p.out.Metrics, p.lat)
	return p.out.print()
}

// play goes on for d and until all messages are back.
func (p *pingPong) play(ctx context.Context, d time.Duration) error {
	p.lat = p.lat[:0]
	now := time.Now()
	end := now.Add(d)
	active := 0
	for _, c := range p.players {
		if p.send(c, now) {
			active++
		}
	}
	for active > 0 {
		events := p.poll.wait(waitLong)
		if len(events) == 0 && ctx.Err() != nil {
			return fmt.Errorf("%d messages did not come back: %w", active, context.Cause(ctx))
		}
		for _, ev := range events {
			c := p.players[int(ev.Fd)]
			if c == nil {
				continue
			}
			n, e := rawRecv(c.fd, p.buf)
			if e == unix.EAGAIN {
				continue
			}
			if e != 0 || n == 0 {
				p.drop(c, fmt.Errorf("receive: %d bytes, %w", n, e))
				active--
				continue
			}
			if c.got += n; c.got < len(p.message) {
				continue
			}
			now = time.Now()
			p.lat = append(p.lat, now.Sub(c.sent))
			if !now.Before(end) || !p.send(c, now) {
				active--
			}
		}
	}
	return nil
}

func (p *pingPong) send(c *player, now time.Time) bool {
	c.sent, c.got = now, 0
	if n, e := rawSend(c.fd, p.message); e != 0 || n != len(p.message) {
		p.drop(c, fmt.Errorf("send: %d bytes, %w", n, e))
		return false
	}
	return true
}

func (p *pingPong) drop(c *player, err error) {
	p.out.fail(err)
	delete(p.players, c.fd)
	rawClose(c.fd)
}
