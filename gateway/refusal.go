package gateway

import (
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Refusals remembers the newest refusals, and tells the log of them, once in a while
// of each kind: whoever reads the log learns why calls fail, and a flood of bad
// connections does not fill it. A kind is a listener, a reason and its detail. The
// zero value with a Logger is ready; its methods may be called from any goroutine.
type Refusals struct {
	Logger hclog.Logger

	mu    sync.Mutex // guards what follows
	ring  [KeptRefusals]Refusal
	n     int // ever added
	kinds map[refusalKind]*repeated
}

// KeptRefusals is how many refusals are remembered.
const KeptRefusals = 64

type refusalKind struct{ listener, reason, detail string }

type repeated struct {
	told time.Time
	more int
}

const (
	// refusalEvery is how often one kind is told of.
	refusalEvery = time.Minute
	// maxRefusalKinds bounds what is remembered of details, of which there can be as
	// many as there are endpoints.
	maxRefusalKinds = 128
)

// Add remembers a refusal, and maybe tells of it.
func (l *Refusals) Add(r Refusal) {
	more, tell := l.add(&r)
	if !tell {
		if l.Logger.IsTrace() {
			l.Logger.Trace("connection refused", r.fields()...)
		}
		return
	}
	fields := r.fields()
	if more > 0 {
		fields = append(fields, "more_like_it", more)
	}
	// What a client did wrong is nothing for the operator to act on.
	switch r.Reason {
	case RefuseNoRoute, RefuseNoEndpoint, RefuseConnect, RefuseNoAnswer, RefuseLimit, RefuseHandshake, RefuseIdentity:
		l.Logger.Warn("connection refused", fields...)
	default:
		l.Logger.Info("connection refused", fields...)
	}
}

// Newest returns the refusals that are remembered, newest first.
func (l *Refusals) Newest() []Refusal {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]Refusal, 0, min(l.n, KeptRefusals))
	for i := l.n - 1; i >= max(0, l.n-KeptRefusals); i-- {
		out = append(out, l.ring[i%KeptRefusals])
	}
	return out
}

// add says whether to tell of a refusal, and how many like it were not told of.
func (l *Refusals) add(r *Refusal) (more int, tell bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ring[l.n%KeptRefusals] = *r
	l.n++
	k := refusalKind{r.Listener, r.Reason, ""}
	switch r.Reason {
	case RefuseConnect, RefuseNoAnswer, RefuseNoEndpoint, RefuseDenied:
		k.detail = r.Detail // made by this side
	}
	n := l.kinds[k]
	if n == nil && len(l.kinds) >= maxRefusalKinds {
		maps.DeleteFunc(l.kinds, func(_ refusalKind, n *repeated) bool { return r.At.Sub(n.told) >= refusalEvery })
		if len(l.kinds) >= maxRefusalKinds {
			k.detail = ""
			n = l.kinds[k]
		}
	}
	if n != nil {
		if r.At.Sub(n.told) < refusalEvery {
			n.more++
			return 0, false
		}
		more, n.more, n.told = n.more, 0, r.At
		return more, true
	}
	if l.kinds == nil {
		l.kinds = map[refusalKind]*repeated{}
	}
	l.kinds[k] = &repeated{told: r.At}
	return 0, true
}

func (r *Refusal) fields() []any {
	return []any{
		"listener", r.Listener, "peer_addr", r.Peer, "server_name", r.ServerName,
		"alpn", r.ALPN, "bytes", r.HelloBytes, "reason", r.Reason, "detail", r.Detail,
	}
}

// Tally counts by reason: refusals by the Refuse constants, ends by the Close
// constants. The zero value is ready; its methods may be called from any
// goroutine.
type Tally struct {
	counts [len(reasons) + 1]atomic.Uint64 // the last is of reasons that are not in the list
}

var reasons = [...]string{
	RefuseHelloTimeout, RefuseHelloTooLarge, RefuseNotTLS, RefuseNoServerName, RefuseBadServerName, RefuseNoRoute,
	RefuseNoEndpoint, RefuseConnect, RefuseNoAnswer, RefuseLimit, RefuseHandshake, RefuseIdentity, RefuseDenied, RefuseClientGone,
	CloseDone, CloseReset, CloseIdle, CloseDrain, CloseRemoved, CloseStopped,
	CloseFailback, CloseRebalance,
}

// Add counts one.
func (t *Tally) Add(reason string) {
	for i := range reasons {
		if reasons[i] == reason {
			t.counts[i].Add(1)
			return
		}
	}
	t.counts[len(reasons)].Add(1)
}

// Map returns what was counted, without the reasons that never were; nil for
// nothing.
func (t *Tally) Map() map[string]uint64 {
	var out map[string]uint64
	for i := range t.counts {
		n := t.counts[i].Load()
		if n == 0 {
			continue
		}
		if out == nil {
			out = map[string]uint64{}
		}
		name := MetricOther
		if i < len(reasons) {
			name = reasons[i]
		}
		out[name] = n
	}
	return out
}
