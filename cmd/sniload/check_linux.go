package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// runCheck checks forwarders one after another.
func runCheck(ctx context.Context, fs *flag.FlagSet, args []string) (err error) {
	sluice := fs.String("sluice", "bin/sluice", "`path` of sluice")
	dir := fs.String("dir", "bin/bench", "working `directory`")
	only := fs.String("only", ours+","+oursPortable, "contenders, comma-separated")
	var extra extras
	fs.Var(&extra, "contender", "`name=command` of one more; {port}, {routes} and {workers} are filled in. May be repeated")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if done, err := isolate(ctx); done || err != nil {
		return err
	}
	run, err := filepath.Abs(filepath.Join(*dir, "run"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(run, 0o755); err != nil {
		return err
	}
	certs, err := newPKI()
	if err != nil {
		return err
	}
	if err := certs.write(run); err != nil {
		return err
	}
	backend, err := startBackend(ctx)
	if err != nil {
		return err
	}
	defer backend.stop()
	stop, err := serveTLS(certs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()

	names := split(*only)
	var list []contender
	for _, c := range contenders(*sluice, filepath.Dir(run)) {
		for _, name := range names {
			if c.name == name {
				list = append(list, c)
			}
		}
	}
	failed := 0
	for i, c := range append(list, extra...) {
		fmt.Println(c.name)
		set := setup{Port: 22000 + i, Workers: 2, Files: fileLimit(), Dir: run, Routes: newRoutes(smallRoutes, backendAddrs(), tlsAddr)}
		p, err := start(ctx, c, set)
		if err != nil {
			return err
		}
		out, err := checkProcess(ctx, p.addr.String(), p.pid(), certs, run, os.Stdout)
		p.stop()
		if err != nil {
			return err
		}
		failed += out.Failed
	}
	if failed > 0 {
		return fmt.Errorf("%d checks failed", failed)
	}
	return nil
}

// serveTLS serves what the routes of the benchmark have under the one name that
// speaks TLS.
func serveTLS(certs *pki) (stop func() error, err error) {
	server := newTLSServer(certs)
	ln, err := net.Listen("tcp", tlsAddr.String())
	if err != nil {
		return nil, fmt.Errorf("serve TLS: %w", err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(tls.NewListener(ln, server.TLSConfig)) }()
	return func() error {
		server.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	}, nil
}

// checkProcess runs the checks on the forwarder at an address, and writes a line on
// each.
func checkProcess(ctx context.Context, addr string, pid int, certs *pki, dir string, w io.Writer) (out outcome, err error) {
	k, err := newChecker(addr, certs)
	if err != nil {
		return out, err
	}
	began, done := time.Now(), 0
	tell := func(name string, took time.Duration, err error) {
		text := "ok"
		if err != nil {
			text = "FAILED: " + err.Error()
			out.fail(fmt.Errorf("%s: %w", name, err))
		}
		done++
		fmt.Fprintf(w, "  %-46s %6.0f ms  %s\n", name, float64(took.Microseconds())/1e3, text)
	}
	before := sockets(processTree(pid))
	for _, c := range append(checks[:len(checks):len(checks)], programs(dir)...) {
		limited, cancel := context.WithTimeout(ctx, 20*time.Second)
		began := time.Now()
		err := c.run(k, limited)
		cancel()
		if errors.Is(err, exec.ErrNotFound) {
			fmt.Fprintf(w, "  %-46s skipped: %v\n", c.name, err)
			continue
		}
		tell(c.name, time.Since(began), err)
	}
	// Whatever is pooled, no socket is.
	since := time.Now()
	var after int
	for {
		if after = sockets(processTree(pid)); after <= before || time.Since(since) > 5*time.Second || ctx.Err() != nil {
			break
		}
		settle(ctx, 20*time.Millisecond)
	}
	if after > before {
		err = fmt.Errorf("%d before, %d after", before, after)
	}
	tell("no socket is left open", time.Since(since), err)
	out.Metrics = map[string]float64{"checks": float64(done), "took": time.Since(began).Seconds()}
	return out, nil
}

// runChecks runs them on a forwarder that has the routes of the benchmark.
func runChecks(ctx context.Context, fs *flag.FlagSet, args []string) (err error) {
	l := newLoad(fs, 1)
	ctx, cancel, err := l.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	dir, err := os.MkdirTemp("", "sniload")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	certs, err := newPKI()
	if err != nil {
		return err
	}
	if err := certs.write(dir); err != nil {
		return err
	}
	stop, err := serveTLS(certs)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	out, err := checkProcess(ctx, l.target, l.proxy, certs, dir, os.Stderr)
	if err != nil {
		return err
	}
	return out.print()
}

// programs checks with clients that others wrote, where they are installed.
func programs(dir string) []check {
	root, client := filepath.Join(dir, "root.pem"), filepath.Join(dir, "client.pem")
	curl := func(k *checker, extra ...string) []string {
		return append([]string{"curl", "--silent", "--show-error", "--cacert", root, "--cert", client,
			"--connect-to", tlsName + ":443:" + k.target, "https://" + tlsName + "/"}, extra...)
	}
	return []check{
		{"curl gets", func(k *checker, ctx context.Context) error {
			return program(ctx, "", tlsName+" got 0 bytes", curl(k)...)
		}},
		{"curl posts 5 MB", func(k *checker, ctx context.Context) error {
			return program(ctx, strings.Repeat("x", 5e6), tlsName+" got 5000000 bytes", curl(k, "--header", "Expect:", "--data-binary", "@-")...)
		}},
		{"openssl gets", func(k *checker, ctx context.Context) error {
			return program(ctx, "GET / HTTP/1.0\r\nHost: "+tlsName+"\r\n\r\n", tlsName+" got 0 bytes",
				"openssl", "s_client", "-quiet", "-connect", k.target, "-servername", tlsName, "-CAfile", root, "-cert", client, "-verify_return_error")
		}},
	}
}

// program runs a client that is to print something.
func program(ctx context.Context, input, want string, command ...string) error {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Stdin = strings.NewReader(input)
	var out, problems bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &problems
	err := cmd.Run()
	if bytes.Contains(out.Bytes(), []byte(want)) {
		return nil // openssl ends with an error where the server closes first
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, lastLine(problems.String()))
	}
	return fmt.Errorf("it printed %q", lastLine(out.String()))
}
