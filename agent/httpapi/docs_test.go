package httpapi

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// docs is the page that lists the routes; UPDATE_GOLDEN=1 writes it anew.
const docs = "../../website/http-api.md"

func TestDocsListTheRoutes(t *testing.T) {
	var b strings.Builder
	b.WriteString(`# HTTP API

Generated from the route table of agent/httpapi; change it there.

Paths, parameters, bodies and errors are Consul's. "Answered by" says which agent answers:

| scope | answered by |
|---|---|
| agent | the agent that is asked |
| server | any server of the datacenter |
| read | the leader of the datacenter; any server of it with ` + "`stale`" + ` |
| write | the leader of the datacenter |
| primary | the leader of the primary datacenter |

Every other scope than agent takes ` + "`dc`" + `, and a request is passed on to where it belongs. Reads that are not the
agent's own take ` + "`index`" + ` and ` + "`wait`" + ` to block, ` + "`stale`, `max_stale`, `consistent`, `leader`" + `; all answers take ` + "`pretty`" + `.

| method | path | scope | what |
|---|---|---|---|
`)
	names := map[scope]string{scopeAgent: "agent", scopeServer: "server", scopeRead: "read", scopeWrite: "write", scopePrimary: "primary"}
	for _, r := range routeTable {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.method, r.pattern, names[r.scope], r.doc)
	}
	b.WriteString(`
## Differences from Consul

- The key/value store, sessions, prepared queries, events, peering and transactions are not offered: 404.
- ` + "`near`" + ` sorts by the round-trip times that the answering server's own gossip has measured; nodes that have not
  answered it yet come last. ` + "`/v1/coordinate`" + ` is not offered.
- Checks of an operating system's service (OSService), DisableRedirects and OutputMaxSize are refused, 400.
- Only intentions that were made by a POST have IDs; the exact endpoints are for all. The times at which those were made
  and changed are not kept.
- ` + "`/v1/agent/proxies`" + ` and ` + "`/v1/agent/proxy`" + ` are additions.
`)
	want := b.String()
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.MkdirAll(filepath.Dir(docs), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(docs, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(docs)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("%s is not current; run with UPDATE_GOLDEN=1 (-want +got):\n%s", docs, diff)
	}
}
