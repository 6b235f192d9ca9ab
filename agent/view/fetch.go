package view

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/configentry"
	"github.com/sluicemesh/sluice/agent/connect"
)

// maxBody bounds one answer, in bytes.
const maxBody = 256 << 20

// errWentBack means that a server that may be behind gave an answer older than
// the one held.
var errWentBack = errors.New("index went back")

// answer is an immutable good answer.
type answer struct {
	value any
	index uint64
	sum   [sha256.Size]byte // of status and body
	// parts, for a value made of many lists, are the sums of their JSON by key, so
	// that the next answer shares those that are the same.
	parts map[string][sha256.Size]byte
}

// decoder makes a value of a good answer or a 404; prev is nil or the last one.
// Its other result becomes answer.parts.
type decoder func(status int, body []byte, prev *answer) (any, map[string][sha256.Size]byte, error)

// fetch makes one request: of the leader, for an answer at once; else of any
// server, for one that is newer than prev.
func (r *Remote) fetch(ctx context.Context, q *query, prev *answer, leader bool) (*answer, time.Time, error) {
	params := ""
	if !leader {
		params = "stale=&wait=" + r.cfg.Wait.String()
		if prev != nil {
			params += "&index=" + strconv.FormatUint(prev.index, 10)
		}
	}
	address := "http://agent" + q.path
	if params != "" {
		sep := "?"
		if strings.Contains(q.path, "?") {
			sep = "&"
		}
		address += sep + params
	}
	// Servers add up to a sixteenth to the wait.
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Wait+r.cfg.Wait/16+slack)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, time.Time{}, err
	}
	resp, err := r.cfg.Client.Do(req)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	received := time.Now()
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("read answer: %w", err)
	}
	if len(body) > maxBody {
		return nil, time.Time{}, fmt.Errorf("read answer: more than %d bytes", maxBody)
	}
	// The index tells an answer of the state, 404 among them, from one that has
	// nothing to do with it: a path the server does not know, a proxy's page.
	index, err := strconv.ParseUint(resp.Header.Get("X-Consul-Index"), 10, 64)
	if err != nil || resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNotFound {
		return nil, time.Time{}, fmt.Errorf("unexpected response code: %d (%s)", resp.StatusCode, excerpt(body))
	}
	if resp.Header.Get("X-Consul-KnownLeader") == "false" {
		// It may have just started and know nothing yet.
		return nil, time.Time{}, errors.New("the server knows no leader")
	}
	index = max(index, 1)
	if !leader && prev != nil && index < prev.index {
		return nil, time.Time{}, fmt.Errorf("%w from %d to %d", errWentBack, prev.index, index)
	}
	asOf := received
	if ms, err := strconv.ParseInt(resp.Header.Get("X-Consul-LastContact"), 10, 64); err == nil && ms > 0 {
		asOf = asOf.Add(-time.Duration(ms) * time.Millisecond)
	}
	next := &answer{index: index, sum: sumOf(resp.StatusCode, body)}
	if prev != nil && prev.sum == next.sum {
		next.value, next.parts = prev.value, prev.parts
		return next, asOf, nil
	}
	if next.value, next.parts, err = q.decode(resp.StatusCode, body, prev); err != nil {
		return nil, time.Time{}, fmt.Errorf("decode answer: %w", err)
	}
	return next, asOf, nil
}

func sumOf(status int, body []byte) [sha256.Size]byte {
	h := sha256.New()
	fmt.Fprintln(h, status)
	h.Write(body)
	return [sha256.Size]byte(h.Sum(nil))
}

// excerpt is the beginning of an error's text.
func excerpt(body []byte) string {
	const most = 200
	body = bytes.TrimSpace(body)
	if len(body) > most {
		body = append(body[:most:most], "..."...)
	}
	return strings.ToValidUTF8(string(body), "?")
}

// found rejects a 404 where it does not mean an absent record.
func found(status int, body []byte) error {
	if status != http.StatusOK {
		return fmt.Errorf("unexpected response code: %d (%s)", status, excerpt(body))
	}
	return nil
}

// Roots returns the trusted roots.
func (r *Remote) Roots(ws memdb.WatchSet) (*connect.Roots, catalog.Freshness, error) {
	return get[*connect.Roots](r, ws, "/v1/connect/ca/roots", decodeRoots)
}

func decodeRoots(status int, body []byte, _ *answer) (any, map[string][sha256.Size]byte, error) {
	if err := found(status, body); err != nil {
		return nil, nil, err
	}
	roots := &connect.Roots{}
	if err := json.Unmarshal(body, roots); err != nil {
		return nil, nil, err
	}
	for _, root := range roots.Roots {
		if root == nil {
			return nil, nil, errors.New("an empty root")
		}
	}
	if roots.Active() == nil {
		return nil, nil, errors.New("no active root: the CA is not initialised")
	}
	return roots, nil, nil
}

// Leaf returns the current certificate of a local service.
func (r *Remote) Leaf(ws memdb.WatchSet, service catalog.ServiceName) (*connect.Leaf, catalog.Freshness, error) {
	return r.cfg.Leaves.Leaf(ws, service)
}

// entryValue holds an entry, or nil: a nil interface cannot be told from none at
// all.
type entryValue struct{ entry configentry.Entry }

// ConfigEntry returns nil where there is no such entry.
func (r *Remote) ConfigEntry(ws memdb.WatchSet, kind, name string) (configentry.Entry, catalog.Freshness, error) {
	v, fresh, err := get[entryValue](r, ws, "/v1/config/"+url.PathEscape(kind)+"/"+url.PathEscape(name), entryDecoder(kind))
	return v.entry, fresh, err
}

func entryDecoder(kind string) decoder {
	return func(status int, body []byte, _ *answer) (any, map[string][sha256.Size]byte, error) {
		if status == http.StatusNotFound {
			return entryValue{}, nil, nil
		}
		e, err := decodeEntry(kind, body)
		return entryValue{e}, nil, err
	}
}

// decodeEntry passes over fields that it does not know: a newer server may. What
// is written in another way than the types', a duration as text, takes the strict
// decoder.
func decodeEntry(kind string, body []byte) (configentry.Entry, error) {
	e, err := configentry.New(kind, "")
	if err != nil {
		return nil, err
	}
	if json.Unmarshal(body, e) != nil {
		if e, err = configentry.DecodeJSON(body); err != nil {
			return nil, err
		}
	}
	if e.GetKind() != kind {
		return nil, fmt.Errorf("config entry of kind %q where %q was asked for", e.GetKind(), kind)
	}
	return e, nil
}

// ConfigEntries returns all entries of a kind by name.
func (r *Remote) ConfigEntries(ws memdb.WatchSet, kind string) ([]configentry.Entry, catalog.Freshness, error) {
	return get[[]configentry.Entry](r, ws, "/v1/config/"+url.PathEscape(kind), entriesDecoder(kind))
}

func entriesDecoder(kind string) decoder {
	return func(status int, body []byte, _ *answer) (any, map[string][sha256.Size]byte, error) {
		if err := found(status, body); err != nil {
			return nil, nil, err
		}
		var raw []json.RawMessage
		if err := json.Unmarshal(body, &raw); err != nil {
			return nil, nil, err
		}
		out := make([]configentry.Entry, len(raw))
		for i := range raw {
			var err error
			if out[i], err = decodeEntry(kind, raw[i]); err != nil {
				return nil, nil, err
			}
		}
		return out, nil, nil
	}
}

// Intentions returns those that apply to a destination, highest precedence first.
func (r *Remote) Intentions(ws memdb.WatchSet, destination catalog.ServiceName) ([]*configentry.Intention, catalog.Freshness, error) {
	// Both entries are asked for at once, whichever is missing.
	_, _, _ = r.ConfigEntry(ws, configentry.ServiceIntentions, configentry.Wildcard)
	return intentions(r, ws, destination)
}

// Connect returns the instances that accept mutual TLS for a service, in any
// datacenter.
func (r *Remote) Connect(ws memdb.WatchSet, datacenter string, service catalog.ServiceName) ([]*catalog.Instance, catalog.Freshness, error) {
	service = service.Canonical()
	params := url.Values{}
	if datacenter != "" && datacenter != r.cfg.Datacenter {
		params.Set("dc", datacenter)
	}
	if service.Namespace != catalog.DefaultTenancy {
		params.Set("ns", service.Namespace)
	}
	if service.Partition != catalog.DefaultTenancy {
		params.Set("partition", service.Partition)
	}
	path := "/v1/health/connect/" + url.PathEscape(service.Name)
	if len(params) > 0 {
		path += "?" + params.Encode()
	}
	return get[[]*catalog.Instance](r, ws, path, decodeInstances)
}

func decodeInstances(status int, body []byte, _ *answer) (any, map[string][sha256.Size]byte, error) {
	if err := found(status, body); err != nil {
		return nil, nil, err
	}
	out, err := instances(body)
	return out, nil, err
}

func instances(body []byte) ([]*catalog.Instance, error) {
	var out []*catalog.Instance
	if err := json.Unmarshal(body, &out); err != nil {
		return nil, err
	}
	for _, inst := range out {
		if inst == nil || inst.Node == nil || inst.Service == nil {
			return nil, errors.New("an instance without node or service")
		}
		inst.Checks = withoutNil(inst.Checks)
	}
	return out, nil
}

func withoutNil(in api.HealthChecks) api.HealthChecks {
	out := in[:0]
	for _, c := range in {
		if c != nil {
			out = append(out, c)
		}
	}
	return out
}

// ConnectAll returns the instances that accept mutual TLS of every service in
// this datacenter. Services that did not change keep their slices.
func (r *Remote) ConnectAll(ws memdb.WatchSet) (map[catalog.ServiceName][]*catalog.Instance, catalog.Freshness, error) {
	return get[map[catalog.ServiceName][]*catalog.Instance](r, ws, "/v1/internal/catalog/connect", groups(func(key string) catalog.ServiceName {
		var name catalog.ServiceName
		_ = name.UnmarshalText([]byte(key)) // cannot fail
		return name
	}))
}

// MeshGateways returns the gateways of every datacenter that has any.
func (r *Remote) MeshGateways(ws memdb.WatchSet) (map[string][]*catalog.Instance, catalog.Freshness, error) {
	return get[map[string][]*catalog.Instance](r, ws, "/v1/internal/catalog/mesh-gateways", groups(func(key string) string { return key }))
}

// groups decodes an object of lists of instances. Lists that are the same as in
// the last answer are taken from it; empty ones are left out.
func groups[K comparable](keyOf func(string) K) decoder {
	return func(status int, body []byte, prev *answer) (any, map[string][sha256.Size]byte, error) {
		if err := found(status, body); err != nil {
			return nil, nil, err
		}
		var raw map[string]json.RawMessage
		if err := json.Unmarshal(body, &raw); err != nil {
			return nil, nil, err
		}
		var old map[K][]*catalog.Instance
		if prev != nil {
			old = prev.value.(map[K][]*catalog.Instance)
		}
		out := make(map[K][]*catalog.Instance, len(raw))
		parts := make(map[string][sha256.Size]byte, len(raw))
		for key, part := range raw {
			sum := sha256.Sum256(part)
			k := keyOf(key)
			parts[key] = sum
			if prev != nil && prev.parts[key] == sum {
				if in, ok := old[k]; ok {
					out[k] = in
				}
				continue
			}
			in, err := instances(part)
			if err != nil {
				return nil, nil, fmt.Errorf("%q: %w", key, err)
			}
			if len(in) > 0 {
				out[k] = in
			}
		}
		return out, parts, nil
	}
}
