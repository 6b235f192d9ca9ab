package gateway_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
)

// drainPlane is a data plane that drains as far as it is told.
type drainPlane struct {
	*fakePlane
	begun chan gateway.Plan
	tell  chan gateway.Progress
	ended chan struct{}
	// back is whether a drain was taken back.
	back bool
}

func (p *drainPlane) Run(ctx context.Context) error {
	defer close(p.ended)
	return p.fakePlane.Run(ctx)
}

func (p *drainPlane) Drain(ctx context.Context, plan gateway.Plan, progress func(gateway.Progress)) error {
	p.begun <- plan
	for {
		select {
		case x := <-p.tell:
			progress(x)
		case <-p.ended:
			return gateway.ErrStopped
		case <-ctx.Done():
			p.back = true
			return nil
		}
	}
}

func (p *drainPlane) Connections(limit int) []gateway.Connection {
	return []gateway.Connection{{Listener: "l", Client: "c"}}[:min(limit, 1)]
}

// drainBench is a runner with one gateway whose data plane drains.
func drainBench(t *testing.T) (b *bench, plane func(i int) *drainPlane) {
	t.Helper()
	b = newBench(t, "", newFeed())
	var planes []*drainPlane
	b.wrap = func(p *fakePlane) gateway.DataPlane {
		d := &drainPlane{p, make(chan gateway.Plan, 1), make(chan gateway.Progress), make(chan struct{}), false}
		planes = append(planes, d)
		return d
	}
	b.set("gw1", current(t, "gateway", 100, nil))
	return b, func(i int) *drainPlane { b.plane(i); return planes[i] }
}

func TestRunnerDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, plane := drainBench(t)
		defer b.stop()
		var said []bool
		announce := func(on bool) error { said = append(said, on); return nil }
		plan := gateway.Plan{Wait: 5 * time.Second, Timeout: time.Minute, Rate: 7}
		if _, err := b.runner.DrainProgress("gw1"); !errors.Is(err, gateway.ErrNotDraining) {
			t.Errorf("progress before: %v", err)
		}
		if err := b.runner.Drain("gw1", plan, announce); err != nil {
			t.Fatal(err)
		}
		if err := b.runner.Drain("gw1", plan, announce); !errors.Is(err, gateway.ErrDraining) {
			t.Errorf("second drain: %v", err)
		}
		start := time.Now()
		if p, err := b.runner.DrainProgress("gw1"); err != nil || p.Phase != gateway.DrainWaiting {
			t.Errorf("progress %+v, %v", p, err)
		}
		if got := <-plane(0).begun; got != plan || time.Since(start) != plan.Wait {
			t.Errorf("drained by %+v after %v", got, time.Since(start))
		}
		plane(0).tell <- gateway.Progress{Phase: gateway.DrainFinishing, Open: 3}
		synctest.Wait()
		if p := b.status().Drain; p == nil || p.Open != 3 || !p.Since.Equal(start) {
			t.Errorf("progress in the status: %+v", p)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := b.runner.AwaitDrained(ctx, "gw1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("drained with connections: %v", err)
		}
		plane(0).tell <- gateway.Progress{Phase: gateway.DrainDrained}
		if err := b.runner.AwaitDrained(t.Context(), "gw1"); err != nil {
			t.Error(err)
		}

		// A data plane that is started anew is drained, too.
		plane(0).fail <- errors.New("broken")
		time.Sleep(time.Second) // it is retried
		synctest.Wait()
		if got := <-plane(1).begun; got != plan {
			t.Errorf("the new one is drained by %+v", got)
		}
		if err := b.runner.CancelDrain(t.Context(), "gw1"); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]bool{true, false}, said); diff != "" {
			t.Errorf("announced (-want +got):\n%s", diff)
		}
		if b.status().Drain != nil {
			t.Error("the status tells of a drain that was taken back")
		}
		if err := b.runner.CancelDrain(t.Context(), "gw1"); !errors.Is(err, gateway.ErrNotDraining) {
			t.Errorf("taken back twice: %v", err)
		}

		if !plane(1).back {
			t.Error("the data plane does not accept again")
		}
		plane(1).back = false

		// And again, until everything ends: then it must not accept any more.
		if err := b.runner.Drain("gw1", gateway.Plan{}, announce); err != nil {
			t.Fatal(err)
		}
		<-plane(1).begun
		b.stop()
		if diff := cmp.Diff([]bool{true, false, true}, said); diff != "" {
			t.Errorf("announced at the end (-want +got):\n%s", diff)
		}
		if plane(1).back {
			t.Error("the data plane accepts again before it ends")
		}
	})
}

// TestRunnerDrainWaits takes a drain back before anything was closed.
func TestRunnerDrainWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, plane := drainBench(t)
		defer b.stop()
		last := false
		if err := b.runner.Drain("gw1", gateway.Plan{Wait: time.Hour}, func(on bool) error { last = on; return nil }); err != nil {
			t.Fatal(err)
		}
		if err := b.runner.CancelDrain(t.Context(), "gw1"); err != nil || last || len(plane(0).begun) > 0 {
			t.Errorf("taken back: %v, announced %v, %d drains begun", err, last, len(plane(0).begun))
		}
	})
}

func TestRunnerDrainErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, _ := drainBench(t)
		defer b.stop()
		fail := errors.New("no")
		if err := b.runner.Drain("gw1", gateway.Plan{}, func(bool) error { return fail }); !errors.Is(err, fail) {
			t.Errorf("announcing fails: %v", err)
		}
		if _, err := b.runner.DrainProgress("gw1"); !errors.Is(err, gateway.ErrNotDraining) {
			t.Errorf("after that: %v", err)
		}
		never := func(bool) error { t.Error("announced"); return nil }
		if err := b.runner.Drain("other", gateway.Plan{}, never); !errors.Is(err, gateway.ErrNoProxy) {
			t.Errorf("another proxy: %v", err)
		}
		if c, err := b.runner.Connections("gw1", 10); err != nil || len(c) != 1 {
			t.Errorf("connections %v, %v", c, err)
		}
		if _, err := b.runner.Connections("other", 10); !errors.Is(err, gateway.ErrNoProxy) {
			t.Errorf("connections of another proxy: %v", err)
		}

		plain := newBench(t, "", newFeed())
		defer plain.stop()
		plain.set("gw1", current(t, "gateway", 100, nil))
		if err := plain.runner.Drain("gw1", gateway.Plan{}, never); !errors.Is(err, gateway.ErrNoDrain) {
			t.Errorf("a data plane that cannot: %v", err)
		}
		if _, err := plain.runner.Connections("gw1", 10); err == nil {
			t.Error("a data plane that lists no connections has no error")
		}
	})
}
