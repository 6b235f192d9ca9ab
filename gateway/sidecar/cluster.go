package sidecar

import (
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// cluster is a cluster of the table with what is known of its endpoints. The
// counters outlive a change of the table.
type cluster struct {
	def       *gateway.Cluster
	endpoints []*endpoint // in the order of def.Endpoints
	*counters
}

type counters struct {
	active            atomic.Int64
	connected, failed atomic.Uint64
	retries           atomic.Uint64
	in, out           atomic.Uint64 // bytes
	turn              atomic.Uint64 // of round robin
}

// endpoint is one address of a cluster.
type endpoint struct {
	def     *gateway.Endpoint
	address string
	*endpointState
}

type endpointState struct {
	active            atomic.Int64
	connected, failed atomic.Uint64
	reasons           gateway.Failures
	in, out           atomic.Uint64 // bytes

	// mu guards what follows.
	mu      sync.Mutex
	inARow  int       // failures since the last success
	until   time.Time // not used before, but where nothing else is left
	lastErr string
}

// Ejection: after so many failures in a row an endpoint rests, longer each time.
const (
	ejectAfter = 2
	ejectMin   = time.Second
	ejectMax   = 30 * time.Second
)

// newCluster takes over the counters of old, which may be nil.
func newCluster(def *gateway.Cluster, old *cluster) *cluster {
	c := &cluster{def: def, counters: &counters{}}
	known := map[string]*endpointState{}
	if old != nil {
		c.counters = old.counters
		for _, e := range old.endpoints {
			known[e.address] = e.endpointState
		}
	}
	for i := range def.Endpoints {
		e := &def.Endpoints[i]
		addr := e.Address
		if e.Network != "unix" {
			addr = net.JoinHostPort(e.Address, strconv.Itoa(e.Port))
		}
		st := known[addr]
		if st == nil {
			st = &endpointState{}
		}
		c.endpoints = append(c.endpoints, &endpoint{def: e, address: addr, endpointState: st})
	}
	return c
}

func (e *endpoint) resting(now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return now.Before(e.until)
}

func (e *endpoint) succeeded() {
	e.connected.Add(1)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.inARow, e.until = 0, time.Time{}
}

// failReason tells the ways of not answering from a handshake that failed, as far as
// the error says.
func failReason(err error) string {
	switch {
	case !errors.Is(err, errHandshake):
		return gateway.FailReason(err)
	case errors.Is(err, io.EOF):
		return gateway.FailClosed
	case errors.Is(err, syscall.ECONNRESET):
		return gateway.FailReset
	case gateway.FailReason(err) == gateway.FailTimeout:
		return gateway.FailNoAnswer
	}
	return gateway.FailHandshake
}

func (e *endpoint) fail(err error) {
	e.failed.Add(1)
	e.reasons.Add(failReason(err))
	e.mu.Lock()
	defer e.mu.Unlock()
	e.inARow++
	e.lastErr = err.Error()
	if e.inARow >= ejectAfter {
		rest := ejectMin << min(e.inARow-ejectAfter, 5)
		e.until = time.Now().Add(min(rest, ejectMax))
	}
}

// candidates returns the endpoints to try, best first: healthy ones by priority,
// within a priority by the cluster's policy, and those that rest after all the
// others. Ones that the catalog calls unhealthy are not among them.
func (c *cluster) candidates() []*endpoint {
	now := time.Now()
	var ready, resting []*endpoint
	for _, e := range c.endpoints {
		switch {
		case !e.def.Healthy:
		case e.resting(now):
			resting = append(resting, e)
		default:
			ready = append(ready, e)
		}
	}
	c.arrange(ready)
	return append(ready, resting...)
}

// arrange orders endpoints by priority, and within one by the policy.
func (c *cluster) arrange(eps []*endpoint) {
	slices.SortStableFunc(eps, func(a, b *endpoint) int { return a.def.Priority - b.def.Priority })
	for len(eps) > 0 {
		n := 1
		for n < len(eps) && eps[n].def.Priority == eps[0].def.Priority {
			n++
		}
		c.choose(eps[:n])
		eps = eps[n:]
	}
}

// choose puts the endpoint to use first; the order of the rest matters little.
func (c *cluster) choose(eps []*endpoint) {
	if len(eps) < 2 {
		return
	}
	switch c.def.Policy {
	case gateway.PolicyRoundRobin:
		turn := int(c.turn.Add(1) % uint64(len(eps)))
		head := slices.Clone(eps[:turn])
		copy(eps, eps[turn:])
		copy(eps[len(eps)-turn:], head)
	case gateway.PolicyRandom:
		rand.Shuffle(len(eps), func(i, j int) { eps[i], eps[j] = eps[j], eps[i] })
	default: // the less loaded of two, drawn by weight
		rand.Shuffle(len(eps), func(i, j int) { eps[i], eps[j] = eps[j], eps[i] })
		a := c.draw(eps)
		eps[0], eps[a] = eps[a], eps[0]
		b := 1 + c.draw(eps[1:])
		if load(eps[b]) < load(eps[0]) {
			eps[0], eps[b] = eps[b], eps[0]
		}
	}
}

func load(e *endpoint) float64 { return float64(e.active.Load()+1) / float64(max(e.def.Weight, 1)) }

// draw returns the index of an endpoint, the heavier the likelier.
func (c *cluster) draw(eps []*endpoint) int {
	total := 0
	for _, e := range eps {
		total += max(e.def.Weight, 1)
	}
	n := rand.IntN(total)
	for i, e := range eps {
		if n -= max(e.def.Weight, 1); n < 0 {
			return i
		}
	}
	return 0
}

func (c *cluster) status() gateway.ClusterStatus {
	st := gateway.ClusterStatus{
		Name: c.def.Name, Active: c.active.Load(), Connected: c.connected.Load(), Failed: c.failed.Load(), Retries: c.retries.Load(),
		BytesIn: c.in.Load(), BytesOut: c.out.Load(),
	}
	now := time.Now()
	for _, e := range c.endpoints {
		e.mu.Lock()
		es := gateway.EndpointStatus{
			Address: e.address, Active: e.active.Load(), Connected: e.connected.Load(), Failed: e.failed.Load(), LastError: e.lastErr,
			Failures: e.reasons.Map(), BytesIn: e.in.Load(), BytesOut: e.out.Load(),
		}
		if now.Before(e.until) {
			es.EjectedUntil = e.until
		}
		e.mu.Unlock()
		st.Endpoints = append(st.Endpoints, es)
	}
	return st
}
