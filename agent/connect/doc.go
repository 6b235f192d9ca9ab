// Package connect is the mesh's identity: the names that workloads are reached
// and recognised by (SNI and SPIFFE), the certificates that carry them, and the
// agent's keeping of its own workloads' certificates.
//
// Naming and the operations of the certificate authority are pure: they take
// the time and the keys they work with, and keep nothing. [LeafManager] is the
// one long-lived type; its goroutines belong to its Run.
package connect
