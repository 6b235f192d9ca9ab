package gateway

import (
	"math/rand/v2"
	"time"

	"github.com/hashicorp/go-hclog"
)

// ConnectionLister is a [DataPlane] that can tell of its open connections.
type ConnectionLister interface {
	// Connections returns open connections, the oldest first and at most limit. It
	// may wait for the data plane's own goroutines for a moment, and returns nil
	// when it does not run.
	Connections(limit int) []Connection
}

// Connection is an open connection. Where it has not reached an endpoint yet,
// what is not known is empty.
type Connection struct {
	Listener string
	Client   string // its address
	// ServerName is what the client asked for, where the data plane keeps it.
	ServerName string `json:",omitempty"`
	Cluster    string `json:",omitempty"`
	Endpoint   string `json:",omitempty"`
	// Since is when it was accepted.
	Since time.Time
	// BytesIn are from the client, and BytesOut to it.
	BytesIn, BytesOut uint64
}

// AccessLog writes one line for each connection at its end, or for a sample of
// them. A nil one writes nothing. Its methods may be called from any goroutine.
type AccessLog struct {
	Logger hclog.Logger
	// Sample is the part of the connections that is written, from 0 to 1.
	Sample float64
}

// Sampled says whether a connection's line is to be written. It is asked once for
// each connection, at its begin, so that nothing need be kept for the others.
func (l *AccessLog) Sampled() bool {
	return l != nil && (l.Sample >= 1 || rand.Float64() < l.Sample)
}

// Write writes the line of a connection that has ended: reason is a Close or a
// Refuse constant.
func (l *AccessLog) Write(c *Connection, reason string) {
	l.Logger.Info("connection", "listener", c.Listener, "peer", c.Client, "server_name", c.ServerName,
		"cluster", c.Cluster, "endpoint", c.Endpoint, "bytes_in", c.BytesIn, "bytes_out", c.BytesOut,
		"duration_ms", time.Since(c.Since).Milliseconds(), "reason", reason)
}
