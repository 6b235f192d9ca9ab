// Package proxycfg finds out what a local proxy needs to know.
//
// [Build] is the only place that knows what that is: it reads from a [Source],
// merges central configuration into the registration, compiles the discovery
// chain of each upstream, chooses by what way its targets are reached, and
// returns an immutable [Snapshot] together with the channels that close when
// another one may be had. It decides nothing about connections; that is
// gateway.Compile.
//
// Unknown and empty are different throughout. What a whole proxy cannot do
// without (roots, its certificate, its intentions, central configuration) makes
// Build fail with [ErrPending]; what one upstream lacks makes that upstream
// pending and no other.
//
// [Manager] keeps the snapshot of every local proxy current: it builds when a
// channel closes, at once if it was idle and at most once per settling time in a
// burst, and keeps the last good snapshot whatever happens. Its goroutines, one
// for each proxy, are owned by [Manager.Run]. Nothing here waits for a source:
// a read that has no answer says so.
package proxycfg
