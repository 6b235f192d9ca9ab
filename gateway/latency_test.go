package gateway_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/go-memdb"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/gateway"
	"github.com/sluicemesh/sluice/proxycfg"
	"github.com/sluicemesh/sluice/proxycfg/proxycfgtest"
)

// notifyingPlane says what index it was given.
type notifyingPlane struct {
	fakePlane
	indexes chan uint64
}

func (p *notifyingPlane) Apply(t *gateway.Table) {
	select {
	case p.indexes <- t.Index:
	default: // the benchmark waits for the newest, and reads all of them
		panic("the benchmark does not keep up")
	}
}

// BenchmarkChangeToApply is the time from a change of the catalog to the table in
// the data plane, through manager and runner, for a gateway that has been idle.
func BenchmarkChangeToApply(b *testing.B) {
	for _, n := range []int{1_000, 10_000} {
		b.Run(fmt.Sprintf("%d-services", n), func(b *testing.B) {
			src := many(n)
			proxies := []proxycfg.Proxy{{
				Service:    &catalog.Service{Kind: api.ServiceKindMeshGateway, ID: "gw", Service: "mesh-gateway", Port: 8443},
				Node:       &catalog.Node{Node: "here", Address: "10.0.0.1"},
				Datacenter: "dc1",
			}}
			m := proxycfg.NewManager(proxycfg.Config{
				Source: src, Proxies: func(memdb.WatchSet) []proxycfg.Proxy { return proxies }, Settle: time.Nanosecond, MaxPerSecond: 1_000_000,
			})
			plane := &notifyingPlane{fakePlane: fakePlane{fail: make(chan error, 1)}, indexes: make(chan uint64, 1000)}
			r, err := gateway.NewRunner(gateway.RunnerConfig{
				Latest: m.Latest, KeepDir: b.TempDir(),
				Factory: func(catalog.Kind, string, map[string]any) (gateway.DataPlane, error) { return plane, nil },
			})
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(b.Context())
			var wg sync.WaitGroup
			wg.Go(func() { _ = m.Run(ctx) })
			wg.Go(func() { _ = r.Run(ctx) })
			defer wg.Wait()
			defer cancel()
			<-plane.indexes

			name := catalog.Name("service-00500")
			var took []time.Duration
			index := uint64(1000)
			for b.Loop() {
				index++
				began := time.Now()
				src.Update(func(d *proxycfgtest.Data) {
					services := maps.Clone(d.Connect["dc1"])
					changed := *services[name][0]
					service := *changed.Service
					service.ModifyIndex = index
					changed.Service = &service
					services[name] = []*catalog.Instance{&changed, services[name][1], services[name][2]}
					d.Connect["dc1"], d.Index = services, index
				})
				for i := range plane.indexes {
					if i == index {
						break
					}
				}
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
		})
	}
}
