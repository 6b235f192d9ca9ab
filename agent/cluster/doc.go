// Package cluster is an agent's place among the others: the replicated log
// (raft), the gossip pools of its datacenter (LAN) and of all servers (WAN), the
// one RPC port, and the ways to reach another agent's API through it.
//
// A [Server] is a voter of its datacenter and knows the other datacenters; a
// [Client] only gossips in its datacenter and hands requests to its servers.
// Both are built without starting anything; Run starts what they consist of,
// blocks until its context ends, and returns when every goroutine has ended.
//
// The RPC port carries raft's stream and HTTP/2, told apart by the first byte or,
// under TLS, by ALPN. There is no other RPC: the HTTP/2 side serves the handler
// of the /v1 API, and Forward is a [net/http.RoundTripper] to it.
//
// Gossip events are only hints here. Each consumer (server lists, voters,
// flooding, bootstrap, the leader's duties) is woken and looks at the members
// anew, so that a lost event costs a delay and nothing else, and serf is never
// made to wait.
//
// What a server does only while it leads is in leader.go and the files it names.
package cluster
