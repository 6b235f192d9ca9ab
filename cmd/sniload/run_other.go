//go:build !linux

package main

import (
	"fmt"
	"runtime"
)

func run([]string) error {
	return fmt.Errorf("it loads through epoll and measures through /proc, so it needs Linux; this is %s", runtime.GOOS)
}
