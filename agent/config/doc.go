// Package config turns what an operator writes (flags, and files in HCL, JSON
// and YAML) into one validated, immutable [Runtime].
//
// The way is the same for every source. A parser makes a tree of maps, lists
// and scalars in which each node knows its file, line and column; flags make
// such a tree too. One strict decoder, driven by the types it decodes into,
// reads the trees one after another into the same settings. So merging is
// nothing but decoding the next source: scalars replace, lists grow, maps merge
// key by key and blocks recursively, and an error can always say where the
// value came from. Defaults and rules come last, over the whole.
//
// Nothing stops at the first problem: [Load] returns all of them as [Problems].
// Keys that Consul knows and this agent has no use for are accepted and named in
// one warning; a key that would make the agent less safe than its author
// believes is refused instead.
//
// The package reads files and asks the machine for its name and addresses. It
// binds, writes and starts nothing.
package config
