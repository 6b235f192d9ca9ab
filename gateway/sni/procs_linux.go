package sni

import (
	"runtime"
	"sync"
)

// A loop that waits a moment for its next event keeps its processor (GOMAXPROCS)
// for itself, so each loop brings one along: otherwise the goroutines of the
// rest of the program would wait for the loops to fall idle, 20 ms and more.
// With as many threads to run, the kernel shares the cores among them.
var lent struct {
	mu sync.Mutex // guards n
	n  int
}

func lendProcs(n int) {
	lent.mu.Lock()
	defer lent.mu.Unlock()
	lent.n += n
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + n)
}

// returnProcs undoes lendProcs. The last to return also hands the choice back
// to the runtime, which follows the limits of the container.
func returnProcs(n int) {
	lent.mu.Lock()
	defer lent.mu.Unlock()
	lent.n -= n
	if lent.n == 0 {
		runtime.SetDefaultGOMAXPROCS()
		return
	}
	runtime.GOMAXPROCS(max(1, runtime.GOMAXPROCS(0)-n))
}

// ownProcs is GOMAXPROCS without what was lent.
func ownProcs() int {
	lent.mu.Lock()
	defer lent.mu.Unlock()
	return max(1, runtime.GOMAXPROCS(0)-lent.n)
}
