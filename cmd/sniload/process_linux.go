package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a contender that runs.
type process struct {
	contender
	addr    netip.AddrPort
	cmd     *exec.Cmd // nil for the backend itself
	exited  chan struct{}
	took    time.Duration // from its start until it accepted
	logPath string

	routesPath, tablePath string
	status                string // ip:port where it tells of itself; "" if it does not

	twin *process // nil for most
}

// twinPorts is how far the port of a twin is from the other's.
const twinPorts = 500

// statusPorts is how far the port where a contender tells of itself is from that
// where it forwards.
const statusPorts = 1000

func (p *process) pid() int {
	if p.cmd == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// start runs a contender and returns when it accepts connections.
func start(ctx context.Context, c contender, s setup) (*process, error) {
	p := &process{contender: c, addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(s.Port))}
	if len(c.command) == 0 {
		p.addr = backendAddrs()[0]
		return p, nil
	}
	routes := filepath.Join(s.Dir, fmt.Sprintf("routes-%d.txt", len(s.Routes)))
	p.routesPath = routes
	text := routesFile(s.Routes)
	if err := os.WriteFile(routes, text, 0o644); err != nil {
		return nil, err
	}
	p.tablePath = filepath.Join(s.Dir, fmt.Sprintf("table-%d.json", s.Port))
	if slices.Contains(c.command, "{table}") {
		table, err := tableFile(p.addr.String(), text, tlsAddr.String())
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(p.tablePath, table, 0o644); err != nil {
			return nil, err
		}
		p.status = netip.AddrPortFrom(p.addr.Addr(), uint16(s.Port+statusPorts)).String()
	}
	config := ""
	if c.config != "" {
		var err error
		if config, err = c.writeConfig(s); err != nil {
			return nil, err
		}
	}
	fill := strings.NewReplacer("{port}", strconv.Itoa(s.Port), "{routes}", routes,
		"{table}", p.tablePath, "{status}", strconv.Itoa(s.Port+statusPorts), "{workers}", strconv.Itoa(s.Workers), "{config}", config)
	var args []string
	for _, a := range c.command {
		args = append(args, fill.Replace(a))
	}
	p.logPath = filepath.Join(s.Dir, "log-"+c.name+".txt")
	log, err := os.Create(p.logPath)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "GOMAXPROCS="+strconv.Itoa(s.Workers))
	// A group of its own is what stop ends; it must not outlive this process either.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	p.cmd, p.exited = cmd, make(chan struct{})
	go func() {
		defer close(p.exited)
		_ = cmd.Wait() // it is killed, or has told why in its log
	}()
	if err := p.accepts(ctx, 40*time.Second); err != nil {
		p.stop()
		return nil, fmt.Errorf("start %s: %w", c.name, err)
	}
	p.took = time.Since(began)
	return p, nil
}

// accepts returns when the process accepts connections.
func (p *process) accepts(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		c, err := new(net.Dialer).DialContext(ctx, "tcp", p.addr.String())
		if err == nil {
			return c.Close()
		}
		t := time.NewTimer(2 * time.Millisecond)
		select {
		case <-t.C:
		case <-p.exited:
			t.Stop()
			log, _ := os.ReadFile(p.logPath)
			return fmt.Errorf("it ended: %s", lastLine(string(log)))
		case <-ctx.Done():
			t.Stop()
			return errors.Join(context.Cause(ctx), err)
		}
	}
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// stop ends the process, and what it has started.
func (p *process) stop() {
	if p.twin != nil {
		p.twin.stop()
	}
	if p.cmd == nil {
		return
	}
	select {
	case <-p.exited:
		return // what it was is somebody else's number
	default:
	}
	_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL) // its own group
	<-p.exited
}

// startBackend runs the backend as a process of its own.
func startBackend(ctx context.Context) (*process, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("start backend: %w", err)
	}
	cmd := exec.CommandContext(ctx, exe, "backend")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("start backend: %w", err)
	}
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		return nil, errors.Join(fmt.Errorf("start backend: %w", err), cmd.Wait())
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	go func() {
		defer close(p.exited)
		_ = cmd.Wait()
	}()
	return p, nil
}
