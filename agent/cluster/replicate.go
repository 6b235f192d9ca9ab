package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/state"
)

// primaryWait is how long the primary is asked to hold a read for which there
// is no news. It bounds the age at which replicated data is known to be current.
const primaryWait = 30 * time.Second

// primaryTimeout is how long a request to the primary may take beyond that.
const primaryTimeout = 10 * time.Second

// A batch of replicated writes is one entry of the raft log, which is to stay
// small.
const (
	maxBatchCommands = 64
	maxBatchBytes    = 256 << 10
)

// follower reads one thing from the primary again and again, each time blocking
// until it has changed. It belongs to one goroutine.
type follower struct {
	path  string
	index uint64
}

// next reads into out. After a failure, and when the primary's index went
// backwards (it was restored from a backup, or built anew), the next read does
// not block.
func (f *follower) next(ctx context.Context, l *leader, out any) error {
	path := f.path
	if f.index > 0 {
		path += "?index=" + strconv.FormatUint(f.index, 10) + "&wait=" + primaryWait.String()
	}
	h, err := l.primary(ctx, http.MethodGet, path, nil, out)
	if err != nil {
		f.index = 0
		return err
	}
	index, err := strconv.ParseUint(h.Get("X-Consul-Index"), 10, 64)
	if err != nil {
		f.index = 0
		return fmt.Errorf("read %s from %q: index %q is not a number", f.path, l.cfg.PrimaryDatacenter, h.Get("X-Consul-Index"))
	}
	if index < f.index {
		index = 0
	}
	f.index = index
	if h.Get("X-Consul-Results-Filtered-By-ACLs") == "true" {
		// What the token may not see is not gone: to go on would delete it here.
		f.index = 0
		return fmt.Errorf("read %s from %q: the replication token cannot read everything", f.path, l.cfg.PrimaryDatacenter)
	}
	return nil
}

// reset makes the next read return at once, because what the last one said
// could not be acted on.
func (f *follower) reset() { f.index = 0 }

// primary makes one request to the primary datacenter, with body and answer in
// JSON, and returns the answer's header.
func (l *leader) primary(ctx context.Context, method, path string, body, out any) (http.Header, error) {
	ctx, cancel := context.WithTimeout(ctx, primaryWait+primaryWait/16+primaryTimeout)
	defer cancel()
	fail := func(err error) (http.Header, error) {
		return nil, fmt.Errorf("%s %s in %q: %w", method, strings.SplitN(path, "?", 2)[0], l.cfg.PrimaryDatacenter, err)
	}
	var payload io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fail(err)
		}
		payload = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+l.cfg.PrimaryDatacenter+path, payload)
	if err != nil {
		return fail(err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if t := l.cfg.ReplicationToken.Reveal(); t != "" {
		req.Header.Set("X-Consul-Token", t)
	}
	rt, err := l.core.Forward(ctx, state.Target{Datacenter: l.cfg.PrimaryDatacenter})
	if err != nil {
		return fail(err)
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return fail(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 512)) // the status alone says it too
		return fail(fmt.Errorf("status %d: %s", resp.StatusCode, bytes.TrimSpace(text)))
	}
	if out == nil {
		return resp.Header, nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return fail(err)
	}
	return resp.Header, nil
}

// batch collects commands and applies them in pieces of a bearable size.
type batch struct {
	l     *leader
	cmds  []state.Command
	bytes int
}

// add takes a command of about n bytes.
func (b *batch) add(ctx context.Context, n int, cmd state.Command) error {
	if len(b.cmds) > 0 && (len(b.cmds) >= maxBatchCommands || b.bytes+n > maxBatchBytes) {
		if err := b.flush(ctx); err != nil {
			return err
		}
	}
	b.cmds = append(b.cmds, cmd)
	b.bytes += n
	return nil
}

func (b *batch) flush(ctx context.Context) error {
	if len(b.cmds) == 0 {
		return nil
	}
	err := b.l.apply(ctx, state.BatchCommand(b.cmds...))
	b.cmds, b.bytes = nil, 0
	return err
}

// errMissed is returned for a compare-and-set that did not find what it
// expected.
var errMissed = errors.New("the state was changed meanwhile")

// apply commits a command that answers true.
func (l *leader) apply(ctx context.Context, cmd state.Command) error {
	res, _, err := l.core.Apply(ctx, cmd)
	if err != nil {
		return err
	}
	switch r := res.(type) {
	case error:
		return r
	case bool:
		if !r {
			return errMissed
		}
	}
	return nil
}

// bootstrapEntriesLoop writes the configured entries that are not there, once
// per term.
func (l *leader) bootstrapEntriesLoop(ctx context.Context) error {
	if len(l.cfg.BootstrapEntries) == 0 {
		return nil
	}
	done := false
	return l.do(ctx, duty{name: "bootstrap config entries", every: time.Hour, pass: func(ctx context.Context, _ memdb.WatchSet) error {
		if done {
			return nil
		}
		err := l.bootstrapEntries(ctx)
		done = err == nil
		return err
	}})
}

func (l *leader) bootstrapEntries(ctx context.Context) error {
	var errs []error
	for _, e := range l.cfg.BootstrapEntries {
		_, old, err := l.core.Store().ConfigEntry(nil, e.GetKind(), e.GetName())
		if err == nil && old == nil {
			err = l.apply(ctx, state.ConfigEntryCommand(state.ConfigEntryUpsertCAS, e, 0))
			if errors.Is(err, errMissed) {
				err = nil // somebody else wrote it
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("bootstrap config entry %s/%s: %w", e.GetKind(), e.GetName(), err))
		}
	}
	return errors.Join(errs...)
}

type entryKey struct{ kind, partition, namespace, name string }

func keyOf(e configentry.Entry) entryKey {
	k := entryKey{e.GetKind(), e.GetPartition(), e.GetNamespace(), e.GetName()}
	if k.partition == "" {
		k.partition = "default"
	}
	if k.namespace == "" {
		k.namespace = "default"
	}
	return k
}

// replicateEntriesLoop keeps this datacenter's configuration entries equal to
// the primary's.
func (l *leader) replicateEntriesLoop(ctx context.Context) error {
	r := &entryReplicator{l: l, remote: follower{path: "/v1/internal/config-entries"}, same: map[entryKey][2]uint64{}}
	return l.do(ctx, duty{name: "config entry replication", pass: r.pass, wake: &l.wan})
}

// entryReplicator belongs to one goroutine.
type entryReplicator struct {
	l      *leader
	remote follower
	// same holds the primary's and our ModifyIndex of entries that were found
	// equal, so that only what moved is compared.
	same map[entryKey][2]uint64
}

func (r *entryReplicator) pass(ctx context.Context, _ memdb.WatchSet) error {
	var raw []json.RawMessage
	if err := r.remote.next(ctx, r.l, &raw); err != nil {
		return err
	}
	if err := r.converge(ctx, raw); err != nil {
		r.remote.reset()
		return fmt.Errorf("replicate config entries: %w", err)
	}
	return nil
}

// converge makes the stored entries equal to those of the primary: first what
// is to go, then what is new or differs.
func (r *entryReplicator) converge(ctx context.Context, raw []json.RawMessage) error {
	want := map[entryKey]configentry.Entry{}
	var order []entryKey
	unknown := map[string]bool{}
	for _, b := range raw {
		var head struct{ Kind string }
		if err := json.Unmarshal(b, &head); err != nil {
			return err
		}
		if head.Kind == configentry.ExportedServices {
			continue
		}
		e, err := api.MakeConfigEntry(head.Kind, "")
		if err != nil {
			unknown[head.Kind] = true // the primary runs a newer version
			continue
		}
		if err := json.Unmarshal(b, e); err != nil {
			return fmt.Errorf("decode entry of kind %q: %w", head.Kind, err)
		}
		k := keyOf(e)
		want[k] = e
		order = append(order, k)
	}
	for kind := range unknown {
		r.l.log.Warn("cannot replicate config entries of an unknown kind", "kind", kind)
	}

	_, local, err := r.l.core.Store().AllConfigEntries(nil)
	if err != nil {
		return err
	}
	have := map[entryKey]configentry.Entry{}
	out := batch{l: r.l}
	for _, e := range local {
		k := keyOf(e)
		have[k] = e
		if want[k] != nil || e.GetKind() == configentry.ExportedServices {
			continue
		}
		delete(r.same, k)
		if err := out.add(ctx, 256, state.ConfigEntryCommand(state.ConfigEntryReplicateDelete, e, 0)); err != nil {
			return err
		}
	}
	for _, k := range order {
		e, old := want[k], have[k]
		var at [2]uint64
		if old != nil {
			at = [2]uint64{e.GetModifyIndex(), old.GetModifyIndex()}
			if r.same[k] == at {
				continue
			}
		}
		content, err := entryContent(e)
		if err != nil {
			return err
		}
		if old != nil {
			was, err := entryContent(old)
			if err != nil {
				return err
			}
			if bytes.Equal(was, content) {
				r.same[k] = at
				continue
			}
		}
		if err := out.add(ctx, len(content), state.ConfigEntryCommand(state.ConfigEntryReplicate, e, 0)); err != nil {
			return err
		}
	}
	return out.flush(ctx)
}

// entryContent returns what an entry says, indexes apart, in a comparable form.
func entryContent(e configentry.Entry) ([]byte, error) {
	v := reflect.ValueOf(e).Elem()
	c := reflect.New(v.Type())
	c.Elem().Set(v)
	for _, f := range []string{"CreateIndex", "ModifyIndex"} {
		c.Elem().FieldByName(f).SetUint(0)
	}
	return json.Marshal(c.Interface())
}
