package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"time"
)

// torture makes connections with hellos as no client sends them.
type torture struct {
	*checker
	deadline time.Duration // the forwarder's, for a hello
	seed     uint64

	mu   sync.Mutex // guards what follows
	done map[string]int
	out  outcome
}

// expect is what must come of a connection.
type expect int

const (
	answered expect = iota // by the backend
	closed                 // without a byte, at the deadline at the latest
	either
)

// torment is one kind of hello. It writes what it writes and tells what must come
// of it; an error of a write is that of a connection that was closed meanwhile.
type torment struct {
	name  string
	waits bool // for the deadline, most often
	do    func(t *torture, r *rand.Rand, c *net.TCPConn) expect
}

var torments = []torment{
	{"a byte at a time", false, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		hello := t.any(r)
		for i := range hello {
			if _, err := c.Write(hello[i : i+1]); err != nil {
				break
			}
		}
		return answered
	}},
	{"many records", false, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		send(c, splitRecords(t.any(r), 1+r.IntN(60)))
		return answered
	}},
	{"records and segments", false, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		pieces(r, c, splitRecords(t.any(r), 1+r.IntN(200)), 40)
		return answered
	}},
	{"as large as may be", false, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		pieces(r, c, splitRecords(padHello(t.any(r), 62<<10), 1<<14), 1<<14)
		return answered
	}},
	{"too large", false, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		send(c, splitRecords(padHello(t.any(r), 65<<10+r.IntN(500)), 1<<14))
		return closed
	}},
	{"garbage", false, func(_ *torture, r *rand.Rand, c *net.TCPConn) expect {
		send(c, random(r, 1+r.IntN(64<<10)))
		return closed
	}},
	{"garbage in records", false, func(_ *torture, r *rand.Rand, c *net.TCPConn) expect {
		b := random(r, 5+r.IntN(20000))
		copy(b, []byte{22, 3, 1, byte(r.IntN(64)), b[4]})
		send(c, b)
		return closed
	}},
	{"empty records", false, func(_ *torture, _ *rand.Rand, c *net.TCPConn) expect {
		send(c, bytes.Repeat([]byte{22, 3, 1, 0, 0}, 4000))
		return closed
	}},
	{"changed bytes", false, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		hello := bytes.Clone(t.any(r))
		for range 1 + r.IntN(12) {
			hello[r.IntN(len(hello))] = byte(r.Uint32())
		}
		send(c, hello)
		_ = c.CloseWrite() // whoever waits for more learns that there is none
		return either
	}},
	{"another language", false, func(_ *torture, r *rand.Rand, c *net.TCPConn) expect {
		send(c, [][]byte{
			[]byte("GET / HTTP/1.1\r\nHost: h000000.bench.test\r\n\r\n"),
			[]byte("PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n"),
			[]byte("\r\n\r\n\x00\r\nQUIT\n"),
			{0x15, 3, 1, 0, 2, 2, 40},
			{0x80, 0x2e, 1, 0, 2},
		}[r.IntN(5)])
		return closed
	}},
	{"part of it, and the end", false, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		hello := t.any(r)
		send(c, hello[:r.IntN(len(hello))])
		_ = c.CloseWrite()
		return closed
	}},
	{"part of it, and a reset", false, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		hello := t.any(r)
		send(c, hello[:1+r.IntN(len(hello))])
		_ = c.SetLinger(0)
		_ = c.Close()
		return either
	}},
	{"part of it, and silence", true, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		hello := t.any(r)
		send(c, hello[:r.IntN(len(hello))])
		return closed
	}},
	{"too slow", true, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		t.slowly(c, t.any(r), t.deadline/time.Duration(4+r.IntN(10)))
		return closed
	}},
	{"slow", true, func(t *torture, r *rand.Rand, c *net.TCPConn) expect {
		hello := t.any(r)
		n := len(hello) * 9 / 10
		send(c, hello[:n])
		wait(t.deadline / 4)
		send(c, hello[n:])
		return answered
	}},
}

func send(c *net.TCPConn, b []byte) { _, _ = c.Write(b) }

// pieces sends b in segments of random sizes.
func pieces(r *rand.Rand, c *net.TCPConn, b []byte, most int) {
	for len(b) > 0 {
		n, err := c.Write(b[:min(len(b), 1+r.IntN(most))])
		if err != nil {
			return
		}
		b = b[n:]
	}
}

func random(r *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func wait(d time.Duration) {
	t := time.NewTimer(d)
	<-t.C
}

// slowly sends a byte each time, until shortly before the deadline.
func (t *torture) slowly(c *net.TCPConn, hello []byte, each time.Duration) {
	began := time.Now()
	for i := 0; i < len(hello)-1 && time.Since(began) < t.deadline*9/10; i++ {
		if _, err := c.Write(hello[i : i+1]); err != nil {
			return
		}
		wait(each)
	}
}

func (t *torture) any(r *rand.Rand) []byte { return t.hellos[r.IntN(len(t.hellos))] }

// padHello makes the message of a hello size bytes long, by an extension of
// padding.
func padHello(hello []byte, size int) []byte {
	b := bytes.Clone(hello)
	at := 5 + 4 + 2 + 32 // record, message, version, random
	at += 1 + int(b[at]) // session
	at += 2 + int(binary.BigEndian.Uint16(b[at:]))
	at += 1 + int(b[at]) // compression
	n := max(0, size-(len(b)-5)-4)
	extensions := int(binary.BigEndian.Uint16(b[at:])) + 4 + n
	binary.BigEndian.PutUint16(b[at:], uint16(min(extensions, 0xffff)))
	b = append(b, 0, 21, byte(n>>8), byte(n))
	b = append(b, make([]byte, n)...)
	body := len(b) - 5 - 4
	b[6], b[7], b[8] = byte(body>>16), byte(body>>8), byte(body)
	return b // the length of its one record is not right: it is for splitRecords
}

// one makes one connection of a kind.
func (t *torture) one(ctx context.Context, kind torment, seed uint64) error {
	limited, cancel := context.WithTimeout(ctx, t.deadline+slack+answerLimit)
	defer cancel()
	c, err := t.connect(limited)
	if err != nil {
		return err
	}
	defer c.Close()
	began := time.Now()
	want := kind.do(t, rand.New(rand.NewPCG(t.seed, seed)), c)
	var b [1]byte
	n, err := c.Read(b[:])
	took := time.Since(began)
	switch {
	case ctx.Err() != nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("neither answered nor closed in %s", took.Round(time.Millisecond))
	case n > 0 && b[0] != 'H', n > 0 && want == closed:
		return fmt.Errorf("answered with %q", b[:n])
	case n == 0 && want == answered:
		return fmt.Errorf("closed after %s: %w", took.Round(time.Millisecond), err)
	case n == 0 && took > t.deadline+slack:
		return fmt.Errorf("closed after %s, which is late", took.Round(time.Millisecond))
	}
	return nil
}

// run makes connections for d, several at a time, and waits for all.
func (t *torture) run(ctx context.Context, d time.Duration, workers int) {
	if t.done == nil {
		t.done = map[string]int{}
	}
	var fast, slow []torment
	for _, k := range torments {
		if k.waits {
			slow = append(slow, k)
		} else {
			fast = append(fast, k)
		}
	}
	until := time.Now().Add(d)
	var wg sync.WaitGroup
	for w := range workers {
		kinds := slow
		if w < (workers+3)/4 {
			kinds = fast
		}
		wg.Go(func() {
			for i := 0; time.Now().Before(until) && ctx.Err() == nil; i++ {
				kind := kinds[(w+i)%len(kinds)]
				seed := uint64(w)<<32 | uint64(i)
				err := t.one(ctx, kind, seed)
				t.mu.Lock()
				t.done[kind.name]++
				if err != nil {
					t.out.fail(fmt.Errorf("%s (seed %d %d): %w", kind.name, t.seed, seed, err))
				}
				t.mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// remains is what a process has: descriptors and memory.
func remains(ctx context.Context, pids []int, before memory) memory {
	var m memory
	for began := time.Now(); ; {
		if m = memoryOf(pids); m.files <= before.files || time.Since(began) > 5*time.Second || ctx.Err() != nil {
			return m
		}
		settle(ctx, 20*time.Millisecond)
	}
}

// runTorture makes broken hellos for a time, and then looks whether the forwarder
// is as it was.
func runTorture(ctx context.Context, fs *flag.FlagSet, args []string) error {
	l := newLoad(fs, 200)
	d := fs.Duration("for", 30*time.Second, "how long")
	deadline := fs.Duration("deadline", 5*time.Second, "the forwarder's deadline for a hello")
	seed := fs.Uint64("seed", 0, "of what is random; 0 is a random one")
	ctx, cancel, err := l.prepare(ctx, fs, args)
	if err != nil {
		return err
	}
	defer cancel()
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	runtime.GOMAXPROCS(2)
	k, err := newChecker(l.target, nil)
	if err != nil {
		return err
	}
	t := &torture{checker: k, deadline: *deadline, seed: *seed}
	initial := memoryOf(l.proxies)
	// What the first third leaves is what the forwarder needs; what the others add
	// to it would be added for ever.
	t.run(ctx, *d/3, l.conns)
	before := remains(ctx, l.proxies, initial)
	t.run(ctx, *d-*d/3, l.conns)
	after := remains(ctx, l.proxies, before)
	idle := spentBy(l.proxies)
	settle(ctx, time.Second)
	idle = spentBy(l.proxies).minus(idle)
	for _, c := range []check{{"plain", (*checker).plain}, {"echo", (*checker).echo}} {
		if err := c.run(k, ctx); err != nil {
			t.out.fail(fmt.Errorf("afterwards, %s: %w", c.name, err))
		}
	}
	n := 0
	for _, v := range t.done {
		n += v
	}
	t.out.Metrics = map[string]float64{"hellos": float64(n)}
	if l.proxy != 0 {
		t.out.Metrics["growth"] = float64(after.rss - before.rss)
		t.out.Metrics["files"] = float64(after.files - before.files)
		t.out.Metrics["idle"] = idle.cpu.Seconds()
	}
	return t.out.print()
}
