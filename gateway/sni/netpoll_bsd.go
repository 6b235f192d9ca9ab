//go:build unix && !linux

package sni

import (
	"net"
	"syscall"
)

// polled is what the runtime's poller tells of a socket.
type polled struct {
	raw syscall.RawConn
	fd  int32
}

func (w *polled) init(c *net.TCPConn) (err error) {
	if w.raw, err = c.SyscallConn(); err != nil {
		return err
	}
	return w.raw.Control(func(fd uintptr) { w.fd = int32(fd) })
}

func recv(fd int32, b []byte) (int, syscall.Errno) { return again(syscall.Read, fd, b) }
func send(fd int32, b []byte) (int, syscall.Errno) { return again(syscall.Write, fd, b) }

// again makes a call that a signal may interrupt.
func again(call func(int, []byte) (int, error), fd int32, b []byte) (int, syscall.Errno) {
	for {
		n, err := call(int(fd), b)
		if err == nil {
			return n, 0
		}
		if errno, ok := err.(syscall.Errno); !ok {
			return 0, syscall.EIO
		} else if errno != syscall.EINTR {
			return 0, errno
		}
	}
}

// splice is called nowhere: usable says that there are no pipes.
func (h *half) splice(int) (moved int, drained, ok bool) { return 0, true, true }

func (h *half) empty(int32) syscall.Errno { return 0 }
