package main

import (
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// System calls on sockets that do not block, made without telling the scheduler.

// sockaddr of an IPv4 address.
func sockaddr(ap netip.AddrPort) unix.RawSockaddrInet4 {
	sa := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: ap.Addr().As4()}
	p := (*[2]byte)(unsafe.Pointer(&sa.Port))
	p[0], p[1] = byte(ap.Port()>>8), byte(ap.Port())
	return sa
}

func rawSocket() (int, syscall.Errno) {
	fd, _, e := syscall.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	return int(fd), e
}

func rawConnect(fd int, sa *unix.RawSockaddrInet4) syscall.Errno {
	_, _, e := syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(sa)), unix.SizeofSockaddrInet4)
	return e
}

func rawBind(fd int, sa *unix.RawSockaddrInet4) syscall.Errno {
	_, _, e := syscall.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(sa)), unix.SizeofSockaddrInet4)
	return e
}

func rawAccept(fd int) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), 0, 0, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	return int(n), e
}

func rawSetInt(fd, level, opt, value int) {
	v := int32(value)
	syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt), uintptr(unsafe.Pointer(&v)), 4, 0)
}

func rawSend(fd int, b []byte) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
	return int(n), e
}

func rawRecv(fd int, b []byte) (int, syscall.Errno) { return recvFlags(fd, b, 0) }

// rawDiscard receives up to len(b) bytes without copying them anywhere.
func rawDiscard(fd int, b []byte) (int, syscall.Errno) { return recvFlags(fd, b, unix.MSG_TRUNC) }

func recvFlags(fd int, b []byte, flags int) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), uintptr(flags), 0, 0)
	return int(n), e
}

func rawClose(fd int) { syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// poller is an epoll set.
type poller struct {
	fd     int
	events [256]unix.EpollEvent
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	return &poller{fd: fd}, nil
}

func (p *poller) close() { rawClose(p.fd) }

func (p *poller) add(fd int, events uint32) { p.ctl(unix.EPOLL_CTL_ADD, fd, events) }
func (p *poller) mod(fd int, events uint32) { p.ctl(unix.EPOLL_CTL_MOD, fd, events) }

func (p *poller) ctl(op, fd int, events uint32) {
	ev := unix.EpollEvent{Events: events, Fd: int32(fd)}
	syscall.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(p.fd), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(&ev)), 0, 0)
}

// wait returns the events that come within d. It looks before it lets go of the
// processor: under load there always is one.
func (p *poller) wait(d time.Duration) []unix.EpollEvent {
	n, _, e := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), 0, 0, 0)
	if e == 0 && (n > 0 || d == 0) {
		return p.events[:n]
	}
	k, err := unix.EpollWait(p.fd, p.events[:], int(d.Milliseconds()))
	if err != nil {
		return nil // EINTR
	}
	return p.events[:k]
}

// listen binds an IPv4 address and returns it with the port that it was given.
func listen(ap netip.AddrPort) (int, netip.AddrPort, error) {
	fd, e := rawSocket()
	if e != 0 {
		return -1, ap, os.NewSyscallError("socket", e)
	}
	rawSetInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) // inherited by what is accepted
	sa := sockaddr(ap)
	if e := rawBind(fd, &sa); e != 0 {
		rawClose(fd)
		return -1, ap, fmt.Errorf("bind %s: %w", ap, e)
	}
	if err := unix.Listen(fd, 4096); err != nil {
		rawClose(fd)
		return -1, ap, fmt.Errorf("listen %s: %w", ap, err)
	}
	got, err := unix.Getsockname(fd)
	if err != nil {
		rawClose(fd)
		return -1, ap, os.NewSyscallError("getsockname", err)
	}
	if in, ok := got.(*unix.SockaddrInet4); ok {
		ap = netip.AddrPortFrom(ap.Addr(), uint16(in.Port))
	}
	return fd, ap, nil
}

// raiseFileLimit lets this process and its children open as many files as the
// system allows them.
func raiseFileLimit() {
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil {
		lim.Cur = lim.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &lim)
	}
}

// fileLimit is how many files this process may open, at most 20,000: some peers
// take memory for each that they might.
func fileLimit() int {
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) != nil {
		return 1024
	}
	return int(min(lim.Cur, 20000))
}
