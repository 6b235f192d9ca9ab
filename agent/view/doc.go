// Package view is what an agent knows of the mesh: the reads that its proxies'
// configuration is built from, each a value, how current it is, and a channel that
// closes when another may be had.
//
// [Local] reads a server's own replicated state. [Remote] keeps the answers of the
// servers, on a client agent, and of other datacenters: one loop of blocking
// queries for each distinct query, shared by all who read it. It
//   - starts a loop at the first read and ends it when nobody has read for long;
//   - never forgets an answer because the next one failed: it grows older, and says
//     so;
//   - tells unknown ([catalog.ErrPending]) from empty;
//   - believes what it cannot compare with what it has (the first answer, one after
//     a failure, one that goes back) only of a leader. In between any server may
//     answer.
//
// All loops are owned by [Remote.Run], which waits for them.
package view
