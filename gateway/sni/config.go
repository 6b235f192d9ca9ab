package sni

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/gateway"
)

// The engines.
const (
	EngineAuto    = "auto"
	EngineEpoll   = "epoll"
	EngineNetpoll = "netpoll"
)

// Config of a Forwarder. The zero value is ready for use; where a field says
// default, zero stands for it.
type Config struct {
	// Engine is EngineAuto (default: epoll where it can be had, else netpoll),
	// EngineEpoll or EngineNetpoll.
	Engine string
	// Workers is the number of epoll loops; default is GOMAXPROCS, which is raised
	// by that number while the loops run.
	Workers int
	// Logger; nil logs nothing. At trace level there is a line per connection.
	Logger hclog.Logger

	// AccessLog, where it is set, is told of connections at their end. It is written
	// to from a goroutine of its own: what it cannot keep up with is left out, and
	// how much that was is logged.
	AccessLog *gateway.AccessLog

	// HelloTimeout is the time from accepting to the last byte of the
	// ClientHello; default 5 s.
	HelloTimeout time.Duration
	// HelloBytes bounds what is read of a client before it is routed, record
	// headers included; default and most 64 KiB.
	HelloBytes int

	// PendingHellos is how many clients of a listener, in each loop, may be waited
	// for to send all of their hello; of more, the oldest is shed. Default 4096. The
	// portable engine counts as one loop.
	PendingHellos int

	// ConnectAttempts bounds the endpoint addresses tried for one connection;
	// default 4, most 8.
	ConnectAttempts int
	// ConnectDeadline bounds the time of all attempts together; default 15 s.
	ConnectDeadline time.Duration

	// AnswerTimeout is how long an endpoint may take for its first byte, after the
	// hello, before the hello is sent to another, if there is one; for clusters that
	// do not set their own. Default 2 s, negative is for ever.
	AnswerTimeout time.Duration

	// EjectAfter is how many failures in a row, to connect or to be answered, eject
	// an endpoint; default 3. It is passed over for EjectBase (default 5 s), doubled each time
	// up to EjectMax (default 5 min).
	EjectAfter          int
	EjectBase, EjectMax time.Duration

	// IdleTimeout closes a connection on which no byte moved for so long. The
	// default 0 never does: keepalive ends the dead ones.
	IdleTimeout time.Duration
	// HalfCloseTimeout is the same once one side has said that it sends no more;
	// default 10 min, negative is never.
	HalfCloseTimeout time.Duration
	// DrainTimeout is how long the connections of a removed listener may go on;
	// default 30 s, negative is not at all.
	DrainTimeout time.Duration
	// Keepalive of TCP towards clients, and towards endpoints whose cluster does
	// not set its own. Fields default to 60 s, 15 s and 4: well below the 350 s
	// after which cloud load balancers and NAT gateways forget a connection.
	Keepalive gateway.Keepalive

	// Lookup resolves host names; default is as the system is configured, a name
	// being looked up again when its TTL is over, which is taken as at least 2 s and
	// at most 5 min.
	Lookup LookupFunc
	// LookupInterval is the time between lookups of a name whose TTL is not known;
	// default 10 s.
	LookupInterval time.Duration
	// LookupWait is how long a table with new host names waits for their
	// addresses before it is taken without; default 1 s.
	LookupWait time.Duration

	// BindRetryMin and BindRetryMax bound the wait before another attempt to bind
	// a listener; default 100 ms and 5 s.
	BindRetryMin, BindRetryMax time.Duration
}

const maxHelloBytes = 64 << 10

// withDefaults returns the configuration with defaults in place of zeroes.
func (c Config) withDefaults() Config {
	or := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	orInt := func(n *int, def int) {
		if *n == 0 {
			*n = def
		}
	}
	if c.Engine == "" {
		c.Engine = EngineAuto
	}
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	if c.Lookup == nil {
		c.Lookup = systemLookup
	}
	or(&c.HelloTimeout, 5*time.Second)
	orInt(&c.HelloBytes, maxHelloBytes)
	orInt(&c.PendingHellos, 4096)
	orInt(&c.ConnectAttempts, 4)
	or(&c.ConnectDeadline, 15*time.Second)
	or(&c.AnswerTimeout, gateway.DefaultAnswerTimeout)
	orInt(&c.EjectAfter, 3)
	or(&c.EjectBase, 5*time.Second)
	or(&c.EjectMax, 5*time.Minute)
	or(&c.HalfCloseTimeout, 10*time.Minute)
	or(&c.DrainTimeout, 30*time.Second)
	or(&c.Keepalive.Idle, 60*time.Second)
	or(&c.Keepalive.Interval, 15*time.Second)
	orInt(&c.Keepalive.Probes, 4)
	or(&c.LookupInterval, 10*time.Second)
	or(&c.LookupWait, time.Second)
	or(&c.BindRetryMin, 100*time.Millisecond)
	or(&c.BindRetryMax, 5*time.Second)
	return c
}

// Validate tells all that is wrong with the configuration.
func (c Config) Validate() error {
	d := c.withDefaults()
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("sni: "+format, args...))
		}
	}
	check(d.Engine == EngineAuto || d.Engine == EngineEpoll || d.Engine == EngineNetpoll,
		"engine %q is none of auto, epoll, netpoll", c.Engine)
	check(d.Workers >= 0 && d.Workers <= 1024, "workers %d is not from 0 to 1024", c.Workers)
	check(d.HelloTimeout > 0, "hello timeout %s is negative", c.HelloTimeout)
	check(d.HelloBytes >= 64 && d.HelloBytes <= maxHelloBytes, "hello bytes %d is not from 64 to %d", c.HelloBytes, maxHelloBytes)
	check(d.PendingHellos > 0, "pending hellos %d is negative", c.PendingHellos)
	check(d.ConnectAttempts > 0 && d.ConnectAttempts <= maxTries, "connect attempts %d is not from 1 to %d", c.ConnectAttempts, maxTries)
	check(d.ConnectDeadline > 0, "connect deadline %s is negative", c.ConnectDeadline)
	check(d.EjectAfter > 0, "eject after %d is negative", c.EjectAfter)
	check(d.EjectBase > 0 && d.EjectMax >= d.EjectBase, "ejection from %s to %s is no range", d.EjectBase, d.EjectMax)
	check(d.IdleTimeout >= 0, "idle timeout %s is negative", c.IdleTimeout)
	check(d.LookupInterval > 0, "lookup interval %s is negative", c.LookupInterval)
	check(d.BindRetryMin > 0 && d.BindRetryMax >= d.BindRetryMin, "bind retry from %s to %s is no range", d.BindRetryMin, d.BindRetryMax)
	return errors.Join(errs...)
}

// keepalive fills the zero fields of a cluster's keepalive.
func (c *Config) keepalive(k gateway.Keepalive) gateway.Keepalive {
	if k.Idle == 0 {
		k.Idle = c.Keepalive.Idle
	}
	if k.Interval == 0 {
		k.Interval = c.Keepalive.Interval
	}
	if k.Probes == 0 {
		k.Probes = c.Keepalive.Probes
	}
	return k
}

// idleLimits are how long a connection may be idle, and how long once one side
// has said that it sends no more; 0 is for ever.
func (c *Config) idleLimits(own time.Duration) (idle, halfClosed time.Duration) {
	idle = cmp.Or(own, c.IdleTimeout)
	halfClosed = idle
	if c.HalfCloseTimeout > 0 && (idle == 0 || c.HalfCloseTimeout < idle) {
		halfClosed = c.HalfCloseTimeout
	}
	return idle, halfClosed
}
