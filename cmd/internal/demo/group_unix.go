//go:build unix

package demo

import "syscall"

// ownGroup keeps a terminal's Ctrl-C from the agents: the demo ends them itself,
// in order.
func ownGroup() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
