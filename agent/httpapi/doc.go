// Package httpapi is the /v1 API: one route table, the wire forms, blocking
// queries, filters, and the texts and codes of errors. The same handler serves
// the HTTP port, the RPC port between agents, and the agent's own parts in
// process ([Handler.Transport]).
//
// A request is answered where it arrives if it is about this agent, or a read
// that this server may answer: as the leader, or with ?stale. Otherwise it is
// passed on, as it came, to the leader, to a server of ?dc=, or, where it
// changes what all datacenters share, to the primary datacenter. A client agent
// passes on everything that is not about itself. The scope of a route says
// which.
//
// Paths, parameters, JSON, headers, codes and texts are Consul's, because
// clients match on them; a difference made on purpose is marked COMPAT.
//
// The package starts no goroutine of its own but the one that serves a request
// of [Handler.Transport], which ends with the request.
package httpapi
