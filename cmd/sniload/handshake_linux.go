package main

import (
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// runHandshake makes mutual TLS 1.3 connections through the forwarder to a server
// of its own, and exchanges a byte on each: only the answer shows the client that
// its certificate was taken. Client and server are this one process.
func runHandshake(ctx context.Context, fs *flag.FlagSet, args []string) error {
	l := newLoad(fs, 4)
	n := fs.Int("n", 1000, "handshakes")
	ctx, cancel, err := l.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	certs, err := newPKI()
	if err != nil {
		return err
	}
	ln, err := tls.Listen("tcp", tlsAddr.String(), certs.serverConfig())
	if err != nil {
		return fmt.Errorf("serve TLS: %w", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { answerBytes(ln, &wg) })
	defer wg.Wait()
	defer ln.Close()

	var out outcome
	conf := certs.clientConfig()
	shake := func(n int) []time.Duration {
		var (
			next atomic.Int64
			mu   sync.Mutex // guards lat and out
			lat  = make([]time.Duration, 0, n)
			wg   sync.WaitGroup
		)
		for range l.conns {
			wg.Go(func() {
				for next.Add(1) <= int64(n) && ctx.Err() == nil {
					began := time.Now()
					err := exchangeByte(ctx, l.target, conf)
					took := time.Since(began)
					mu.Lock()
					if err != nil {
						out.fail(err)
					} else {
						lat = append(lat, took)
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		return lat
	}
	shake(min(50, *n)) // warms up
	out = outcome{}
	l.begin()
	lat := shake(*n)
	wall := time.Since(l.began)
	settle(ctx, 100*time.Millisecond)
	out.Metrics = l.finish(float64(len(lat)), wall)
	latencies(out.Metrics, lat)
	return out.print()
}

// answerBytes answers each connection's first byte until the listener closes.
func answerBytes(ln net.Listener, wg *sync.WaitGroup) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			var b [1]byte
			if _, err := io.ReadFull(c, b[:]); err == nil {
				_, _ = c.Write(b[:]) // the client tells what went wrong
			}
		})
	}
}

func exchangeByte(ctx context.Context, target string, conf *tls.Config) error {
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 10 * time.Second}, Config: conf}
	c, err := d.DialContext(ctx, "tcp", target)
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	b := []byte{'?'}
	if _, err := c.Write(b); err != nil {
		return fmt.Errorf("send a byte: %w", err)
	}
	if _, err := io.ReadFull(c, b); err != nil {
		return fmt.Errorf("receive a byte: %w", err)
	}
	return nil
}
