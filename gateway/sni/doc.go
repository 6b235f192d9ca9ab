// Package sni is the data plane of a mesh gateway: it accepts TLS connections,
// reads the server name of the ClientHello, chooses an endpoint by the
// forwarding table, and from then on moves bytes it cannot read.
//
// A [Forwarder] is a [gateway.DataPlane]. It has two engines behind one small
// interface: epoll (Linux; one locked thread with its own SO_REUSEPORT listener
// per core, no goroutine and hardly any memory per connection) and netpoll
// (portable; goroutines and the runtime's poller). What they share is all that
// decides: the ClientHello reader, the route index, the choice of an endpoint,
// the accounting. One test suite runs on both.
//
// # Decisions
//
// A connection that is routed keeps its endpoint until it ends, whatever tables
// come. Where the table asks for it, one that is in the wrong place is ended at a
// pace, so that its client comes again: after a failover, and when endpoints were
// added. When a listener is removed its socket closes at once, and its
// connections may go on for Config.DrainTimeout. When Run's context ends
// everything closes at once.
//
// There is no panic mode: an endpoint of which a check says that it is critical
// (Healthy false, with a Why) is never dialled, not even when no other is left;
// such a connection goes to the failover clusters, or is refused as
// no-endpoint, which names the cause instead of hiding it behind a timeout. An
// endpoint of unknown health (Healthy false, Why empty) is dialled when nothing
// healthy could be, neither in the cluster nor in its failovers.
//
// An endpoint that cannot be connected to is passed over for a time that grows
// (passive ejection), per cluster and endpoint, but never the last one: being
// ejected is a guess, and a guess must not take a cluster out of service.
//
// Of an endpoint whose name has several addresses the next is tried beside those
// before it once they have had a quarter of a second, or have failed, and the first
// to be connected is used (RFC 8305). Those that were slower come last for a time.
//
// Limits are counted where a connection is accepted, without locks: a rate is one
// word that says when it will be full again, and sources have places in a table of
// fixed size. Who is behind a trusted load balancer counts by the source that the
// header of the PROXY protocol names; from anybody else a header is no TLS, and is
// refused as that. Of the clients whose hello is waited for the oldest is shed when
// there are too many, so that a flood that says nothing costs the others little.
//
// Of the endpoints of one priority the nearest are used while one of them can be;
// the others are what a connection goes to when none of those can.
//
// A drain closes a socket only after holding off what is new and accepting what
// waits there: closing it over the queue would reset connections that a client
// holds for made.
//
// A refused connection is closed without a TLS alert, as Envoy does: an alert
// would be read as the word of the service.
//
// # What it refuses to do
//
// It does not terminate TLS, does not authorise (that is end to end), and does
// not ask another endpoint once one has answered, or more than the hello was sent.
package sni
