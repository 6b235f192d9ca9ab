// Package gateway turns what is true into what to do: [Compile] makes the
// forwarding [Table] of a proxy from a [proxycfg.Snapshot], [Runner] hands the
// newest table to the proxy's [DataPlane], and [Keep] has the last one on disk,
// so that a restarted agent forwards before any server has answered.
//
// The table is the only place that routes are derived in. Data planes translate
// it, [Explain] walks it, and two equal tables have equal JSON.
//
// Three rules hold throughout. What is unknown never replaces what is known: a
// cluster whose endpoints are pending keeps those of the table before it
// ([Carry]). A table that does not pass [Table.Check] is not used, and the one
// before it stays. And a fault of one route is a warning in the table, never a
// reason to withhold the others.
//
// [Compiler], [Carry], [Explain] and [Table] start no goroutine. [Runner.Run]
// owns all that it starts, and returns when they have ended.
package gateway
