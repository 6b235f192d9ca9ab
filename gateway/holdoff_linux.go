package gateway

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// synFilter drops packets with SYN and without ACK, which begin a connection. A
// socket's filter sees packets from the TCP header on.
var synFilter = func() []unix.SockFilter {
	const flags, syn, ack = 13, 0x02, 0x10
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: flags},
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: syn | ack},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: syn, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
	}
}()

// HoldOff makes a listening TCP socket take no new connection, while handshakes
// that have begun end and can be accepted: a socket that is closed with something
// in its queue resets it. Who connects meanwhile tries again after a second, and
// finds the socket closed. Accepted connections inherit the filter, which has
// nothing to do there. Multipath TCP has no
// filters, and no other kernel.
func HoldOff(fd int) error {
	prog := unix.SockFprog{Len: uint16(len(synFilter)), Filter: &synFilter[0]}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog)
}

// HoldOffConn is [HoldOff] for a listener of package net, which must have been
// made without multipath TCP.
func HoldOffConn(l syscall.Conn) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var herr error
	if err := raw.Control(func(fd uintptr) { herr = HoldOff(int(fd)) }); err != nil {
		return err
	}
	return herr
}
