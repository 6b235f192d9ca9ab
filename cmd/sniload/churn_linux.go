package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// churn replaces the table of a forwarder again and again. A table has the names
// of three generations, and the next has one generation of names less and another
// more. Connections ask for the names of the generation that both have: none of
// them has a reason to fail. Clusters are replaced with the names.
type churn struct {
	target  string
	names   int // in a table
	every   time.Duration
	addrs   []netip.AddrPort
	pattern []byte // a hello of the first name
	replace func(routes []byte) error

	made       map[int][]byte           // tables that were made ahead, by their first generation
	hellos     atomic.Pointer[[][]byte] // to be used now
	generation int
	took       []float64 // seconds from replacing a table until it was in use
}

const generations, tablesAhead = 3, 10

func churnName(generation, i int) string { return fmt.Sprintf("g%05d-%05d.bench.test", generation, i) }

func newChurn(target string, names int, every time.Duration, addrs []netip.AddrPort, replace func([]byte) error) (*churn, error) {
	c := &churn{target: target, names: names, every: every, addrs: addrs, replace: replace}
	var err error
	c.pattern, err = newHello(churnName(0, 0))
	return c, err
}

func (c *churn) hello(generation, i int) []byte {
	return bytes.Replace(c.pattern, []byte(churnName(0, 0)), []byte(churnName(generation, i)), 1)
}

// table is the routes file that begins with a generation.
func (c *churn) table(from int) []byte {
	var b bytes.Buffer
	n := c.names / generations
	for g := from; g < from+generations; g++ {
		for i := range n {
			name := churnName(g, i)
			fmt.Fprintf(&b, "%s %s\n", name, c.addrs[i%len(c.addrs)])
			if other := (i + 1 + g) % len(c.addrs); other != i%len(c.addrs) {
				fmt.Fprintf(&b, "%s %s\n", name, c.addrs[other])
			}
		}
	}
	return b.Bytes()
}

// use makes the connections ask for names of a generation.
func (c *churn) use(generation int) {
	out := make([][]byte, 16)
	for i := range out {
		out[i] = c.hello(generation, i*(c.names/generations-1)/(len(out)-1))
	}
	c.hellos.Store(&out)
}

// step puts the table into use that begins with a generation, and returns when it
// is: the newest name is routed, and the name before the oldest is not.
func (c *churn) step(ctx context.Context, from int) error {
	k := &checker{target: c.target}
	table := c.made[from]
	if table == nil {
		table = c.table(from)
	}
	began := time.Now()
	if err := c.replace(table); err != nil {
		return fmt.Errorf("replace table: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		ok, err := k.answered(limited, c.hello(from+generations-1, 0))
		if err != nil {
			return fmt.Errorf("replace table: it is not in use: %w", err)
		}
		if ok {
			break
		}
		settle(limited, 2*time.Millisecond)
	}
	c.took = append(c.took, time.Since(began).Seconds())
	c.use(from + 1)
	if from > 0 {
		if ok, err := k.answered(limited, c.hello(from-1, 0)); ok || err != nil {
			return fmt.Errorf("replace table: a name of the one before: answered %t, %w", ok, err)
		}
	}
	c.generation = from
	return nil
}

// start replaces tables until stop is called.
func (c *churn) start(ctx context.Context) (stop func() error, err error) {
	c.made = map[int][]byte{} // to make them meanwhile would disturb, too
	for from := c.generation + 1; from <= c.generation+tablesAhead; from++ {
		c.made[from] = c.table(from)
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		for {
			next := time.Now().Add(c.every)
			if err := c.step(ctx, c.generation+1); err != nil {
				if ctx.Err() == nil {
					ended <- err
				} else {
					ended <- nil
				}
				return
			}
			settle(ctx, time.Until(next))
			if ctx.Err() != nil {
				ended <- nil
				return
			}
		}
	}()
	return func() error {
		cancel()
		err := <-ended
		// A step that was cut short may have replaced the table all the same.
		return errors.Join(err, c.step(context.WithoutCancel(ctx), c.generation+1))
	}, nil
}

// answered tells whether a connection with a hello reaches the backend.
func (k *checker) answered(ctx context.Context, hello []byte) (bool, error) {
	c, err := k.connect(ctx)
	if err != nil {
		return false, err
	}
	defer c.Close()
	if _, err := c.Write(hello); err != nil {
		return false, err
	}
	err = expectHello(c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return false, err
	}
	return err == nil, nil
}

// reloadFile replaces the routes file of a process and tells it so.
func reloadFile(path string, pid int) func([]byte) error {
	return func(routes []byte) error {
		if err := os.WriteFile(path+".new", routes, 0o600); err != nil {
			return err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return err
		}
		return unix.Kill(pid, unix.SIGHUP)
	}
}

// runChurn measures what the replacing of tables does to connections, and what it
// leaves behind.
func runChurn(ctx context.Context, fs *flag.FlagSet, args []string) error {
	p := newPaced(fs, 3*time.Second)
	names := fs.Int("table", 10000, "names in a table")
	every := fs.Duration("every", time.Second, "time between tables")
	file := fs.String("file", "", "the forwarder's routes `file`, which SIGHUP makes it read")
	ctx, cancel, err := p.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	if *file == "" || p.proxy == 0 {
		return errors.New("-file and -pid are needed: the table is replaced by them")
	}
	runtime.GOMAXPROCS(2) // the generator must not wait for the writer of tables
	c, err := newChurn(p.target, *names, *every, backendAddrs(), reloadFile(*file, p.proxy))
	if err != nil {
		return err
	}
	if err := p.churn(ctx, c); err != nil {
		return err
	}
	return p.out.print()
}

func (p *paced) churn(ctx context.Context, c *churn) error {
	for from := range 2 { // from here on the forwarder has had what it needs
		if err := c.step(ctx, from); err != nil {
			return err
		}
	}
	p.next = func() [][]byte { return *c.hellos.Load() }
	settle(ctx, p.rest)
	var seen []memory
	c.took = nil
	if err := p.run(ctx, func(ctx context.Context) (func() error, error) {
		seen = append(seen, memoryOf(p.proxies))
		return c.start(ctx)
	}); err != nil {
		return err
	}
	settle(ctx, p.rest)
	before, after := growth(append(seen, memoryOf(p.proxies)))
	m := p.out.Metrics
	m["tables"] = float64(len(c.took))
	m["took"], _ = median(slices.Clone(c.took))
	if p.proxy != 0 {
		m["growth"] = float64(after.rss - before.rss)
		m["files"] = float64(after.files - before.files)
		m["base"] = float64(before.rss)
	}
	return nil
}

// growth compares the most that was needed in the first and in the second half of
// what follows the first third. The first third is what the forwarder needs, for the
// counters of new clusters too; what is added to it in the end would be added for
// ever. The most, because garbage comes and goes in between.
func growth(seen []memory) (before, after memory) {
	seen = seen[len(seen)/3:]
	half := (len(seen) + 1) / 2
	return most(seen[:half]), most(seen[half:])
}

func most(seen []memory) (m memory) {
	for _, s := range seen {
		m.rss, m.files = max(m.rss, s.rss), max(m.files, s.files)
	}
	return m
}
