// Package state is a datacenter's replicated state: go-memdb tables, and the
// raft state machine that is their only writer.
//
// Invariants:
//   - Applying a command is deterministic. It reads no clock, no randomness and
//     no map order; time and identifiers arrive in the command. Two servers that
//     applied the same log write byte-identical snapshots.
//   - Records are shared and immutable. Whoever reads one must not change it; the
//     writer replaces it by a new one. What has not changed keeps its pointer, so
//     readers may compare pointers and share slices.
//   - A write that changes nothing moves no index and wakes no one.
//   - Every read returns the index to block on, and adds to the watch set the
//     channels that close when another answer may be had, among them the one that
//     closes when a restored snapshot replaces the store. A reader that is woken
//     asks the state machine for its store again.
//
// What is served by service name (all instances of a service, its mutual-TLS
// endpoints, the gateways of a kind) is kept ready in rows of its own, renewed by
// the write that changes them: a read is a lookup, its watch is one channel, and
// its index is that of the last change to that service alone.
//
// Names are compared without regard to case, as Consul's are.
//
// The package starts no goroutines.
package state
