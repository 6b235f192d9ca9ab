package cli

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/sluicemesh/sluice/gateway"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"sluice":  func() { os.Exit(Run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) },
		"tlsecho": func() { serve(true) },
		"echo":    func() { serve(false) },
		"tlsget":  func() { get(true) },
		"get":     func() { get(false) },
		"tlskeep": keep,
		"tlshold": hold,
		"httpget": httpGet,
	})
}

// TestScripts runs the commands as processes. Every script has loopback
// addresses of its own in $IP and $IP2, so that agents can have their usual
// ports.
func TestScripts(t *testing.T) {
	deadline, _ := t.Deadline()
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		Deadline:            deadline,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_GOLDEN") != "",
		Setup: func(e *testscript.Env) error {
			for _, name := range []string{"IP", "IP2"} {
				ip, err := freeAddress(e)
				if err != nil {
					return err
				}
				e.Setenv(name, ip)
			}
			// A binary with the race detector sleeps for a second before it ends.
			e.Setenv("GORACE", "atexit_sleep_ms=0")
			e.Setenv("CONSUL_HTTP_ADDR", e.Getenv("IP")+":8500")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"waitleader":  waitLeader,
			"waitservice": waitService,
			"signal":      sendSignal,
			"expand":      expand,
			"waitfile":    waitFile,
			"waitproxy":   waitProxy,

			"waitcritical": waitCritical,
		},
	})
}

// freeAddress returns a loopback address that nobody else uses: whoever has its
// port 1 has the address.
func freeAddress(e *testscript.Env) (string, error) {
	for range 100 {
		var b [2]byte
		if _, err := rand.Read(b[:]); err != nil {
			return "", err
		}
		ip := fmt.Sprintf("127.%d.%d.1", 64+b[0]%128, b[1])
		l, err := net.Listen("tcp", ip+":7999")
		if err != nil {
			continue
		}
		e.Defer(func() { _ = l.Close() })
		return ip, nil
	}
	return "", fmt.Errorf("no loopback address besides 127.0.0.1 can be had")
}

// client returns a client of the agent that the commands of the script ask.
func client(ts *testscript.TestScript) *api.Client {
	conf := api.DefaultConfig()
	conf.Address = ts.Getenv("CONSUL_HTTP_ADDR")
	c, err := api.NewClient(conf)
	ts.Check(err)
	return c
}

// patience bounds every wait of a script. It is spent only by one that fails.
const patience = 15 * time.Second

// try calls f until it succeeds. It is for what tells nobody that it is ready: a
// process that has just been started.
func try(f func() error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; <-tick.C {
		err := f()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// waitLeader waits until the agent serves, its datacenter has a leader and a CA,
// and the agent's own node is in the catalog.
func waitLeader(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: waitleader")
	}
	c := client(ts)
	ts.Check(try(func() error {
		leader, err := c.Status().Leader()
		if err == nil && leader == "" {
			err = fmt.Errorf("there is no leader")
		}
		return err
	}))
	ts.Check(try(func() error { _, _, err := c.Connect().CARoots(nil); return err }))
	waitService(ts, false, []string{"consul"})
}

// waitService NAME waits until the catalog has a service, or with ! until it has
// none of that name.
func waitService(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: [!] waitservice NAME")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var index uint64
	for {
		list, meta, err := client(ts).Catalog().Service(args[0], "", (&api.QueryOptions{WaitIndex: index}).WithContext(ctx))
		if err != nil {
			ts.Fatalf("wait for service %s: %v", args[0], err)
		}
		if (len(list) == 0) == neg {
			return
		}
		index = meta.LastIndex
	}
}

// waitProxy ID waits until a gateway or sidecar of the agent serves.
func waitProxy(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: waitproxy ID")
	}
	ts.Check(try(func() error {
		var p gateway.ProxyStatus
		if _, err := client(ts).Raw().Query("/v1/agent/proxy/"+args[0], &p, nil); err != nil {
			return err
		}
		if p.State != gateway.PhaseServing || p.Plane == nil || len(p.Plane.Listeners) == 0 || !p.Plane.Listeners[0].Bound {
			return fmt.Errorf("proxy %s is %s: %s", args[0], p.State, p.Reason)
		}
		return nil
	}))
}

// waitCritical ID waits until the catalog calls an instance critical, or with !
// not.
func waitCritical(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: [!] waitcritical ID")
	}
	ts.Check(try(func() error {
		list, _, err := client(ts).Health().State(api.HealthCritical, nil)
		if err != nil {
			return err
		}
		critical := slices.ContainsFunc(list, func(c *api.HealthCheck) bool { return c.ServiceID == args[0] })
		if critical == neg {
			return fmt.Errorf("instance %s critical: %v", args[0], critical)
		}
		return nil
	}))
}

// sendSignal NAME COMMAND sends a signal to a background process, which the
// script's own kill can only with two of them.
func sendSignal(ts *testscript.TestScript, neg bool, args []string) {
	signals := map[string]os.Signal{"HUP": syscall.SIGHUP, "TERM": syscall.SIGTERM, "INT": os.Interrupt}
	if neg || len(args) != 2 || signals[args[0]] == nil {
		ts.Fatalf("usage: signal HUP|TERM|INT SUBCOMMAND")
	}
	for _, cmd := range ts.BackgroundCmds() {
		if len(cmd.Args) > 1 && strings.Contains(strings.Join(cmd.Args[1:], " ")+" ", args[1]+" ") {
			ts.Check(cmd.Process.Signal(signals[args[0]]))
			return
		}
	}
	ts.Fatalf("no background process has %q among its arguments", args[1])
}

// expand FROM TO copies a file with the script's variables in it filled in.
func expand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: expand FROM TO")
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(os.Expand(ts.ReadFile(args[0]), ts.Getenv)), 0o600))
}

// waitFile FILE TEXT waits until a file that a process writes has a text in it.
func waitFile(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: waitfile FILE TEXT")
	}
	ts.Check(try(func() error {
		b, err := os.ReadFile(ts.MkAbs(args[0]))
		if err == nil && !strings.Contains(string(b), args[1]) {
			err = fmt.Errorf("%s has no %q in it, but: %s", args[0], args[1], b)
		}
		return err
	}))
}

// serve is the command tlsecho (or echo) ADDRESS TEXT: it sends the text to whoever
// connects, over TLS with a certificate of nobody's.
func serve(secure bool) {
	l, err := net.Listen("tcp", os.Args[1])
	check(err)
	if secure {
		l = tls.NewListener(l, serverConfig())
	}
	for {
		conn, err := l.Accept()
		check(err)
		_, _ = fmt.Fprintln(conn, os.Args[2]) // a client that only tries the port is gone already
		_ = conn.Close()
	}
}

// serverConfig has a certificate of nobody's.
func serverConfig() *tls.Config {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"test"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	check(err)
	return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
}

// keep is the command tlskeep ADDRESS TEXT: like tlsecho, but it sends the text again
// for each line that it gets.
func keep() {
	l, err := net.Listen("tcp", os.Args[1])
	check(err)
	l = tls.NewListener(l, serverConfig())
	for {
		conn, err := l.Accept()
		check(err)
		go func() {
			defer conn.Close() //nolint:errcheck // it is the process's last act with it
			in := bufio.NewReader(conn)
			for err := error(nil); err == nil; _, err = in.ReadString('\n') {
				_, _ = fmt.Fprintln(conn, os.Args[2])
			}
		}()
	}
}

// hold is the command tlshold ADDRESS SERVERNAME FILE: it prints the line that a
// server sends, and then, once there is a file of that name, another one that comes
// by the same connection.
func hold() {
	conn, err := tls.Dial("tcp", os.Args[1], &tls.Config{ServerName: os.Args[2], InsecureSkipVerify: true}) //nolint:gosec // whoever answers, it prints what
	check(err)
	in := bufio.NewReader(conn)
	line, err := in.ReadString('\n')
	check(err)
	fmt.Print(line)
	check(try(func() error { _, err := os.Stat(os.Args[3]); return err }))
	_, err = fmt.Fprintln(conn, "more")
	check(err)
	line, err = in.ReadString('\n')
	check(err)
	fmt.Print(line)
	check(conn.Close())
}

// httpGet is the command httpget URL CODE [TEXT]: it asks until the answer has the
// status code, and the text somewhere in it, and prints the answer.
func httpGet() {
	check(try(func() error {
		resp, err := http.Get(os.Args[1])
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		if strconv.Itoa(resp.StatusCode) != os.Args[2] || len(os.Args) > 3 && !strings.Contains(string(b), os.Args[3]) {
			return fmt.Errorf("%s: %s", resp.Status, b)
		}
		fmt.Print(string(b))
		return nil
	}))
}

// get is the command tlsget ADDRESS SERVERNAME, or get ADDRESS: it prints the line
// that a server sends. It tries until there is one, but only once with "once" as
// the last argument; with "refused" until it is connected and gets none.
func get(secure bool) {
	args := os.Args[1:]
	attempt := func() error {
		conn, err := net.Dial("tcp", args[0])
		if err != nil {
			return err
		}
		defer conn.Close() //nolint:errcheck // it was only read from
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if secure {
			conn = tls.Client(conn, &tls.Config{ServerName: args[1], InsecureSkipVerify: true}) //nolint:gosec // whoever answers, it prints what
		}
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err != nil && (err != io.EOF || line == "") {
			return fmt.Errorf("%w: %w", errNoAnswer, err)
		}
		fmt.Print(line)
		return nil
	}
	switch args[len(args)-1] {
	case "once":
		check(attempt())
	case "refused":
		check(try(func() error {
			err := attempt()
			if err == nil {
				return errors.New("there was an answer")
			}
			if errors.Is(err, errNoAnswer) {
				return nil
			}
			return err
		}))
	default:
		check(try(attempt))
	}
}

var errNoAnswer = errors.New("no answer")

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
