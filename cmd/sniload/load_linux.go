package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// waitLong is how long a load waits for an event before it looks whether its
// context has ended.
const waitLong = time.Second

// load is what all generators have in common.
type load struct {
	target         string
	proxy, backend int // process ids, 0 for none
	conns          int
	names, routes  int
	timeout        time.Duration

	sa      unix.RawSockaddrInet4
	hellos  [][]byte
	sources uint32
	poll    *poller
	buf     []byte

	proxies, others []int // the processes measured
	before, around  spent
	busy            time.Duration
	began           time.Time
}

// outcome is what a load prints: one line of JSON.
type outcome struct {
	Failed   int
	Problems []string `json:",omitempty"` // the first few
	Metrics  map[string]float64
}

func newLoad(fs *flag.FlagSet, conns int) *load {
	l := &load{buf: make([]byte, 256<<10)}
	fs.StringVar(&l.target, "target", "127.0.0.1:21000", "forwarder's `ip:port`, on loopback")
	fs.IntVar(&l.proxy, "pid", 0, "forwarder's process; its descendants count too")
	fs.IntVar(&l.backend, "backend-pid", 0, "backend's process")
	fs.IntVar(&l.conns, "c", conns, "connections at a time")
	fs.IntVar(&l.names, "names", 64, "server names used")
	fs.IntVar(&l.routes, "routes", 64, "routes that the names are spread over")
	fs.DurationVar(&l.timeout, "timeout", time.Minute, "time for all")
	return l
}

// prepare parses the flags. The end of the returned context is the load's
// deadline.
func (l *load) prepare(ctx context.Context, fs *flag.FlagSet, args []string) (context.Context, context.CancelFunc, error) {
	if err := fs.Parse(args); err != nil {
		return nil, nil, err
	}
	target, err := netip.ParseAddrPort(l.target)
	if err != nil {
		return nil, nil, fmt.Errorf("target: %w", err)
	}
	if !target.Addr().IsLoopback() || !target.Addr().Is4() {
		return nil, nil, fmt.Errorf("target %s is not IPv4 loopback: this is no tool to load others with", target)
	}
	if l.conns < 1 || l.names < 1 || l.routes < 1 {
		return nil, nil, errors.New("-c, -names and -routes are at least 1")
	}
	l.sa = sockaddr(target)
	if l.hellos, err = newHellos(l.names, l.routes); err != nil {
		return nil, nil, err
	}
	if l.poll, err = newPoller(); err != nil {
		return nil, nil, err
	}
	l.proxies = processTree(l.proxy)
	l.others = append(processTree(l.backend), os.Getpid())
	ctx, cancel := context.WithTimeout(ctx, l.timeout)
	return ctx, cancel, nil
}

// begin and finish enclose what is measured.
func (l *load) begin() {
	runtime.GC()
	l.before, l.around, l.busy = spentBy(l.proxies), spentBy(l.others), machineBusy()
	l.began = time.Now()
}

// finish returns what the units (connections, gigabytes, round trips) cost: CPU
// seconds of the forwarder (cpu) and of client, forwarder and backend together
// (path), and context switches of the forwarder; and which part of the machine's
// time went to anything else (strangers). wall is the time that the units took.
func (l *load) finish(units float64, wall time.Duration) map[string]float64 {
	proxy := spentBy(l.proxies).minus(l.before)
	path := proxy.cpu + spentBy(l.others).minus(l.around).cpu
	busy, all := machineBusy()-l.busy, time.Since(l.began)*time.Duration(runtime.NumCPU())
	m := map[string]float64{
		"units":     units,
		"rate":      units / wall.Seconds(),
		"strangers": max(0, float64(busy-path)/float64(all)),
	}
	if units > 0 {
		m["path"] = path.Seconds() / units
		if len(l.proxies) > 0 {
			m["cpu"] = proxy.cpu.Seconds() / units
			m["switches"] = float64(proxy.switches) / units
		}
	}
	return m
}

// latencies adds percentiles, in seconds, and sorts its argument.
func latencies(m map[string]float64, lat []time.Duration) {
	slices.Sort(lat)
	for _, p := range []struct {
		key  string
		part float64
	}{{"p50", .5}, {"p99", .99}, {"p999", .999}} {
		if len(lat) > 0 {
			m[p.key] = lat[int(math.Min(p.part*float64(len(lat)), float64(len(lat)-1)))].Seconds()
		}
	}
}

func (o *outcome) fail(err error) {
	o.Failed++
	if len(o.Problems) < 4 {
		o.Problems = append(o.Problems, err.Error())
	}
}

func (o *outcome) print() error {
	return json.NewEncoder(os.Stdout).Encode(o)
}

// socket returns one that is bound to one of many source addresses: ports of one
// would run out, since those of closed connections rest for a minute.
func (l *load) socket() (int, error) {
	fd, e := rawSocket()
	if e != 0 {
		return -1, os.NewSyscallError("socket", e)
	}
	rawSetInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	l.sources++
	src := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: [4]byte{127, 2, byte(l.sources >> 4 & 15), byte(1 + l.sources&15)}}
	if e := rawBind(fd, &src); e != 0 {
		rawClose(fd)
		return -1, os.NewSyscallError("bind", e)
	}
	rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	return fd, nil
}

// dial opens the i-th connection and returns when the backend has answered.
func (l *load) dial(i int) (int, error) {
	fd, err := l.socket()
	if err != nil {
		return -1, err
	}
	if err := l.greet(fd, l.hellos[i%len(l.hellos)]); err != nil {
		rawClose(fd)
		return -1, err
	}
	return fd, nil
}

func (l *load) greet(fd int, hello []byte) error {
	if e := rawConnect(fd, &l.sa); e != 0 && e != unix.EINPROGRESS {
		return os.NewSyscallError("connect", e)
	}
	if err := await(fd, unix.POLLOUT); err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	if n, e := rawSend(fd, hello); e != 0 || n != len(hello) {
		return fmt.Errorf("send hello: %d bytes, %w", n, e)
	}
	if err := await(fd, unix.POLLIN); err != nil {
		return fmt.Errorf("answer to hello: %w", err)
	}
	return l.answer(fd)
}

// answer reads the backend's answer to a hello.
func (l *load) answer(fd int) error {
	n, e := rawRecv(fd, l.buf)
	switch {
	case e != 0:
		return fmt.Errorf("answer to hello: %w", e)
	case n == 0:
		return errors.New("answer to hello: the connection was closed")
	case n != 1 || l.buf[0] != 'H':
		return fmt.Errorf("answer to hello: %d bytes that begin with %q", n, l.buf[0])
	}
	return nil
}

// await returns when the socket is ready; it waits 10 s.
func await(fd int, events int16) error {
	for deadline := time.Now().Add(10 * time.Second); ; {
		left := time.Until(deadline)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: events}}, int(max(left, 0).Milliseconds()))
		switch {
		case n > 0:
			return nil
		case err != nil && err != unix.EINTR:
			return os.NewSyscallError("poll", err)
		case left <= 0:
			return os.ErrDeadlineExceeded
		}
	}
}

// settle gives the forwarder time to end what it does once a load has stopped,
// closing for the most part.
func settle(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
