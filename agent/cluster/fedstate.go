package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/state"
)

const (
	// fedStateCheck is how often the own record is compared although nothing is
	// known to have changed: a write may have been lost with the primary's leader.
	fedStateCheck = time.Minute
	fedStatePrune = time.Hour
)

// fedStateLoop keeps this datacenter's record, by which the others find its
// gateways, equal to its catalog.
func (l *leader) fedStateLoop(ctx context.Context) error {
	return l.do(ctx, duty{name: "federation state", pass: l.publishFedState, every: fedStateCheck, wake: &l.wan})
}

func (l *leader) publishFedState(ctx context.Context, ws memdb.WatchSet) error {
	store := l.core.Store()
	_, gateways, err := store.ServicesByKind(ws, api.ServiceKindMeshGateway)
	if err != nil {
		return fmt.Errorf("publish federation state: %w", err)
	}
	_, own, err := store.FederationState(ws, l.cfg.Datacenter)
	if err != nil {
		return fmt.Errorf("publish federation state: %w", err)
	}
	// A record with no gateways says something too: that there are none.
	if own != nil && state.SameGateways(own.MeshGateways, gateways) {
		return nil
	}
	next := &state.FederationState{Datacenter: l.cfg.Datacenter, MeshGateways: gateways, UpdatedAt: time.Now().UTC()}
	if l.isPrimary() {
		err = l.apply(ctx, state.FederationStateCommand(next))
	} else {
		// It comes back by replication; the stored record changes only then.
		_, err = l.primary(ctx, http.MethodPut, "/v1/internal/federation-state", next, nil)
	}
	if err != nil {
		return fmt.Errorf("publish federation state: %w", err)
	}
	return nil
}

// fedStatePruneLoop forgets, in the primary, datacenters that left the
// federation. It waits before it first does: at the start of a term the WAN
// pool may not be whole yet.
func (l *leader) fedStatePruneLoop(ctx context.Context) error {
	return l.do(ctx, duty{name: "federation state pruning", pass: l.pruneFedStates, every: fedStatePrune, late: true})
}

func (l *leader) pruneFedStates(ctx context.Context, _ memdb.WatchSet) error {
	_, states, err := l.core.Store().FederationStates(nil)
	if err != nil {
		return fmt.Errorf("prune federation states: %w", err)
	}
	// Failed servers count: they are reaped from the pool in time.
	known := map[string]bool{l.cfg.Datacenter: true}
	for _, s := range serversOf(l.core.WANMembers()) {
		known[s.dc] = true
	}
	for _, fs := range states {
		if known[fs.Datacenter] {
			continue
		}
		if err := l.apply(ctx, state.DeleteFederationStateCommand(fs.Datacenter)); err != nil {
			return fmt.Errorf("prune federation state of %q: %w", fs.Datacenter, err)
		}
		l.log.Info("federation state pruned", "dc", fs.Datacenter)
	}
	return nil
}

// replicateFedStatesLoop keeps this datacenter's copy of all records equal to
// the primary's, its own among them.
func (l *leader) replicateFedStatesLoop(ctx context.Context) error {
	remote := follower{path: "/v1/internal/federation-states"}
	return l.do(ctx, duty{name: "federation state replication", wake: &l.wan, pass: func(ctx context.Context, _ memdb.WatchSet) error {
		var states []*state.FederationState
		if err := remote.next(ctx, l, &states); err != nil {
			return err
		}
		if err := l.convergeFedStates(ctx, states); err != nil {
			remote.reset()
			return fmt.Errorf("replicate federation states: %w", err)
		}
		return nil
	}})
}

func (l *leader) convergeFedStates(ctx context.Context, want []*state.FederationState) error {
	_, local, err := l.core.Store().FederationStates(nil)
	if err != nil {
		return err
	}
	have := map[string]*state.FederationState{}
	for _, fs := range local {
		have[fs.Datacenter] = fs
	}
	wanted := map[string]bool{}
	for _, fs := range want {
		if fs == nil || fs.Datacenter == "" {
			return fmt.Errorf("a record without a datacenter")
		}
		wanted[fs.Datacenter] = true
	}
	out := batch{l: l}
	for _, fs := range local {
		if !wanted[fs.Datacenter] {
			if err := out.add(ctx, 64, state.DeleteFederationStateCommand(fs.Datacenter)); err != nil {
				return err
			}
		}
	}
	for _, fs := range want {
		if fs.PrimaryModifyIndex == 0 {
			fs.PrimaryModifyIndex = fs.ModifyIndex
		}
		old := have[fs.Datacenter]
		if old != nil && old.PrimaryModifyIndex == fs.PrimaryModifyIndex && state.SameGateways(old.MeshGateways, fs.MeshGateways) {
			continue
		}
		size, err := json.Marshal(fs)
		if err != nil {
			return err
		}
		if err := out.add(ctx, len(size), state.FederationStateCommand(fs)); err != nil {
			return err
		}
	}
	return out.flush(ctx)
}
