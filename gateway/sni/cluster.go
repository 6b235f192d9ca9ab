package sni

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/sluicemesh/sluice/gateway"
)

// cluster is the running state of one cluster name. It outlives the tables, so
// that counters and ejections do; what a table says of it is its plan.
type cluster struct {
	name   string
	number uint32 // by which connections know where they were routed to; never 0
	plan   atomic.Pointer[plan]
	moved  atomic.Pointer[moved] // nil until connections are to be moved

	active    atomic.Int64
	connected atomic.Uint64
	failed    atomic.Uint64
	retries   atomic.Uint64
	replays   atomic.Int64  // hellos that are with another endpoint because one was silent
	rr        atomic.Uint64 // position of round robin
	full      atomic.Int64  // of the rate of connections

	// Owned by the control goroutine.
	spec      *gateway.Cluster
	endpoints map[string]*endpoint
}

// traffic is written by one worker only and fills two cache lines, so that counting
// never moves a line between cores.
type traffic struct {
	in, out atomic.Uint64 // bytes
	// took has how many connections were made, by how long that took, and tookAll how
	// many nanoseconds it took for all.
	took    [connectTimes]atomic.Uint64
	tookAll atomic.Uint64
	_       [24]byte
}

// connectTimes is how many counts of connections there are, by how long it took to
// make them: one for each of gateway.ConnectBounds, and one for more.
const connectTimes = 10

// made counts a connection that took so many nanoseconds to make.
func (t *traffic) made(took int64) {
	i := 0
	for i < len(gateway.ConnectBounds) && took > int64(gateway.ConnectBounds[i]) {
		i++
	}
	t.took[i].Add(1)
	t.tookAll.Add(uint64(max(took, 0)))
}

// total is the sum of traffic of several workers or endpoints.
type total struct {
	in, out, tookAll uint64
	took             [connectTimes]uint64
}

func (t *total) add(e *endpoint) {
	all := e.traffic.Load()
	if all == nil {
		return
	}
	for i := range *all {
		x := &(*all)[i]
		t.in += x.in.Load()
		t.out += x.out.Load()
		t.tookAll += x.tookAll.Load()
		for j := range x.took {
			t.took[j] += x.took[j].Load()
		}
	}
}

// counter returns the counts of a worker.
func (e *endpoint) counter(worker, workers int) *traffic {
	if t := e.traffic.Load(); t != nil {
		return &(*t)[worker]
	}
	t := make([]traffic, workers)
	if e.traffic.CompareAndSwap(nil, &t) {
		return &t[worker]
	}
	return &(*e.traffic.Load())[worker]
}

// keepalive is that of the cluster's connections, as its table now says.
func (c *cluster) keepalive() (k gateway.Keepalive) {
	if pl := c.plan.Load(); pl != nil {
		for i := range pl.tiers {
			if pl.tiers[i].owner == c {
				return pl.tiers[i].keepalive
			}
		}
	}
	return k
}

// endpoint is the running state of an endpoint of a cluster, kept as long as
// some table of the cluster names its address.
type endpoint struct {
	key  string // host:port
	port uint16
	// fixed is the address of an endpoint with an IP address, else host resolves.
	fixed []netip.AddrPort
	host  *host

	active    atomic.Int64
	connected atomic.Uint64
	failed    atomic.Uint64
	// traffic has one element for each worker that writes it; nil while there is none.
	traffic atomic.Pointer[[]traffic]

	failures     atomic.Int32 // to connect, in a row
	silences     atomic.Int32 // times in a row that it was connected to and did not answer
	answeredAt   atomic.Int64 // when it last did, on the forwarder's clock
	ejections    atomic.Int32 // in a row
	ejectedUntil atomic.Int64 // on the forwarder's clock
	usableSince  atomic.Int64 // on the forwarder's clock, 0 for not; only while connections are moved
	// silenced says that the ejection is for silence, which no probe that only
	// connects can lift.
	silenced  atomic.Bool
	lastError atomic.Pointer[string]
	reasons   gateway.Failures
}

// The ways of an endpoint not to answer.
var (
	errResetUnanswered  = errors.New("reset before it answered")
	errClosedUnanswered = errors.New("closed before it answered")
	errNoAnswer         = errors.New("no answer in time")
	errGaveUp           = errors.New("no answer before the client gave up")

	errOvertaken = errors.New("not connected when another address was")
)

func failReason(err error) string {
	switch {
	case errors.Is(err, errConnectTimeout), errors.Is(err, errOvertaken):
		return gateway.FailTimeout
	case errors.Is(err, errResetUnanswered):
		return gateway.FailReset
	case errors.Is(err, errClosedUnanswered):
		return gateway.FailClosed
	case errors.Is(err, errNoAnswer), errors.Is(err, errGaveUp):
		return gateway.FailNoAnswer
	}
	return gateway.FailReason(err)
}

// fault counts a failure, and returns what there is to say of it.
func (e *endpoint) fault(cause error) (text string) {
	e.failed.Add(1)
	e.reasons.Add(failReason(cause))
	text = cause.Error()
	e.lastError.Store(&text)
	return text
}

// addresses may be empty: a name that was never resolved has none.
func (e *endpoint) addresses() []netip.AddrPort {
	if e.host == nil {
		return e.fixed
	}
	if a := e.host.addrs.Load(); a != nil {
		return a.list
	}
	return nil
}

// plan is what the table in use says of a cluster, in the order of trying.
// Immutable.
type plan struct {
	// tiers are the cluster's own healthy endpoints by priority, then those of its
	// failover clusters, then, in the same order, endpoints of unknown health.
	tiers     []tier
	endpoints []*endpoint // every endpoint of the cluster itself, for Status
	healthy   int         // of the cluster itself
	rate      rate        // of connections to the cluster, whatever endpoint they reach
	// gone are endpoints that it had and may still have connections to, and past what
	// was counted of those that are forgotten: the counts of a cluster never go back.
	gone      []*endpoint
	past      total
	probe     *gateway.Probe
	probeFrom int32 // failures in a row that make an endpoint one that fails
}

// tier is a set of endpoints that are as good as each other.
type tier struct {
	owner     *cluster
	unknown   bool // the members' health is
	members   []member
	group     []*endpoint // all of the cluster with this priority, however near
	total     uint32      // sum of the weights
	round     []uint32    // the members' turns in a round of round robin; nil is one each
	policy    gateway.Policy
	timeout   time.Duration // of one attempt to connect
	answer    time.Duration // for the first byte; 0 is the forwarder's
	keepalive gateway.Keepalive
	limit     int64 // connections of the owner; 0 is none
	send      gateway.ProxyVersion
	// congestion is the algorithm of congestion control; "" is the system's.
	congestion string
}

type member struct {
	ep     *endpoint
	weight uint32
	upto   uint32 // sum of the weights up to and with this one
}

const (
	maxTries              = 8 // bound of Config.ConnectAttempts
	defaultConnectTimeout = 5 * time.Second
	// attemptDelay is how long the addresses under way of a name have before the next
	// is tried beside them, the Connection Attempt Delay of RFC 8305 5.
	attemptDelay = 250 * time.Millisecond
	maxWeight    = 128 // as Consul has it
)

// attempt is an address that is being connected to.
type attempt struct {
	at   int64 // when it began
	addr netip.AddrPort
	rest *addressRest // of the address; nil where it is the only one
}

// dial is the choice of an endpoint for one connection: which were tried, and
// which is being tried. The zero value, with begin, is ready for use.
//
// Of an endpoint with several addresses several may be tried at one time: beside
// makes another one the attempt under way, and the caller keeps those before it.
type dial struct {
	f       *Forwarder
	cluster *cluster // as routed
	plan    *plan
	began   int64
	tries   int
	tried   [maxTries]*endpoint
	places  [maxTries]uint16 // of the address in the endpoint's
	start   uint32           // where in an endpoint's addresses to begin
	limited bool             // passed over a cluster because it is full
	rated   bool             // refused because of the rate of the cluster
	silent  bool             // the last failure was not to be answered
	reset   bool             // the last that did not answer reset the connection
	replay  bool             // counted among the cluster's replays
	detail  string           // of the last failure
	took    int64            // nanoseconds that it took to make the connection

	// The endpoint that is being tried, since when, and the attempt under way.
	tier *tier
	ep   *endpoint
	from int64
	attempt
}

// begin starts the choice for a connection that is routed to c.
func (d *dial) begin(f *Forwarder, c *cluster, now int64) {
	*d = dial{f: f, cluster: c, plan: c.plan.Load(), began: now, start: rand.Uint32()}
}

// next chooses an endpoint and an address of it, and accounts the attempt to
// them: it must be followed by failed, abandon or done. It returns false when
// there is nothing left to try; then refusal says why.
func (d *dial) next(now int64) bool {
	if d.tries >= d.f.cfg.ConnectAttempts || d.tries > 0 && now-d.began >= int64(d.f.cfg.ConnectDeadline) {
		return false
	}
	if r := d.plan.rate; r.gap > 0 && d.tries == 0 && !r.take(&d.cluster.full, now) {
		d.rated = true
		return false
	}
	// Ejection is a guess: when it leaves nothing, ejected endpoints are tried.
	for _, ejected := range [2]bool{false, true} {
		for i := range d.plan.tiers {
			t := &d.plan.tiers[i]
			if t.limit > 0 && t.owner.active.Load() >= t.limit {
				d.limited = true
				continue
			}
			ep := d.pick(t, now, ejected)
			if ep == nil {
				continue
			}
			if n := t.owner.active.Add(1); t.limit > 0 && n > t.limit {
				t.owner.active.Add(-1)
				d.limited = true
				continue
			}
			ep.active.Add(1)
			d.tier, d.ep, d.from = t, ep, now
			d.try(now)
			return true
		}
	}
	return false
}

// try begins with an address of the endpoint.
func (d *dial) try(now int64) {
	d.at = now
	d.places[d.tries] = d.chooseAddress(d.ep, now)
	d.tried[d.tries] = d.ep
	if d.tries++; d.tries > 1 {
		d.tier.owner.retries.Add(1)
	}
}

// beside begins with another address of the endpoint, while those before are still
// under way. It returns false when there is none, or no time.
func (d *dial) beside(now int64) bool {
	if d.untried() <= 0 || d.left(now) <= 0 {
		return false
	}
	d.try(now)
	return true
}

// untried counts the addresses of the endpoint that can still be begun with.
func (d *dial) untried() int {
	return min(len(d.ep.addresses())-d.triedOf(d.ep), d.f.cfg.ConnectAttempts-d.tries)
}

// left is how long the endpoint may still take to be connected to.
func (d *dial) left(now int64) time.Duration {
	return min(d.tier.timeout-time.Duration(now-d.from), d.f.cfg.ConnectDeadline-time.Duration(now-d.began))
}

// chooseAddress sets the address of ep to try: one that was not tried, and rather one
// that does not rest.
func (d *dial) chooseAddress(ep *endpoint, now int64) (place uint16) {
	d.rest = nil
	if ep.host == nil {
		d.addr = ep.fixed[0]
		return 0
	}
	set := ep.host.addrs.Load()
	n := len(set.list)
	if n == 1 {
		d.addr = set.list[0]
		return 0
	}
	chosen := int(d.start&0xffff) % n
	resting := int64(math.MaxInt64)
	for k := range n {
		i := (int(d.start&0xffff) + k) % n
		if d.triedAt(ep, uint16(i)) {
			continue
		}
		until := set.rest[i].until.Load()
		if until <= now {
			chosen = i
			break
		}
		if until < resting { // of those that all rest, the one that is done first
			chosen, resting = i, until
		}
	}
	d.addr, d.rest = set.list[chosen], set.rest[chosen]
	return uint16(chosen)
}

func (d *dial) triedAt(ep *endpoint, place uint16) bool {
	for i, t := range d.tried[:d.tries] {
		if t == ep && d.places[i] == place {
			return true
		}
	}
	return false
}

// timeout is how long to wait for the attempts under way: until another is to be
// begun with beside them, or the endpoint given up. One family without a route is
// common, and nobody is to wait for it.
func (d *dial) timeout(now int64) time.Duration {
	t := d.left(now)
	if n := d.untried(); n > 0 {
		t = min(t/time.Duration(n+1), attemptDelay)
	}
	return max(t, time.Millisecond)
}

// answerTimeout is how long the endpoint may take for its first byte; 0 is for ever.
func (d *dial) answerTimeout() time.Duration {
	return max(cmp.Or(d.tier.answer, d.f.cfg.AnswerTimeout), 0)
}

// waitedLong says whether a client that goes after it has waited so many nanoseconds
// for the answer goes because of the wait.
func (d *dial) waitedLong(wait int64) bool {
	const long = time.Second
	limit := d.answerTimeout()
	return limit > 0 && wait >= int64(min(long, limit/2))
}

// others says whether there is another endpoint, or another address, that could be
// tried in place of the one that is.
func (d *dial) others(now int64) bool {
	if d.tries >= d.f.cfg.ConnectAttempts || now-d.began >= int64(d.f.cfg.ConnectDeadline) {
		return false
	}
	for i := range d.plan.tiers {
		for _, m := range d.plan.tiers[i].members {
			if d.eligible(m.ep, now, true) {
				return true
			}
		}
	}
	return false
}

// Bounds of the replays of a cluster: a part of its connections, and at least so
// many. When every endpoint is slow because there is too much to do, to send each
// hello twice would make it worse.
const (
	replayShare = 5 // one in
	replayLeast = 3
	// replayAgain is when one that was not let through asks again: by then those that
	// were have been answered, if there is anybody who answers.
	replayAgain = 50 * time.Millisecond
)

// mayReplay says whether the hello may be sent to another endpoint because this one
// is silent, and then counts it as a replay until the choice ends.
func (d *dial) mayReplay(now int64) bool {
	if !d.others(now) {
		return false
	}
	if d.replay {
		return true
	}
	most := max(d.cluster.active.Load()/replayShare, replayLeast)
	if d.cluster.replays.Add(1) > most {
		d.cluster.replays.Add(-1)
		return false
	}
	d.replay = true
	return true
}

// end is called when the choice ends, in whatever way.
func (d *dial) end() {
	if d.replay {
		d.replay = false
		d.cluster.replays.Add(-1)
	}
}

// triedOf counts the attempts at ep, one for each of its addresses.
func (d *dial) triedOf(ep *endpoint) (n int) {
	for _, t := range d.tried[:d.tries] {
		if t == ep {
			n++
		}
	}
	return n
}

func (d *dial) eligible(ep *endpoint, now int64, ejected bool) bool {
	if !ejected && ep.ejectedUntil.Load() > now {
		return false
	}
	return d.triedOf(ep) < len(ep.addresses())
}

// pick chooses among the tier's endpoints by its policy, or returns nil when
// none may be tried.
func (d *dial) pick(t *tier, now int64, ejected bool) *endpoint {
	if len(t.members) == 1 {
		if ep := t.members[0].ep; d.eligible(ep, now, ejected) {
			return ep
		}
		return nil
	}
	switch t.policy {
	case gateway.PolicyRoundRobin:
		if ep := t.roundRobin().ep; d.eligible(ep, now, ejected) {
			return ep
		}
	case gateway.PolicyRandom:
		if ep := t.random().ep; d.eligible(ep, now, ejected) {
			return ep
		}
	default:
		a := t.random()
		b := t.another(a)
		okA, okB := d.eligible(a.ep, now, ejected), d.eligible(b.ep, now, ejected)
		switch {
		case okA && (!okB || !b.lessLoaded(a)):
			return a.ep
		case okB:
			return b.ep
		}
	}
	// Something is down: choose among what is left, by weight.
	var a, b *member
	var sum uint32
	for i := range t.members {
		m := &t.members[i]
		if !d.eligible(m.ep, now, ejected) {
			continue
		}
		sum += m.weight
		if a == nil || rand.Uint32N(sum) < m.weight {
			a = m
		}
		if b == nil || rand.Uint32N(sum) < m.weight {
			b = m
		}
	}
	switch {
	case a == nil:
		return nil
	case t.policy == gateway.PolicyLeastConnections && b.lessLoaded(a):
		return b.ep
	}
	return a.ep
}

func (m *member) lessLoaded(o *member) bool {
	return m.ep.active.Load()*int64(o.weight) < o.ep.active.Load()*int64(m.weight)
}

// at returns the member that covers a point below t.total.
func (t *tier) at(point uint32) *member {
	if t.total == uint32(len(t.members)) {
		return &t.members[point]
	}
	lo, hi := 0, len(t.members)-1
	for lo < hi {
		mid := (lo + hi) / 2
		if point < t.members[mid].upto {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return &t.members[lo]
}

func (t *tier) random() *member { return t.at(rand.Uint32N(t.total)) }

// another draws by weight among all but m: of two that were the same one, the
// choice would be none.
func (t *tier) another(m *member) *member {
	point := rand.Uint32N(t.total - m.weight)
	if point >= m.upto-m.weight {
		point += m.weight
	}
	return t.at(point)
}

// roundRobin takes the next turn of the round.
func (t *tier) roundRobin() *member {
	n := t.owner.rr.Add(1)
	if t.round != nil {
		return &t.members[t.round[n%uint64(len(t.round))]]
	}
	return t.at(uint32(n % uint64(t.total)))
}

// maxRound bounds the work to lay out a round; in a larger one an endpoint has
// its turns in a row.
const maxRound = 1 << 20

// layOut puts the turns of a round in an order in which each endpoint's are
// spread: always the one that is furthest behind its share.
func (t *tier) layOut() {
	if t.total == uint32(len(t.members)) || int(t.total)*len(t.members) > maxRound {
		return
	}
	t.round = make([]uint32, t.total)
	behind := make([]int64, len(t.members))
	for i := range t.round {
		best := 0
		for j := range behind {
			behind[j] += int64(t.members[j].weight)
			if behind[j] > behind[best] {
				best = j
			}
		}
		behind[best] -= int64(t.total)
		t.round[i] = uint32(best)
	}
}

// failed ends the attempt under way: the endpoint could not be connected to.
func (d *dial) failed(now int64, cause error) {
	d.release()
	d.silent = false
	d.lost(d.attempt, now, cause)
	d.f.eject(d.tier, d.ep, now)
}

// lost notes that an attempt has failed, while another is under way.
func (d *dial) lost(a attempt, now int64, cause error) {
	if a.rest != nil {
		a.rest.failed(&d.f.cfg, now)
	}
	d.detail = fmt.Sprintf("%s: %s", a.addr, d.ep.fault(cause))
}

// won makes a the attempt under way: it has led to a connection, and others have not.
// Those that began before it had their chance.
func (d *dial) won(a attempt, others []attempt, now int64) {
	d.attempt = a
	for _, o := range others {
		if o.at < a.at {
			d.lost(o, now, errOvertaken)
		}
	}
}

// unanswered ends the attempt under way: the endpoint was connected to and given
// the hello, and did not answer it.
func (d *dial) unanswered(now int64, cause error) {
	d.release()
	d.silent = true
	d.detail = fmt.Sprintf("%s: %s", d.addr, d.ep.fault(cause))
	d.f.silence(d.tier, d.ep, now)
}

// suspect counts against the endpoint that it has not answered so far; the attempt
// goes on.
func (d *dial) suspect(now int64, cause error) {
	d.ep.fault(cause)
	d.f.silence(d.tier, d.ep, now)
}

// answered is done, once the endpoint's first byte is here.
func (d *dial) answered(now int64) (*cluster, *endpoint) {
	d.ep.answeredAt.Store(now)
	if d.ep.silences.Load() != 0 {
		d.ep.silences.Store(0)
	}
	return d.done()
}

// abandon ends the choice, without a judgement of the endpoint.
func (d *dial) abandon() {
	d.release()
	d.end()
}

func (d *dial) release() {
	d.ep.active.Add(-1)
	d.tier.owner.active.Add(-1)
}

// connected notes that the attempt under way has led to a connection.
func (d *dial) connected(now int64) {
	d.took = now - d.at
	d.reached()
}

func (d *dial) reached() {
	if d.rest != nil {
		d.rest.reached()
	}
	if d.ep.failures.Load() != 0 {
		d.ep.failures.Store(0)
	}
}

// done ends the choice: the endpoint is the one. The connection counts as active
// until closed is called with the same owner and endpoint.
func (d *dial) done() (*cluster, *endpoint) {
	d.ep.connected.Add(1)
	d.tier.owner.connected.Add(1)
	d.reached()
	d.end()
	return d.tier.owner, d.ep
}

// closed ends the account of a connection.
func closed(c *cluster, ep *endpoint) {
	ep.active.Add(-1)
	c.active.Add(-1)
}

// refusal says why next has nothing (more), and counts the failure.
func (d *dial) refusal() (reason, detail string) {
	d.end()
	d.cluster.failed.Add(1)
	switch {
	case d.silent:
		return gateway.RefuseNoAnswer, fmt.Sprintf("cluster %s, attempt %d: %s", d.cluster.name, d.tries, d.detail)
	case d.tries > 0:
		return gateway.RefuseConnect, fmt.Sprintf("cluster %s, attempt %d: %s", d.cluster.name, d.tries, d.detail)
	case d.rated:
		return gateway.RefuseLimit, fmt.Sprintf("connection rate of cluster %s", d.cluster.name)
	case d.limited:
		return gateway.RefuseLimit, fmt.Sprintf("max connections of cluster %s", d.cluster.name)
	}
	all, healthy := len(d.plan.endpoints), d.plan.healthy
	switch {
	case all == 0:
		detail = fmt.Sprintf("cluster %s has no endpoint", d.cluster.name)
	case healthy == 0:
		detail = fmt.Sprintf("cluster %s: none of %d endpoints is healthy", d.cluster.name, all)
	default:
		detail = fmt.Sprintf("cluster %s: no address is known of %d healthy endpoints", d.cluster.name, healthy)
	}
	return gateway.RefuseNoEndpoint, detail
}

// eject passes an endpoint over for a time, after enough failures to connect in a
// row, if another of its cluster and priority is left.
func (f *Forwarder) eject(t *tier, ep *endpoint, now int64) {
	if n := ep.failures.Add(1); int(n) >= f.cfg.EjectAfter {
		f.passOver(t, ep, now, n, false)
	}
}

// silence is eject for an endpoint that can be connected to and does not answer.
// That may be no fault of the endpoint's: a gateway of another datacenter closes what
// it has no route for. So it counts only while the endpoint has answered nobody for
// some time, and another has.
func (f *Forwarder) silence(t *tier, ep *endpoint, now int64) {
	since := now - int64(f.cfg.EjectBase)
	n := ep.silences.Add(1)
	lately := func(e *endpoint) bool {
		at := e.answeredAt.Load()
		return at != 0 && at > since
	}
	if int(n) < f.cfg.EjectAfter || lately(ep) {
		return
	}
	for _, o := range t.group {
		if o != ep && lately(o) {
			f.passOver(t, ep, now, n, true)
			return
		}
	}
}

func (f *Forwarder) passOver(t *tier, ep *endpoint, now int64, failures int32, silenced bool) {
	if ep.ejectedUntil.Load() > now {
		return
	}
	last := true
	for _, o := range t.group {
		if o != ep && o.ejectedUntil.Load() <= now {
			last = false
			break
		}
	}
	if last {
		return
	}
	// A time in service as long as the longest ejection wipes the slate.
	if now-ep.ejectedUntil.Load() > int64(f.cfg.EjectMax) {
		ep.ejections.Store(0)
	}
	n := min(ep.ejections.Add(1), 16)
	d := min(f.cfg.EjectBase<<(n-1), f.cfg.EjectMax)
	ep.silenced.Store(silenced)
	ep.ejectedUntil.Store(now + int64(d))
	f.log.Warn("endpoint ejected", "cluster", t.owner.name, "endpoint", ep.key, "for", d, "failures", failures, "error", *ep.lastError.Load())
}

// registry keeps the state of clusters over tables. Owned by the control
// goroutine.
type registry struct {
	clusters map[string]*cluster
	zone     string // of the table in use
	failback bool
	chained  map[string]bool // the clusters that others fail over to
	number   uint32          // of the newest cluster
	dns      *resolver
	// congestion has the algorithms of congestion control that can be had.
	congestion map[string]bool
}

// prepared is a table's clusters, compiled and not yet in use.
type prepared struct {
	zone     string
	failback bool
	chained  map[string]bool
	clusters map[string]*cluster
	plans    map[*cluster]*plan
	specs    map[*cluster]*gateway.Cluster
}

// prepare compiles the clusters of a table. Nothing of what is in use changes,
// apart from names that the resolver begins to look up.
func (r *registry) prepare(t *gateway.Table) *prepared {
	p := &prepared{
		zone:     t.Zone,
		failback: t.Failback != nil,
		chained:  map[string]bool{},
		clusters: make(map[string]*cluster, len(t.Clusters)),
		plans:    map[*cluster]*plan{},
		specs:    map[*cluster]*gateway.Cluster{},
	}
	changed := make(map[string]bool)
	for i := range t.Clusters {
		spec := &t.Clusters[i]
		c := r.clusters[spec.Name]
		if c == nil {
			r.number++
			c = &cluster{name: spec.Name, number: r.number, endpoints: map[string]*endpoint{}}
		}
		p.clusters[spec.Name] = c
		for _, f := range spec.Failover {
			p.chained[f] = true
		}
		if c.spec == nil || t.Zone != r.zone || p.failback != r.failback || !sameCluster(c.spec, spec) {
			changed[spec.Name] = true
		}
		p.specs[c] = spec
	}
	for i := range t.Clusters {
		spec := &t.Clusters[i]
		c := p.clusters[spec.Name]
		again := changed[spec.Name] || p.chained[spec.Name] != r.chained[spec.Name]
		for _, f := range spec.Failover {
			_, known := p.clusters[f]
			_, was := r.clusters[f]
			again = again || changed[f] || known != was
		}
		if again {
			p.plans[c] = r.compile(c, spec, p)
		}
	}
	return p
}

// commit puts what was prepared into use, and returns names that are no longer
// needed to the resolver.
func (r *registry) commit(p *prepared) {
	for c, pl := range p.plans {
		pl.renew(c, c.plan.Load())
		if was := c.plan.Swap(pl); was != nil && was.rate != pl.rate {
			c.full.Store(0)
		}
	}
	for name, c := range r.clusters {
		if p.clusters[name] == nil {
			c.spec = nil
			if c.active.Load() > 0 {
				p.clusters[name] = c // its connections go on being told
			}
		}
	}
	for c, spec := range p.specs {
		c.spec = spec
	}
	r.clusters, r.zone, r.failback, r.chained = p.clusters, p.zone, p.failback, p.chained
	used := map[string]bool{}
	for _, c := range r.clusters {
		if pl := c.plan.Load(); pl != nil && len(pl.endpoints) < len(c.endpoints) {
			keep := make(map[string]*endpoint, len(pl.endpoints)+len(pl.gone))
			for _, ep := range pl.gone {
				if ep.host == nil { // which is looked up no more
					keep[ep.key] = ep
				}
			}
			for _, ep := range pl.endpoints {
				keep[ep.key] = ep
			}
			c.endpoints = keep
		}
		for _, ep := range c.endpoints {
			if ep.host != nil {
				used[ep.host.name] = true
			}
		}
	}
	r.dns.retain(used)
}

func (r *registry) compile(c *cluster, spec *gateway.Cluster, p *prepared) *plan {
	pl := &plan{rate: newRate(spec.ConnectionRate, spec.ConnectionBurst), probe: spec.Probe, probeFrom: failingLeast}
	listed := make(map[*endpoint]bool, len(spec.Endpoints))
	for i := range spec.Endpoints {
		e := &spec.Endpoints[i]
		if ep := r.endpoint(c, e); !listed[ep] {
			listed[ep] = true
			pl.endpoints = append(pl.endpoints, ep)
		}
		if e.Healthy {
			pl.healthy++
		}
	}
	chain := []*gateway.Cluster{spec}
	for _, name := range spec.Failover {
		if fc := p.clusters[name]; fc != nil && fc != c {
			chain = append(chain, p.specs[fc])
		}
	}
	for _, unknown := range [2]bool{false, true} {
		for _, s := range chain {
			pl.tiers = append(pl.tiers, r.tiers(p.clusters[s.Name], s, p.zone, unknown)...)
		}
	}
	pl.succeed(c.plan.Load(), listed)
	if p.failback && (len(pl.tiers) > 1 || p.chained[c.name]) {
		// To know when connections can come back, without sending one to see.
		pl.probeFrom = 1
		if pl.probe == nil {
			pl.probe = &gateway.Probe{}
		}
	}
	return pl
}

// succeed takes over the endpoints of the plan before that are not listed any more.
// They are forgotten at the next change once they have no connections: one that is
// being made by that plan may still become one of theirs.
func (pl *plan) succeed(was *plan, listed map[*endpoint]bool) {
	if was == nil {
		return
	}
	pl.past = was.past
	for _, ep := range was.gone {
		switch {
		case listed[ep]:
		case ep.active.Load() == 0:
			pl.past.add(ep)
		default:
			pl.gone = append(pl.gone, ep)
		}
	}
	for _, ep := range was.endpoints {
		if !listed[ep] {
			pl.gone = append(pl.gone, ep)
		}
	}
}

// known calls yield with the endpoints of c itself that a check says are healthy.
func (pl *plan) known(c *cluster, yield func(ep *endpoint)) {
	for i := range pl.tiers {
		t := &pl.tiers[i]
		if t.owner != c || t.unknown {
			return
		}
		for j := range t.members {
			yield(t.members[j].ep)
		}
	}
}

// renew says of the endpoints that were not healthy by the plan before that they
// have been usable for no time yet.
func (pl *plan) renew(c *cluster, was *plan) {
	if was == nil || c.moved.Load() == nil {
		return
	}
	before := map[*endpoint]bool{}
	was.known(c, func(ep *endpoint) { before[ep] = true })
	pl.known(c, func(ep *endpoint) {
		if !before[ep] {
			ep.usableSince.Store(0)
		}
	})
}

// rank is the order in which endpoints are used: by priority, then by distance.
type rank struct{ priority, distance int }

// tiers groups the endpoints of a cluster that are healthy (or of unknown
// health) by rank.
func (r *registry) tiers(c *cluster, spec *gateway.Cluster, zone string, unknown bool) []tier {
	groups := map[rank][]member{}
	peers := map[int][]*endpoint{}
	for i := range spec.Endpoints {
		e := &spec.Endpoints[i]
		if e.Network == "unix" || e.Healthy == unknown || unknown && e.Why != "" {
			continue
		}
		k := rank{e.Priority, gateway.Distance(zone, e.Zone)}
		ep := r.endpoint(c, e)
		groups[k] = append(groups[k], member{
			ep:     ep,
			weight: uint32(min(max(e.Weight, 1), maxWeight)),
		})
		peers[e.Priority] = append(peers[e.Priority], ep)
	}
	var out []tier
	ranks := slices.SortedFunc(maps.Keys(groups), func(a, b rank) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(a.distance, b.distance))
	})
	for _, k := range ranks {
		t := tier{owner: c, unknown: unknown, members: groups[k], group: peers[k.priority], policy: spec.Policy,
			timeout: spec.ConnectTimeout, answer: spec.AnswerTimeout, limit: int64(spec.MaxConnections), send: spec.SendProxy}
		if r.congestion[spec.CongestionControl] {
			t.congestion = spec.CongestionControl
		}
		if t.timeout <= 0 {
			t.timeout = defaultConnectTimeout
		}
		if spec.Keepalive != nil {
			t.keepalive = *spec.Keepalive
		}
		var div uint32
		for _, m := range t.members {
			div = gcd(div, m.weight)
		}
		for i := range t.members {
			m := &t.members[i]
			m.weight /= div
			t.total += m.weight
			m.upto = t.total
		}
		if t.policy == gateway.PolicyRoundRobin {
			t.layOut()
		}
		out = append(out, t)
	}
	return out
}

func gcd(a, b uint32) uint32 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

func (r *registry) endpoint(c *cluster, e *gateway.Endpoint) *endpoint {
	key := endpointKey(e)
	if ep := c.endpoints[key]; ep != nil {
		return ep
	}
	ep := &endpoint{key: key, port: uint16(e.Port)}
	switch ip, err := netip.ParseAddr(e.Address); {
	case e.Network == "unix":
		text := "unix endpoints are not supported by the SNI forwarder"
		ep.lastError.Store(&text)
	case err == nil:
		ep.fixed = []netip.AddrPort{netip.AddrPortFrom(ip.Unmap(), uint16(e.Port))}
	default:
		ep.host = r.dns.host(e.Address, uint16(e.Port))
	}
	c.endpoints[key] = ep
	return ep
}

// sameCluster is true when two definitions ask the data plane to do the same.
func sameCluster(a, b *gateway.Cluster) bool {
	if a == b {
		return true
	}
	if a.ConnectTimeout != b.ConnectTimeout || a.AnswerTimeout != b.AnswerTimeout || a.Policy != b.Policy || a.MaxConnections != b.MaxConnections ||
		a.ConnectionRate != b.ConnectionRate || a.ConnectionBurst != b.ConnectionBurst || a.SendProxy != b.SendProxy || a.CongestionControl != b.CongestionControl ||
		(a.Probe == nil) != (b.Probe == nil) || a.Probe != nil && *a.Probe != *b.Probe ||
		(a.Keepalive == nil) != (b.Keepalive == nil) || a.Keepalive != nil && *a.Keepalive != *b.Keepalive ||
		!slices.Equal(a.Failover, b.Failover) {
		return false
	}
	return slices.EqualFunc(a.Endpoints, b.Endpoints, func(x, y gateway.Endpoint) bool {
		return x.Network == y.Network && x.Address == y.Address && x.Port == y.Port && x.Healthy == y.Healthy &&
			x.Weight == y.Weight && x.Priority == y.Priority && x.Zone == y.Zone && (x.Why == "") == (y.Why == "")
	})
}
