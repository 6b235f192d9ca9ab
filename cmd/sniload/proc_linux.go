package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func procFile(pid int, name string) string {
	return filepath.Join("/proc", strconv.Itoa(pid), name)
}

// processTree is a process and its descendants; none for pid 0.
func processTree(pid int) []int {
	if pid == 0 {
		return nil
	}
	children := map[int][]int{}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		p, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(procFile(p, "stat"))
		if err != nil {
			continue // it has ended
		}
		// The name, in parentheses, may hold anything.
		if f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])); len(f) > 1 {
			parent, _ := strconv.Atoi(f[1])
			children[parent] = append(children[parent], p)
		}
	}
	tree := []int{pid}
	for i := 0; i < len(tree); i++ {
		tree = append(tree, children[tree[i]]...)
	}
	return tree
}

// spent is what processes have used of the machine.
type spent struct {
	cpu      time.Duration
	switches int64 // of context
}

func (s spent) minus(t spent) spent { return spent{s.cpu - t.cpu, s.switches - t.switches} }

// spentBy sums over the threads that are alive: none of the contenders ends
// threads while it works.
func spentBy(pids []int) spent {
	var s spent
	for _, pid := range pids {
		tasks, _ := filepath.Glob(procFile(pid, "task/*"))
		for _, task := range tasks {
			if b, err := os.ReadFile(filepath.Join(task, "schedstat")); err == nil {
				if f := strings.Fields(string(b)); len(f) > 0 {
					ns, _ := strconv.ParseInt(f[0], 10, 64)
					s.cpu += time.Duration(ns)
				}
			}
			if b, err := os.ReadFile(filepath.Join(task, "status")); err == nil {
				s.switches += field(b, "voluntary_ctxt_switches:") + field(b, "nonvoluntary_ctxt_switches:")
			}
		}
	}
	return s
}

// checkSchedstat fails where the kernel does not count the time of threads.
func checkSchedstat() error {
	b, err := os.ReadFile("/proc/self/schedstat")
	if err != nil {
		return fmt.Errorf("read CPU time of threads: %w", err)
	}
	if f := strings.Fields(string(b)); len(f) == 0 || f[0] == "0" {
		return fmt.Errorf("read CPU time of threads: the kernel counts none (%q)", b)
	}
	return nil
}

// machineBusy is the time that the machine's processors were not idle.
func machineBusy() time.Duration {
	b, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(b), "\n")
	f := strings.Fields(line)
	var ticks int64
	for _, i := range []int{1, 2, 3, 6, 7, 8} { // not idle, not iowait, not guests
		if i < len(f) {
			v, _ := strconv.ParseInt(f[i], 10, 64)
			ticks += v
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// memory of processes and of the kernel for them, in bytes.
type memory struct {
	rss    int64
	kernel int64 // of the machine: slab, stacks, page tables and socket buffers
	files  int   // open descriptors
}

func memoryOf(pids []int) memory {
	var m memory
	for _, pid := range pids {
		b, _ := os.ReadFile(procFile(pid, "status"))
		m.rss += field(b, "VmRSS:") << 10
		if d, err := os.ReadDir(procFile(pid, "fd")); err == nil {
			m.files += len(d)
		}
	}
	b, _ := os.ReadFile("/proc/meminfo")
	m.kernel = (field(b, "Slab:") + field(b, "KernelStack:") + field(b, "PageTables:")) << 10
	b, _ = os.ReadFile("/proc/net/sockstat")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == "TCP:" {
			pages, _ := strconv.ParseInt(f[len(f)-1], 10, 64)
			m.kernel += pages * int64(os.Getpagesize())
		}
	}
	return m
}

// sockets is how many of them processes have open.
func sockets(pids []int) int {
	n := 0
	for _, pid := range pids {
		fds, _ := os.ReadDir(procFile(pid, "fd"))
		for _, fd := range fds {
			if link, err := os.Readlink(procFile(pid, "fd/"+fd.Name())); err == nil && strings.HasPrefix(link, "socket:") {
				n++
			}
		}
	}
	return n
}

// field is the number after a key at the start of a line; 0 if there is none.
func field(b []byte, key string) int64 {
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			if f := strings.Fields(rest); len(f) > 0 {
				n, _ := strconv.ParseInt(f[0], 10, 64)
				return n
			}
		}
	}
	return 0
}

// all processors, for pin.
const all = -1

// pin puts all threads of processes onto one processor.
func pin(pids []int, cpu int) {
	var set unix.CPUSet
	for i := range runtime.NumCPU() {
		if cpu == i || cpu == all {
			set.Set(i)
		}
	}
	for _, pid := range pids {
		tasks, _ := filepath.Glob(procFile(pid, "task/*"))
		for _, task := range tasks {
			if tid, err := strconv.Atoi(filepath.Base(task)); err == nil {
				_ = unix.SchedSetaffinity(tid, &set) // the thread may have ended
			}
		}
	}
}
