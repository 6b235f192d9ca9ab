package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// commands by name. Those that bench runs as processes of their own, so that
// their cost can be told from each other's, can be run by hand as well.
var commands = []struct {
	name, synopsis string
	run            func(ctx context.Context, fs *flag.FlagSet, args []string) error
}{
	{"bench", "compare contenders and write a report", runBench},
	{"check", "check that forwarders are correct", runCheck},
	{"peers", "install the forwarders to compare with", runPeers},
	{"backend", "be the servers behind a forwarder", runBackend},
	{"connrate", "load: short connections", runConnRate},
	{"bulk", "load: gigabytes", runBulk},
	{"pingpong", "load: small messages", runPingPong},
	{"idle", "load: connections that are only open", runIdle},
	{"churn", "load: short connections while the table is replaced", runChurn},
	{"flood", "load: short connections among many that say nothing", runFlood},
	{"torture", "load: hellos that are broken, slow, huge or in pieces", runTorture},
	{"checks", "check that one forwarder, which runs, is correct", runChecks},
	{"draining", "load: flows and calls while the forwarder is drained", runDraining},
	{"faults", "check what comes of endpoints that fail", runFaults},
	{"handshake", "load: mutual TLS handshakes", runHandshake},
}

func run(args []string) error {
	name := ""
	if len(args) > 0 {
		name = args[0]
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	for _, c := range commands {
		if c.name != name {
			continue
		}
		raiseFileLimit()
		err := c.run(ctx, flag.NewFlagSet(name, flag.ContinueOnError), args[1:])
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	var text strings.Builder
	for _, c := range commands {
		fmt.Fprintf(&text, "\n  %-10s %s", c.name, c.synopsis)
	}
	return fmt.Errorf("want a command; -h after it lists its flags:%s", text.String())
}
