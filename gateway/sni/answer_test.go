package sni

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// The ways of an endpoint to take a hello and not to answer it.
var unanswering = []struct {
	name, cause string
	handle      func(c *net.TCPConn)
	// passed is what a client sees when there is no other endpoint.
	passed func(error) bool
}{
	{"resets", gateway.FailReset, func(c *net.TCPConn) { c.SetLinger(0) },
		func(err error) bool { return errors.Is(err, syscall.ECONNRESET) }},
	{"closes", gateway.FailClosed, func(c *net.TCPConn) {},
		func(err error) bool { return err == io.EOF }},
	{"stalls", gateway.FailNoAnswer, func(c *net.TCPConn) { io.Copy(io.Discard, c) },
		func(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }},
}

func takesHello(t *testing.T, hello []byte, then func(c *net.TCPConn)) *backend {
	return serve(t, func(c *net.TCPConn) {
		if err := expect(c, hello); err != nil {
			t.Errorf("hello: %v", err)
		}
		then(c)
	})
}

// A hello that an endpoint does not answer is sent to another: no call fails.
func TestAnswerOfAnother(t *testing.T) {
	onEngines(t, func(t *testing.T, engine string) {
		for _, hello := range [][]byte{helloFor(t, "web.example"), pad(helloFor(t, "web.example"), 40_000)} {
			for _, bad := range unanswering {
				t.Run(fmt.Sprint(bad.name, " ", len(hello)), func(t *testing.T) {
					b := takesHello(t, hello, bad.handle)
					good := greeter(t, hello, "H", echo)
					f := start(t, Config{Engine: engine, AnswerTimeout: 50 * time.Millisecond},
						table([]gateway.Cluster{clusterOf("web", b.addr, good.addr)}, "web.example", "web"))
					const calls = 24
					for range calls {
						c := f.dial(hello)
						expectTag(t, c, "H")
						alive(t, c)
						c.Close()
					}
					f.stop()
					s := f.cluster("web")
					for _, e := range s.Endpoints {
						switch {
						case e.Address == good.addr && (e.Connected != calls || e.Failed != 0):
							t.Errorf("good: %+v", e)
						case e.Address == b.addr && (e.Connected != 0 || e.Failed == 0 || e.Failures[bad.cause] != e.Failed || e.LastError == "" || e.Active != 0):
							t.Errorf("bad: %+v", e)
						}
					}
					if l := f.Status().Listeners[0]; s.Connected != calls || s.Failed != 0 || s.Retries == 0 || l.RefusedTotal != 0 {
						t.Errorf("cluster: %+v; listener: %+v", s, l)
					}
				})
			}
		}
	})
}

// What every endpoint does with a hello the client sees, too.
func TestNoAnswer(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		for _, bad := range unanswering {
			t.Run(bad.name, func(t *testing.T) {
				one, two := takesHello(t, hello, bad.handle), takesHello(t, hello, bad.handle)
				f := start(t, Config{Engine: engine, AnswerTimeout: 20 * time.Millisecond},
					table([]gateway.Cluster{clusterOf("web", one.addr, two.addr)}, "web.example", "web"))
				c := f.dial(hello)
				if bad.name == "stalls" {
					// The last one is waited for: it may still answer.
					f.untilCounted(func(gateway.Status) bool { return f.cluster("web").Connected == 1 })
					c.SetReadDeadline(time.Now())
				}
				if n, err := c.Read(make([]byte, 1)); n != 0 || !bad.passed(err) {
					t.Fatalf("read %d bytes, %v", n, err)
				}
				s := f.cluster("web")
				if s.Retries != 1 || s.Endpoints[0].Failures[bad.cause] != 1 || s.Endpoints[1].Failures[bad.cause] != 1 {
					t.Errorf("cluster: %+v", s)
				}
				if bad.name == "stalls" {
					return
				}
				f.untilCounted(func(s gateway.Status) bool { return len(s.Refused) > 0 })
				if r := f.Status().Refused[0]; r.Reason != gateway.RefuseNoAnswer || r.ServerName != "web.example" || r.Detail == "" {
					t.Errorf("refusal: %+v", r)
				}
			})
		}
	})
}

// An endpoint without a stand-in may take its time.
func TestSlowAnswer(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		late := make(chan struct{})
		b := takesHello(t, hello, func(c *net.TCPConn) {
			select {
			case <-late:
			case <-t.Context().Done():
			}
			io.WriteString(c, "H")
			echo(c)
		})
		f := start(t, Config{Engine: engine, AnswerTimeout: 20 * time.Millisecond},
			table([]gateway.Cluster{clusterOf("web", b.addr)}, "web.example", "web"))
		c := f.dial(hello)
		f.untilCounted(func(gateway.Status) bool {
			s := f.cluster("web")
			return len(s.Endpoints) == 1 && s.Endpoints[0].Failures[gateway.FailNoAnswer] == 1
		})
		close(late)
		expectTag(t, c, "H")
		alive(t, c)
	})
}

// Once more than the hello was sent, or the endpoint has answered, no other is asked.
func TestNoOtherAfterMore(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		more := []byte("more")
		for name, handle := range map[string]func(c *net.TCPConn){
			"client":   func(c *net.TCPConn) { expect(c, more); c.SetLinger(0) },
			"endpoint": func(c *net.TCPConn) { io.WriteString(c, "H"); expect(c, more); c.SetLinger(0) },
			"early":    func(c *net.TCPConn) { expect(c, more); c.SetLinger(0) },
		} {
			t.Run(name, func(t *testing.T) {
				one, two := takesHello(t, hello, handle), takesHello(t, hello, handle)
				f := start(t, Config{Engine: engine}, table([]gateway.Cluster{clusterOf("web", one.addr, two.addr)}, "web.example", "web"))
				first := hello
				if name == "early" {
					first = append(bytes.Clone(hello), more...)
				}
				c := f.dial(first)
				switch name {
				case "endpoint":
					expectTag(t, c, "H")
				case "client":
					// With the endpoint before more comes: behind the hello it would be of it.
					f.untilCounted(func(gateway.Status) bool {
						cs := f.Connections(1)
						return len(cs) == 1 && cs[0].Endpoint != ""
					})
				}
				if name != "early" {
					c.Write(more)
				}
				if b, err := io.ReadAll(c); len(b) != 0 || !errors.Is(err, syscall.ECONNRESET) {
					t.Fatalf("read %q, %v", b, err)
				}
				f.stop()
				if s := f.cluster("web"); s.Connected != 1 || s.Retries != 0 {
					t.Errorf("cluster: %+v", s)
				}
			})
		}
	})
}

// A client that has waited long and goes says something of the endpoint.
func TestClientGivesUp(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		b := takesHello(t, hello, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		other := takesHello(t, hello, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
		f := start(t, Config{Engine: engine, AnswerTimeout: time.Minute},
			table([]gateway.Cluster{clusterOf("web", b.addr, other.addr)}, "web.example", "web"))
		for _, waits := range []bool{false, true} {
			c := f.dial(hello)
			if waits {
				<-time.After(1100 * time.Millisecond)
			}
			c.Close()
			f.untilCounted(func(s gateway.Status) bool { return s.Listeners[0].Active == 0 })
			var n uint64
			for _, e := range f.cluster("web").Endpoints {
				n += e.Failures[gateway.FailNoAnswer]
			}
			if n != 0 && !waits || n != 1 && waits {
				t.Errorf("waits %t: counted %d", waits, n)
			}
		}
	})
}

// The PROXY header goes before the hello again.
func TestAnswerOfAnotherWithProxyHeader(t *testing.T) {
	hello := helloFor(t, "web.example")
	onEngines(t, func(t *testing.T, engine string) {
		tagged := func(then func(c *net.TCPConn)) *backend {
			return serve(t, func(c *net.TCPConn) {
				var line []byte
				for !bytes.HasSuffix(line, []byte("\r\n")) {
					b := make([]byte, 1)
					if _, err := io.ReadFull(c, b); err != nil {
						t.Errorf("header: %v", err)
						return
					}
					line = append(line, b...)
				}
				if !bytes.HasPrefix(line, []byte("PROXY TCP4 127.0.0.1 ")) {
					t.Errorf("header %q", line)
				}
				if err := expect(c, hello); err != nil {
					t.Errorf("hello: %v", err)
				}
				then(c)
			})
		}
		bad := tagged(func(c *net.TCPConn) {})
		good := tagged(func(c *net.TCPConn) { io.WriteString(c, "H") })
		web := clusterOf("web", bad.addr, good.addr)
		web.SendProxy = gateway.ProxyV1
		web.Endpoints[1].Priority = 1
		f := start(t, Config{Engine: engine}, table([]gateway.Cluster{web}, "web.example", "web"))
		expectTag(t, f.dial(hello), "H")
	})
}
