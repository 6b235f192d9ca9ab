//go:build !linux

package sni

import "errors"

func newEpoll(*Forwarder) (engine, error) { return nil, errors.New("epoll needs Linux") }
