package main

import (
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// backend is the servers behind a forwarder, in one loop. The package comment
// tells what it answers.
type backend struct {
	poll      *poller
	wake      int // eventfd
	listeners map[int]bool
	addrs     []netip.AddrPort // as bound
	conns     []*serverConn    // by descriptor
	unused    []*serverConn
	buf       []byte
	sent      uint64 // for 'D'
	open      uint64
}

// serverConn is a connection; state is the command that is being done.
type serverConn struct {
	fd      int
	state   byte
	in      []byte // of a hello or a command that is not complete
	out     []byte // to be echoed, when the client was slow to read
	left    uint64 // of 'S' and 'D'
	count   uint64 // of 'C', and how much of the pattern was sent
	writing bool   // waits to write, not to read
}

const (
	stateHello   = 'h'
	stateCommand = 'c'
)

// next is what is to be done with a connection after a step.
type next int

const (
	again next = iota // there may be more to do
	later             // when an event comes
	done              // close it
)

func newBackend(addrs []netip.AddrPort) (*backend, error) {
	poll, err := newPoller()
	if err != nil {
		return nil, err
	}
	b := &backend{poll: poll, wake: -1, listeners: map[int]bool{}, buf: make([]byte, 256<<10)}
	if b.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		b.close()
		return nil, os.NewSyscallError("eventfd", err)
	}
	poll.add(b.wake, unix.EPOLLIN)
	for _, addr := range addrs {
		fd, bound, err := listen(addr)
		if err != nil {
			b.close()
			return nil, err
		}
		b.listeners[fd] = true
		b.addrs = append(b.addrs, bound)
		poll.add(fd, unix.EPOLLIN)
	}
	return b, nil
}

func (b *backend) close() {
	for _, c := range b.conns {
		if c != nil {
			rawClose(c.fd)
		}
	}
	for fd := range b.listeners {
		rawClose(fd)
	}
	if b.wake >= 0 {
		rawClose(b.wake)
	}
	b.poll.close()
}

// run serves until ctx ends, and closes everything.
func (b *backend) run(ctx context.Context) {
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(b.wake, binary.NativeEndian.AppendUint64(nil, 1))
	})
	defer func() {
		if !stop() {
			<-woken // it may be about to use the descriptor
		}
		b.close()
	}()
	for {
		for _, ev := range b.poll.wait(waitLong) {
			fd := int(ev.Fd)
			switch {
			case fd == b.wake:
				return
			case b.listeners[fd]:
				b.accept(fd)
			case fd < len(b.conns) && b.conns[fd] != nil:
				b.serve(b.conns[fd])
			}
		}
	}
}

func (b *backend) accept(listener int) {
	for range 64 {
		fd, e := rawAccept(listener)
		if e != 0 {
			return
		}
		for fd >= len(b.conns) {
			b.conns = append(b.conns, make([]*serverConn, 1024)...)
		}
		c := &serverConn{}
		if n := len(b.unused); n > 0 {
			c, b.unused = b.unused[n-1], b.unused[:n-1]
		}
		*c = serverConn{fd: fd, state: stateHello, in: c.in[:0], out: c.out[:0]}
		b.conns[fd] = c
		b.open++
		b.poll.add(fd, unix.EPOLLIN)
	}
}

func (b *backend) serve(c *serverConn) {
	step := again
	for step == again {
		switch c.state {
		case stateHello:
			step = b.readHello(c)
		case stateCommand:
			step = b.readCommand(c)
		case 'S':
			step = b.swallow(c)
		case 'D':
			step = b.download(c)
		case 'E':
			step = b.echo(c)
		case 'C':
			step = b.countAll(c)
		}
	}
	if step == done {
		rawClose(c.fd)
		b.conns[c.fd] = nil
		b.open--
		b.unused = append(b.unused, c)
	}
}

// after tells what a receive that gave nothing means.
func after(e syscall.Errno) next {
	if e == unix.EAGAIN || e == unix.EINTR {
		return later
	}
	return done // an error, or the end
}

// waitToWrite asks for the events of the one thing the connection waits for.
func (b *backend) waitToWrite(c *serverConn, writing bool) {
	if c.writing == writing {
		return
	}
	c.writing = writing
	if writing {
		b.poll.mod(c.fd, unix.EPOLLOUT)
	} else {
		b.poll.mod(c.fd, unix.EPOLLIN)
	}
}

func (b *backend) readHello(c *serverConn) next {
	n, e := rawRecv(c.fd, b.buf)
	if e != 0 || n == 0 {
		return after(e)
	}
	data := b.buf[:n]
	if len(c.in) > 0 {
		c.in = append(c.in, data...)
		data = c.in
	}
	used := helloLen(data)
	switch {
	case used < 0:
		return done
	case used == 0:
		if len(c.in) == 0 {
			c.in = append(c.in, data...)
		}
		return later
	}
	if _, e := rawSend(c.fd, []byte("H")); e != 0 {
		return done
	}
	c.state = stateCommand
	c.in = append(c.in[:0], data[used:]...)
	if len(c.in) == 0 {
		return later
	}
	return b.command(c)
}

// readCommand reads no more than a command: what follows belongs to it.
func (b *backend) readCommand(c *serverConn) next {
	n, e := rawRecv(c.fd, b.buf[:9])
	if e != 0 || n == 0 {
		return after(e)
	}
	c.in = append(c.in, b.buf[:n]...)
	return b.command(c)
}

// command begins the command at the start of c.in, when it is complete.
func (b *backend) command(c *serverConn) next {
	kind, rest := c.in[0], c.in[1:]
	switch kind {
	case 'E':
		c.out = append(c.out[:0], rest...)
	case 'C':
		c.count = uint64(len(rest))
	case 'Q':
		answer := binary.BigEndian.AppendUint64(nil, b.sent)
		answer = binary.BigEndian.AppendUint64(answer, b.open)
		c.in = c.in[:0]
		if _, e := rawSend(c.fd, answer); e != 0 {
			return done
		}
		return again
	case 'S', 'D':
		if len(rest) < 8 {
			return later
		}
		c.left, c.count = binary.BigEndian.Uint64(rest), 0
		if kind == 'S' {
			c.left -= min(c.left, uint64(len(rest)-8))
		}
	default:
		return done
	}
	c.state = kind
	c.in = c.in[:0]
	return again
}

func (b *backend) swallow(c *serverConn) next {
	for c.left > 0 {
		n, e := rawDiscard(c.fd, b.buf[:min(uint64(len(b.buf)), c.left)])
		if e != 0 || n == 0 {
			return after(e)
		}
		c.left -= uint64(n)
	}
	c.state = stateCommand
	if _, e := rawSend(c.fd, []byte("K")); e != 0 {
		return done
	}
	return again
}

func (b *backend) download(c *serverConn) next {
	for c.left > 0 {
		from := pattern[c.count%256:]
		n, e := rawSend(c.fd, from[:min(uint64(len(from)), c.left)])
		if e == unix.EAGAIN {
			b.waitToWrite(c, true)
			return later
		}
		if e != 0 {
			return done
		}
		c.left -= uint64(n)
		c.count += uint64(n)
		b.sent += uint64(n)
	}
	c.state = stateCommand
	b.waitToWrite(c, false)
	return later
}

func (b *backend) echo(c *serverConn) next {
	if len(c.out) > 0 {
		n, e := rawSend(c.fd, c.out)
		if e != 0 && e != unix.EAGAIN {
			return done
		}
		if e == 0 {
			c.out = c.out[:copy(c.out, c.out[n:])]
		}
		if len(c.out) > 0 {
			b.waitToWrite(c, true)
			return later
		}
		b.waitToWrite(c, false)
	}
	n, e := rawRecv(c.fd, b.buf)
	if e != 0 || n == 0 {
		return after(e)
	}
	k, e := rawSend(c.fd, b.buf[:n])
	if e == unix.EAGAIN {
		k, e = 0, 0
	}
	if e != 0 {
		return done
	}
	c.out = append(c.out, b.buf[k:n]...)
	if len(c.out) > 0 {
		b.waitToWrite(c, true)
		return later
	}
	if n < len(b.buf) {
		return later // drained, most likely; if not, there is another event
	}
	return again
}

func (b *backend) countAll(c *serverConn) next {
	for {
		n, e := rawDiscard(c.fd, b.buf)
		if e != 0 {
			return after(e)
		}
		if n == 0 {
			_, _ = rawSend(c.fd, binary.BigEndian.AppendUint64(nil, c.count))
			return done
		}
		c.count += uint64(n)
	}
}

func runBackend(ctx context.Context, fs *flag.FlagSet, args []string) error {
	if err := fs.Parse(args); err != nil {
		return err
	}
	runtime.GOMAXPROCS(1)
	b, err := newBackend(backendAddrs())
	if err != nil {
		return err
	}
	// Who started it waits for this line.
	fmt.Println("ready")
	b.run(ctx)
	return nil
}
