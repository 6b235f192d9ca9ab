//go:build !linux

package sni

import (
	"errors"
	"fmt"
)

var errNoCongestion = errors.New("it cannot be set on this system")

func setCongestion(_ int, name string) error {
	if name == "" {
		return nil
	}
	return fmt.Errorf("congestion control %q: %w", name, errNoCongestion)
}

func checkCongestion(name string) error { return setCongestion(0, name) }
