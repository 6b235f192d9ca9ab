package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// bench compares contenders. They run side by side and take turns, each test in
// several rounds; in a ratio a round is compared with the same round only.
type bench struct {
	dir     string
	list    []contender
	sizes   sizes
	results results
	backend *process
	exe     string
	quick   bool // leaves out contenders, too
	began   time.Time
}

// say tells how far the run is.
func (b *bench) say(format string, args ...any) {
	took := time.Since(b.began).Round(time.Second)
	fmt.Printf("%3d:%02d  %s\n", took/time.Minute, took%time.Minute/time.Second, fmt.Sprintf(format, args...))
}

// sizes of a run.
type sizes struct {
	rounds, fewRounds int
	conns, shakes     int
	idle              int
	gb                float64
	play              time.Duration
	hold              time.Duration
	pairs             int // of quiet and disturbed times
	half              int // hellos that are not completed, at a time
	torture           time.Duration
}

var (
	fullSizes = sizes{rounds: 9, fewRounds: 3, conns: 8000, shakes: 1000, idle: 3000, gb: 3, play: 1200 * time.Millisecond, hold: 1500 * time.Millisecond,
		pairs: 5, half: 4000, torture: 30 * time.Second}
	quickSizes = sizes{rounds: 3, fewRounds: 2, conns: 6000, shakes: 400, idle: 2000, gb: 2, play: 800 * time.Millisecond, hold: 500 * time.Millisecond,
		pairs: 3, half: 2000, torture: 8 * time.Second}
)

// stage is what is done with one set of processes.
type stage struct {
	name    string
	about   string
	routes  int
	workers int
	pinned  bool
	fresh   bool     // processes are started for each measurement
	ours    bool     // only the forwarder of this repository, with each of its engines
	beside  []string // with ours, the peers that are measured too
	twin    bool     // another process of the same contender is beside it
	inside  bool     // the load runs the forwarder in its own process
	skip    []string
	tests   []stageTest
}

type stageTest struct {
	name string // of the tests in report.go
	few  bool   // rounds
	once bool   // one round: there are enough times within it
	full bool   // not in a quick run
	args []string
}

func stages(s sizes, cpus int) []stage {
	conn := []string{"connrate", "-n", strconv.Itoa(s.conns)}
	play := func(args ...string) []string {
		return append([]string{"pingpong", "-d", s.play.String()}, args...)
	}
	bulk := func(dir string, gb float64) []string {
		return []string{"bulk", "-dir", dir, "-gb", strconv.FormatFloat(gb, 'f', -1, 64)}
	}
	return []stage{
		{name: "conn", about: "connections and small messages", routes: smallRoutes, workers: cpus, tests: []stageTest{
			{name: "conn", args: conn},
			{name: "rr64", args: play("-c", "64")},
			{name: "rr1", few: true, full: true, args: play("-c", "1")},
		}},
		{name: "tls", about: "mutual TLS handshakes", routes: smallRoutes, workers: cpus, skip: []string{oursPlain, floor}, tests: []stageTest{
			{name: "tls", few: true, args: []string{"handshake", "-n", strconv.Itoa(s.shakes)}},
		}},
		{name: "bulk", about: "gigabytes", routes: smallRoutes, workers: cpus, skip: []string{floor}, tests: []stageTest{
			{name: "down", args: bulk("down", s.gb)},
			{name: "up", few: true, full: true, args: bulk("up", s.gb)},
			{name: "echo", few: true, full: true, args: bulk("echo", s.gb/2)},
			{name: "rr64k1", few: true, full: true, args: play("-c", "64", "-size", "1024")},
		}},
		{name: "idle", about: "open connections", routes: smallRoutes, workers: cpus, fresh: true, skip: []string{direct, floor}, tests: []stageTest{
			{name: "idle", few: true, args: []string{"idle", "-c", strconv.Itoa(s.idle), "-hold", s.hold.String()}},
		}},
		// HAProxy's splicing has nothing to do with routes.
		{name: "big", about: "100,000 routes", routes: bigRoutes, workers: cpus, fresh: true, skip: []string{"haproxy-splice", oursPlain, direct, floor}, tests: []stageTest{
			// Who searches the routes one by one would take half a minute.
			{name: "connbig", few: true, args: append(conn, "-routes", strconv.Itoa(bigRoutes), "-most", "5s")},
		}},
		{name: "pin", about: "the forwarder on one core, the load on another", routes: smallRoutes, workers: 1, pinned: true, skip: []string{"sniproxy", oursPlain, floor}, tests: []stageTest{
			{name: "connpin", few: true, full: true, args: conn},
			{name: "rr64pin", few: true, full: true, args: play("-c", "64")},
			{name: "downpin", few: true, full: true, args: bulk("down", s.gb)},
		}},
		{name: "checks", about: "correctness", routes: smallRoutes, workers: cpus, fresh: true, ours: true, tests: []stageTest{
			{name: "checks", once: true, args: []string{"checks", "-timeout", "85s"}},
		}},
		{name: "many", about: "9,000 open connections", routes: smallRoutes, workers: cpus, fresh: true, ours: true, tests: []stageTest{
			{name: "many", once: true, args: []string{"idle", "-c", strconv.Itoa(manyConns), "-hold", s.hold.String()}},
		}},
		{name: "churn", about: "10,000 names replaced every second", routes: churnRoutes, workers: cpus, fresh: true, ours: true, tests: []stageTest{
			{name: "churn", once: true, args: []string{"churn", "-table", strconv.Itoa(churnRoutes), "-pairs", strconv.Itoa(2 * s.pairs), "-timeout", "85s"}},
		}},
		// Those that have a deadline for the hello.
		{name: "flood", about: "hellos that are not completed", routes: smallRoutes, workers: cpus, fresh: true, ours: true, beside: []string{reference, "nginx", "envoy"}, tests: []stageTest{
			{name: "flood", once: true, args: []string{"flood", "-half", strconv.Itoa(s.half), "-pairs", strconv.Itoa(s.pairs), "-quiet", "4s", "-timeout", "85s"}},
		}},
		{name: "drain", about: "a drain under load", routes: smallRoutes, workers: cpus, fresh: true, ours: true, twin: true, tests: []stageTest{
			{name: "drain", once: true, args: []string{"draining"}},
		}},
		{name: "faults", about: "endpoints that fail", ours: true, inside: true, tests: []stageTest{
			{name: "faults", once: true, args: []string{"faults"}},
		}},
		{name: "torture", about: "broken hellos", routes: smallRoutes, workers: cpus, fresh: true, ours: true, tests: []stageTest{
			{name: "torture", once: true, args: []string{"torture", "-for", s.torture.String()}},
		}},
	}
}

func runBench(ctx context.Context, fs *flag.FlagSet, args []string) error {
	sluice := fs.String("sluice", "bin/sluice", "`path` of sluice")
	dir := fs.String("dir", "bin/bench", "working `directory`")
	quick := fs.Bool("quick", false, "fewer and shorter rounds: for a look, not for the record")
	only := fs.String("only", "", "contenders, comma-separated; default is all that are installed")
	which := fs.String("stages", "", "stages, comma-separated: conn, tls, bulk, idle, big, pin, checks, many, churn, flood, drain, faults, torture; default is all")
	goBench := fs.String("go-bench", "", "`file` with output of go test -bench, for the report")
	report := fs.String("o", "", "`file` for the report; without, it is printed only")
	var extra extras
	fs.Var(&extra, "contender", "`name=command` of one more; {port}, {routes} and {workers} are filled in. May be repeated")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if done, err := isolate(ctx); done || err != nil {
		return err
	}
	if err := checkSchedstat(); err != nil {
		return err
	}
	b := &bench{sizes: fullSizes, began: time.Now()}
	if *quick {
		b.sizes = quickSizes
	}
	var err error
	if b.dir, err = filepath.Abs(*dir); err != nil {
		return err
	}
	if b.exe, err = os.Executable(); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(b.dir, "run"), 0o755); err != nil {
		return err
	}
	info := machineInfo()
	info.Quick = *quick
	names := split(*only)
	list := slices.DeleteFunc(contenders(*sluice, b.dir), func(c contender) bool {
		return len(names) > 0 && !slices.Contains(names, c.name)
	})
	b.quick = *quick && len(names) == 0
	for _, c := range append(list, extra...) {
		if !c.installed() {
			fmt.Printf("skipped: %s is not installed\n", c.name)
			continue
		}
		b.list = append(b.list, c)
		info.Contenders = append(info.Contenders, contenderInfo{c.name, c.versionText(ctx)})
	}
	if len(b.list) == 0 {
		return errors.New("there is nobody to compare")
	}
	if b.backend, err = startBackend(ctx); err != nil {
		return err
	}
	defer b.backend.stop()
	want := split(*which)
	for _, s := range stages(b.sizes, runtime.NumCPU()) {
		s.tests = slices.DeleteFunc(s.tests, func(t stageTest) bool { return t.full && *quick })
		if len(s.tests) == 0 || len(want) > 0 && !slices.Contains(want, s.name) || s.pinned && runtime.NumCPU() < 2 {
			continue
		}
		b.say("%s: %s", s.name, s.about)
		if err := b.stage(ctx, s); err != nil {
			return err
		}
	}
	b.say("done")
	var goOut []byte
	if *goBench != "" {
		if goOut, err = os.ReadFile(*goBench); err != nil {
			return err
		}
	}
	text := render(info, &b.results, parseGoBench(goOut))
	fmt.Println()
	if _, err := os.Stdout.WriteString(text); err != nil || *report == "" {
		return err
	}
	return os.WriteFile(*report, []byte(text), 0o644)
}

func split(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// extras are contenders given on the command line.
type extras []contender

// String implements [flag.Value].
func (x *extras) String() string { return "" }

// Set implements [flag.Value].
func (x *extras) Set(s string) error {
	name, command, ok := strings.Cut(s, "=")
	if !ok || name == "" || command == "" {
		return fmt.Errorf("%q is not name=command", s)
	}
	*x = append(*x, contender{name: name, command: strings.Fields(command)})
	return nil
}

// stage starts the contenders and runs the stage's tests.
func (b *bench) stage(ctx context.Context, s stage) error {
	set := setup{Workers: s.workers, Files: fileLimit(), Dir: filepath.Join(b.dir, "run"), Routes: newRoutes(s.routes, backendAddrs(), tlsAddr)}
	if s.pinned {
		// Loads are children of this process, and begin where it is.
		load := []int{os.Getpid(), b.backend.pid()}
		pin(load, 1)
		defer pin(load, all)
	}
	run := func(c contender, port int) (*process, error) {
		set := set
		set.Port = port
		if c.routes > 0 {
			set.Routes = newRoutes(c.routes, backendAddrs(), tlsAddr)
		}
		p, err := start(ctx, c, set)
		if err != nil {
			return nil, err
		}
		if s.twin {
			other := c
			other.name += "-twin"
			set.Port += twinPorts
			if p.twin, err = start(ctx, other, set); err != nil {
				p.stop()
				return nil, err
			}
		}
		settle(ctx, 200*time.Millisecond)
		if s.pinned {
			pin(processTree(p.pid()), 0)
		}
		if len(c.command) > 0 && !s.pinned && !s.ours {
			test := fmt.Sprintf("start%d", s.routes)
			b.results.add(sample{Test: test, Contender: c.name, Round: b.results.next(test, c.name), Metrics: map[string]float64{
				"took": p.took.Seconds(), "base": float64(memoryOf(processTree(p.pid())).rss),
			}})
		}
		return p, nil
	}
	var list []*process
	defer func() {
		for _, p := range list {
			p.stop()
		}
	}()
	candidates := slices.Clone(b.list)
	if i := slices.IndexFunc(candidates, func(c contender) bool { return c.name == ours }); i >= 0 && s.routes != smallRoutes && !s.ours {
		few := candidates[i]
		few.name, few.routes = oursFew, smallRoutes
		candidates = append(candidates, few)
	}
	port := 21000
	for _, c := range candidates {
		switch {
		case slices.Contains(s.skip, c.name), s.ours && c.engine == "" && !slices.Contains(s.beside, c.name), !s.ours && c.full && b.quick:
			continue
		case s.inside:
			list = append(list, &process{contender: c})
			continue
		}
		port++
		p, err := run(c, port)
		if err != nil {
			if ctx.Err() != nil {
				return err
			}
			b.say("  left out: %v", err)
			continue
		}
		list = append(list, p)
		if s.fresh {
			p.stop()
		}
	}
	for _, t := range s.tests {
		rounds := b.sizes.rounds
		switch {
		case t.few:
			rounds = b.sizes.fewRounds
		case t.once:
			rounds = 1
		}
		for round := range rounds {
			b.say("  %s, round %d of %d", t.name, round+1, rounds)
			for i := range list {
				// Who comes first has no advantage for ever.
				k := (i + round) % len(list)
				if s.fresh && !s.inside {
					p, err := run(list[k].contender, int(list[k].addr.Port()))
					if err != nil {
						return err
					}
					list[k] = p
				}
				b.measure(ctx, list[k], t, round)
				if s.fresh {
					list[k].stop()
				}
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
			}
		}
	}
	return nil
}

// measure runs a load against a process. What goes wrong is a result, too.
func (b *bench) measure(ctx context.Context, p *process, t stageTest, round int) {
	target := p.addr
	if len(p.command) == 0 && t.args[0] == "handshake" {
		target = tlsAddr
	}
	args := append(slices.Clone(t.args), "-pid", strconv.Itoa(p.pid()), "-backend-pid", strconv.Itoa(b.backend.pid()))
	if target.IsValid() {
		args = append(args, "-target", target.String())
	}
	switch t.args[0] {
	case "churn":
		args = append(args, "-file", p.routesPath)
	case "draining":
		args = append(args, "-second", p.twin.addr.String())
	case "faults":
		args = append(args, "-engine", p.engine)
	}
	if p.routes > 0 {
		args = append(args, "-routes", strconv.Itoa(p.routes))
	}
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.exe, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	asked := p.status
	switch {
	case p.twin != nil:
		asked = p.twin.status // the other one goes away
	case t.args[0] == "idle":
		asked = "" // the garbage of the answers would be taken for memory of connections
	}
	scraped := startScraping(ctx, asked)
	out, err := cmd.Output()
	unanswered, scrapeErr := scraped()
	s := sample{Test: t.name, Contender: p.name, Round: round}
	var o outcome
	if err == nil {
		err = json.Unmarshal(out, &o)
	}
	if unanswered > 0 {
		// What does not answer is not on, and the row would not be what it says.
		o.Failed += unanswered
		o.Problems = append(o.Problems, scrapeErr.Error())
	}
	if err != nil {
		s.Failed = 1
		b.say("  %s %s: %v %s", t.name, p.name, err, lastLine(stderr.String()))
	} else {
		s.Failed, s.Metrics = o.Failed, o.Metrics
		if o.Failed > 0 {
			b.say("  %s %s: %d failed: %s", t.name, p.name, o.Failed, strings.Join(o.Problems, "; "))
		}
	}
	b.results.add(s)
}
