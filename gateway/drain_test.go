package gateway_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
)

func TestPacer(t *testing.T) {
	for _, test := range []struct {
		name     string
		rate     float64
		jitter   float64
		items    int
		min, max time.Duration // of the whole
		most     int           // in one turn
	}{
		{"slow", 2, 0, 21, 8 * time.Second, 12 * time.Second, 1},
		{"no jitter", 2, -1, 21, 10 * time.Second, 10 * time.Second, 1},
		{"default", 50, 0, 501, 9 * time.Second, 11 * time.Second, 1},
		{"fast", 1000, 0, 10_000, 9 * time.Second, 11 * time.Second, 10},
		{"faster than whole turns", 333, 1, 3330, 8 * time.Second, 12 * time.Second, 4},
		{"at once", 0, 0, 1000, 0, 0, 1000},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				left, most := test.items, 0
				gaps := map[time.Duration]bool{}
				start, last := time.Now(), time.Now()
				p := gateway.Pacer{Rate: test.rate, Jitter: test.jitter, Rand: rand.New(rand.NewPCG(1, 2))}
				if err := p.Run(t.Context(), func(n int) bool {
					gaps[time.Since(last)] = true
					last = time.Now()
					n = min(n, left)
					most = max(most, n)
					left -= n
					return left > 0
				}); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(start); took < test.min || took > test.max {
					t.Errorf("took %v, want from %v to %v", took, test.min, test.max)
				}
				if most > test.most {
					t.Errorf("%d in one turn, want %d at most", most, test.most)
				}
				if regular := len(gaps) <= 2; regular != (test.jitter < 0 || test.rate == 0) {
					t.Errorf("%d different gaps", len(gaps))
				}
			})
		})
	}
}

// TestPacerLate wants a turn that took long not to be followed by a burst.
func TestPacerLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := 0
		start := time.Now()
		_ = gateway.Pacer{Rate: 10, Jitter: -1}.Run(t.Context(), func(int) bool {
			if turns++; turns == 1 {
				time.Sleep(10 * time.Second)
			}
			return turns < 12
		})
		if took := time.Since(start); took != 11*time.Second {
			t.Errorf("took %v, want 10 s for the first turn and 100 ms for each of ten more", took)
		}
	})
}

func TestPacerCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := (gateway.Pacer{Rate: 0.1}).Run(ctx, func(int) bool { return true }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// drainable has connections that end at times of their own.
type drainable struct {
	ends      []time.Time // oldest connection first
	cut       []time.Time
	accepting bool
	stop      chan struct{}
	stopErr   error
}

func (d *drainable) StopAccepting(context.Context) error {
	d.accepting = false
	return d.stopErr
}
func (d *drainable) Resume()                { d.accepting = true }
func (d *drainable) Ended() <-chan struct{} { return d.stop }

func (d *drainable) Open() int {
	n := 0
	for _, e := range d.ends {
		if e.After(time.Now()) {
			n++
		}
	}
	return n
}

func (d *drainable) CloseOldest(n int) (found int) {
	for i, e := range d.ends {
		if found < n && e.After(time.Now()) {
			d.ends[i] = time.Time{}
			d.cut = append(d.cut, time.Now())
			found++
		}
	}
	return found
}

func TestRunDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		d := &drainable{accepting: true, stop: make(chan struct{})}
		for i := range 20 { // five finish in time, one while the others are ended
			end := start.Add(time.Hour)
			if i < 5 {
				end = start.Add(time.Duration(i+1) * 500 * time.Millisecond)
			}
			if i == 19 {
				end = start.Add(10500 * time.Millisecond)
			}
			d.ends = append(d.ends, end)
		}
		var phases []gateway.DrainPhase
		var last gateway.Progress
		told := 0
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := gateway.RunDrain(ctx, gateway.Plan{Timeout: 10 * time.Second, Rate: 2}, d, func(p gateway.Progress) {
			if told++; p.Phase != last.Phase {
				phases = append(phases, p.Phase)
			}
			if d.accepting && p.Phase != gateway.DrainStopping {
				t.Error("it accepts")
			}
			if p.Phase == gateway.DrainDrained && last.Phase != p.Phase {
				// 14 gaps of half a second, each shorter or longer by up to a half.
				if took := time.Since(start); took < 13250*time.Millisecond || took > 20500*time.Millisecond {
					t.Errorf("drained after %v, want the timeout and 14 at 2 a second", took)
				}
			}
			if p.Phase == gateway.DrainClosing && last.Phase == gateway.DrainFinishing {
				if eta := p.ETA.Sub(start); eta != 17500*time.Millisecond {
					t.Errorf("ETA after %v, want 17.5 s", eta)
				}
			}
			last = p
		})
		if err != nil || !d.accepting {
			t.Errorf("RunDrain: %v; accepting %v after its end", err, d.accepting)
		}
		if took := time.Since(start); took != time.Minute {
			t.Errorf("it held for %v, want as long as its context", took)
		}
		if diff := cmp.Diff([]gateway.DrainPhase{gateway.DrainStopping, gateway.DrainFinishing, gateway.DrainClosing, gateway.DrainDrained}, phases); diff != "" {
			t.Errorf("phases (-want +got):\n%s", diff)
		}
		if last.Open != 0 || last.Finished != 6 || last.Closed != 14 {
			t.Errorf("at the end %+v, want 6 finished and 14 closed", last)
		}
		if told < 15 || told > 30 {
			t.Errorf("told %d times, want about once a second", told)
		}
		for i, at := range d.cut {
			if at.Sub(start) < 10*time.Second {
				t.Errorf("connection %d was cut after %v", i, at.Sub(start))
			}
		}
	})
}

// TestRunDrainEnds undoes what is under way when it is taken back or fails, and
// leaves alone what has ended.
func TestRunDrainEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		forever := []time.Time{time.Now().Add(time.Hour)}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		d := &drainable{ends: forever, stop: make(chan struct{})}
		if err := gateway.RunDrain(ctx, gateway.Plan{Timeout: time.Minute}, d, func(gateway.Progress) {}); err != nil || !d.accepting || len(d.cut) > 0 {
			t.Errorf("taken back: %v, accepting %v, %d cut", err, d.accepting, len(d.cut))
		}

		d = &drainable{ends: forever, stop: make(chan struct{})}
		time.AfterFunc(time.Second, func() { close(d.stop) })
		if err := gateway.RunDrain(t.Context(), gateway.Plan{Timeout: time.Minute}, d, func(gateway.Progress) {}); !errors.Is(err, gateway.ErrStopped) || d.accepting {
			t.Errorf("ended: %v, accepting %v", err, d.accepting)
		}

		d = &drainable{ends: forever, stop: make(chan struct{}), stopErr: errors.New("busy")}
		if err := gateway.RunDrain(t.Context(), gateway.Plan{}, d, func(gateway.Progress) {}); err == nil || !d.accepting {
			t.Errorf("failed: %v, accepting %v", err, d.accepting)
		}
	})
}
