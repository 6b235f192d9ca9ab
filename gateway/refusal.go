package gateway

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

// RefusalLog tells the log of refused connections, once in a while of each kind:
// whoever reads the log learns why calls fail, and a flood of bad connections
// does not fill it. A kind is a listener, a reason and its detail. The zero value
// with a Logger is ready; its methods may be called from any goroutine.
type RefusalLog struct {
	Logger hclog.Logger

	// mu guards kinds, by kind.
	mu    sync.Mutex
	kinds map[refusalKind]*repeated
}

type refusalKind struct{ listener, reason, detail string }

type repeated struct {
	told time.Time
	more int
}

const (
	// refusalEvery is how often one kind is told of.
	refusalEvery = time.Minute
	// maxRefusalKinds bounds what is remembered; details can be a client's choice.
	maxRefusalKinds = 128
)

// Add tells of a refusal.
func (l *RefusalLog) Add(r *Refusal) {
	more, tell := l.count(r)
	if !tell {
		if l.Logger.IsDebug() {
			l.Logger.Debug("connection refused", r.fields()...)
		}
		return
	}
	fields := r.fields()
	if more > 0 {
		fields = append(fields, "more_like_it", more)
	}
	// What a client did wrong is nothing for the operator to act on.
	switch r.Reason {
	case RefuseNoRoute, RefuseNoEndpoint, RefuseConnect, RefuseLimit, RefuseHandshake, RefuseIdentity:
		l.Logger.Warn("connection refused", fields...)
	default:
		l.Logger.Info("connection refused", fields...)
	}
}

// count says whether to tell of a refusal, and how many like it were not told of.
func (l *RefusalLog) count(r *Refusal) (more int, tell bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := refusalKind{r.Listener, r.Reason, ""}
	switch r.Reason {
	case RefuseConnect, RefuseNoEndpoint, RefuseDenied:
		k.detail = r.Detail // made by this side
	}
	if n := l.kinds[k]; n != nil {
		if r.At.Sub(n.told) < refusalEvery {
			n.more++
			return 0, false
		}
		more, n.more, n.told = n.more, 0, r.At
		return more, true
	}
	if l.kinds == nil || len(l.kinds) >= maxRefusalKinds {
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
	RefuseNoEndpoint, RefuseConnect, RefuseLimit, RefuseHandshake, RefuseIdentity, RefuseDenied, RefuseClientGone,
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
