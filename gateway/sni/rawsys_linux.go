package sni

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/gateway"
)

// System calls on descriptors that never block: they are made without telling
// the scheduler, which saves what it would cost to be put back.

func rawRecv(fd int32, b []byte) (int, syscall.Errno) {
	for {
		n, _, e := syscall.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), 0, 0, 0)
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

func rawSend(fd int32, b []byte) (int, syscall.Errno) {
	for {
		n, _, e := syscall.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), unix.MSG_NOSIGNAL, 0, 0)
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

// rawSend2 sends two pieces as one.
func rawSend2(fd int32, a, b []byte) (int, syscall.Errno) {
	iov := [2]unix.Iovec{{Base: unsafe.SliceData(a)}, {Base: unsafe.SliceData(b)}}
	iov[0].SetLen(len(a))
	iov[1].SetLen(len(b))
	msg := unix.Msghdr{Iov: &iov[0]}
	msg.SetIovlen(2)
	for {
		n, _, e := syscall.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)), unix.MSG_NOSIGNAL)
		if e != unix.EINTR {
			return int(n), e
		}
	}
}

func rawSplice(from, to int32, n int) (int, syscall.Errno) {
	for {
		k, _, e := syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if e != unix.EINTR {
			return int(k), e
		}
	}
}

func rawAccept(fd int32, sa *unix.RawSockaddrAny) (int32, syscall.Errno) {
	size := uint32(unix.SizeofSockaddrAny)
	n, _, e := syscall.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(sa)), uintptr(unsafe.Pointer(&size)), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	return int32(n), e
}

// passing says that an error of accept is of the one connection (accept(2)): there
// may be others.
func passing(e syscall.Errno) bool {
	switch e {
	case unix.EINTR, unix.ECONNABORTED, unix.EPROTO, unix.ENETDOWN, unix.ENOPROTOOPT,
		unix.EHOSTDOWN, unix.ENONET, unix.EHOSTUNREACH, unix.EOPNOTSUPP, unix.ENETUNREACH, unix.EPERM:
		return true
	}
	return false
}

func rawSocket(family int) (int32, syscall.Errno) {
	n, _, e := syscall.RawSyscall(unix.SYS_SOCKET, uintptr(family), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	return int32(n), e
}

// socket returns one for the attempt under way.
func (d *dial) socket() (int32, syscall.Errno) { return socketFor(d.addr, d.tier.congestion) }

// socketFor returns one to connect to an address with. That the algorithm of
// congestion control can be had was seen before; "" is the system's.
func socketFor(to netip.AddrPort, congestion string) (int32, syscall.Errno) {
	fd, e := rawSocket(family(to.Addr()))
	if e == 0 && congestion != "" {
		rawCongestion(fd, congestion)
	}
	return fd, e
}

func rawClose(fd int32) { syscall.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

func rawShutdown(fd int32) { syscall.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0) }

func rawSetInt(fd int32, level, opt, value int) syscall.Errno {
	v := int32(value)
	_, _, e := syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt), uintptr(unsafe.Pointer(&v)), 4, 0)
	return e
}

// rawAbort makes the close that follows a reset.
func rawAbort(fd int32) {
	l := unix.Linger{Onoff: 1}
	syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&l)), unsafe.Sizeof(l), 0)
}

func rawEpollCtl(ep int32, op int, fd int32, ev *unix.EpollEvent) syscall.Errno {
	_, _, e := syscall.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(ep), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(ev)), 0, 0)
	return e
}

// rawEpollWait keeps the processor for the time it waits: for short times only.
func rawEpollWait(ep int32, evs []unix.EpollEvent, ms int) (int, syscall.Errno) {
	n, _, e := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(ep), uintptr(unsafe.Pointer(&evs[0])), uintptr(len(evs)), uintptr(ms), 0, 0)
	return int(n), e
}

// rawPause keeps the processor of the scheduler meanwhile, as [rawEpollWait] does;
// a signal ends it.
func rawPause(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
}

// rawYield gives way to another thread on this processor, if one wants it.
func rawYield() { syscall.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) }

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// rawConnect begins to connect; EINPROGRESS is as good as success.
func rawConnect(fd int32, ap netip.AddrPort) syscall.Errno {
	var sa unix.RawSockaddrAny
	size := putSockaddr(&sa, ap)
	_, _, e := syscall.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&sa)), size)
	if e == unix.EINPROGRESS || e == unix.EINTR {
		return 0
	}
	return e
}

// rawConnected says whether what [rawConnect] began has come about, or why it failed.
func rawConnected(fd int32) (bool, syscall.Errno) {
	code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	switch {
	case err != nil:
		return false, unix.EBADF
	case code != 0:
		return false, syscall.Errno(code)
	}
	return rawPeer(fd).IsValid(), 0
}

func putSockaddr(sa *unix.RawSockaddrAny, ap netip.AddrPort) uintptr {
	port := ap.Port()
	if ap.Addr().Is4() {
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(sa)) = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: htons(port), Addr: ap.Addr().As4()}
		return unix.SizeofSockaddrInet4
	}
	in6 := unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: htons(port), Addr: ap.Addr().As16()}
	if zone := ap.Addr().Zone(); zone != "" {
		if i, err := net.InterfaceByName(zone); err == nil {
			in6.Scope_id = uint32(i.Index)
		}
	}
	*(*unix.RawSockaddrInet6)(unsafe.Pointer(sa)) = in6
	return unix.SizeofSockaddrInet6
}

// htons puts a port into network order, whatever the order of this machine.
func htons(p uint16) (out uint16) {
	b := (*[2]byte)(unsafe.Pointer(&out))
	b[0], b[1] = byte(p>>8), byte(p)
	return out
}

func getSockaddr(sa *unix.RawSockaddrAny) netip.AddrPort {
	switch sa.Addr.Family {
	case unix.AF_INET:
		in := (*unix.RawSockaddrInet4)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom4(in.Addr), htons(in.Port))
	case unix.AF_INET6:
		in := (*unix.RawSockaddrInet6)(unsafe.Pointer(sa))
		return netip.AddrPortFrom(netip.AddrFrom16(in.Addr).Unmap(), htons(in.Port))
	}
	return netip.AddrPort{}
}

func setKeepalive(fd int32, k gateway.Keepalive) {
	seconds := func(d time.Duration) int { return max(1, int((d+time.Second-1)/time.Second)) }
	rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, seconds(k.Idle))
	rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, seconds(k.Interval))
	rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, k.Probes)
	rawSetInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
}

// listenSockets binds n sockets to one port.
func listenSockets(ap netip.AddrPort, n int) (fds []int32, bound netip.AddrPort, err error) {
	if ap.Port() != 0 {
		// SO_REUSEPORT would share the port with another process of this user: a
		// second agent by mistake would take half of the connections in silence.
		fd, _, err := listenSocket(ap, false)
		if err != nil {
			return nil, ap, err
		}
		rawClose(fd)
	}
	for range n {
		fd, bound, err := listenSocket(ap, true)
		if err != nil {
			for _, fd := range fds {
				rawClose(fd)
			}
			return nil, ap, err
		}
		fds = append(fds, fd)
		ap = bound // the port that the first was given
	}
	return fds, ap, nil
}

// listenSocket binds a listener that shares its port with the others of this
// process. What it sets is inherited by what it accepts.
func listenSocket(ap netip.AddrPort, share bool) (fd int32, bound netip.AddrPort, err error) {
	fd, e := rawSocket(family(ap.Addr()))
	if e != 0 {
		return -1, bound, os.NewSyscallError("socket", e)
	}
	defer func() {
		if err != nil {
			rawClose(fd)
		}
	}()
	rawSetInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if share {
		if e := rawSetInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); e != 0 {
			return -1, bound, os.NewSyscallError("setsockopt SO_REUSEPORT", e)
		}
	}
	if ap.Addr().Is6() {
		only := 1
		if ap.Addr().IsUnspecified() {
			only = 0 // [::] serves IPv4 too
		}
		rawSetInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only)
	}
	rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	var sa unix.RawSockaddrAny
	size := putSockaddr(&sa, ap)
	if _, _, e := syscall.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(&sa)), size); e != 0 {
		return -1, bound, fmt.Errorf("bind %s: %w", ap, e)
	}
	if !share {
		return fd, ap, nil
	}
	const backlog = 65535 // the kernel caps it at somaxconn
	if e := unix.Listen(int(fd), backlog); e != nil {
		return -1, bound, fmt.Errorf("listen %s: %w", ap, e)
	}
	got, e2 := unix.Getsockname(int(fd))
	if e2 != nil {
		return -1, bound, os.NewSyscallError("getsockname", e2)
	}
	switch got := got.(type) {
	case *unix.SockaddrInet4:
		bound = netip.AddrPortFrom(ap.Addr(), uint16(got.Port))
	case *unix.SockaddrInet6:
		bound = netip.AddrPortFrom(ap.Addr(), uint16(got.Port))
	}
	return fd, bound, nil
}

// rawPeer is the address at the far end; not valid when there is none any more.
func rawPeer(fd int32) netip.AddrPort { return rawName(unix.SYS_GETPEERNAME, fd) }

// rawLocal is the address at this end.
func rawLocal(fd int32) netip.AddrPort { return rawName(unix.SYS_GETSOCKNAME, fd) }

func rawName(call uintptr, fd int32) netip.AddrPort {
	var sa unix.RawSockaddrAny
	size := uint32(unix.SizeofSockaddrAny)
	if _, _, e := syscall.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size))); e != 0 {
		return netip.AddrPort{}
	}
	return getSockaddr(&sa)
}
