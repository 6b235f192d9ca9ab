package sni

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rawCongestion sets a socket's algorithm of congestion control.
func rawCongestion(fd int32, name string) syscall.Errno {
	_, _, e := syscall.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION,
		uintptr(unsafe.Pointer(unsafe.StringData(name))), uintptr(len(name)), 0)
	return e
}

// setCongestion is rawCongestion; "" is the system's algorithm.
func setCongestion(fd int, name string) error {
	what := name
	if name == "" {
		b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control")
		if err != nil {
			return fmt.Errorf("set congestion control to the system's: %w", err)
		}
		what = strings.TrimSpace(string(b))
	}
	if e := rawCongestion(int32(fd), what); e != 0 {
		return congestionError(what, e)
	}
	return nil
}

func congestionError(name string, e syscall.Errno) error {
	switch e {
	case unix.ENOENT:
		return fmt.Errorf("congestion control %q: the kernel has none of this name", name)
	case unix.EPERM:
		return fmt.Errorf("congestion control %q: not allowed; see net.ipv4.tcp_allowed_congestion_control", name)
	}
	return fmt.Errorf("congestion control %q: %w", name, e)
}

// checkCongestion says whether an algorithm can be had.
func checkCongestion(name string) error {
	fd, e := rawSocket(unix.AF_INET)
	if e != 0 {
		return fmt.Errorf("congestion control %q: socket: %w", name, e)
	}
	defer rawClose(fd)
	return setCongestion(int(fd), name)
}
