package cluster

import (
	"context"
	"time"

	"github.com/hashicorp/raft"
)

// CaughtUp is closed once this server's state holds, for the first time since it
// started, everything that was committed before. Until then the state may lack
// what the datacenter has, and "there is none" means nothing: raft applies what
// a log holds only after there is a leader again.
func (s *Server) CaughtUp() <-chan struct{} { return s.caughtUp }

// catchUp closes caughtUp when it is time.
func (s *Server) catchUp(ctx context.Context, r *raft.Raft) {
	// Raft offers nothing to wait on for a follower, and this ends soon after the
	// start.
	const every = 20 * time.Millisecond
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		switch r.State() {
		case raft.Leader:
			if s.Barrier(ctx) == nil {
				close(s.caughtUp)
				return
			}
		case raft.Follower:
			// What this server has in its log is applied, and so is what the leader,
			// which has been heard from, said is committed.
			applied := r.AppliedIndex()
			if !r.LastContact().IsZero() && applied > 0 && applied >= max(r.LastIndex(), r.CommitIndex()) {
				close(s.caughtUp)
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
