package sni

import (
	"math/bits"
	"sync"
)

const (
	// readBuffer is how much is read at a time.
	readBuffer = 64 << 10
	// burst bounds what is moved for one connection before others have their
	// turn.
	burst = 2 << 20
)

// Blocks have sizes from 2 to 64 KiB.
const (
	smallestBlock = 11
	blockClasses  = 6
)

func blockClass(n int) int { return max(bits.Len(uint(n-1)), smallestBlock) - smallestBlock }

// blockPools are pools of blocks, one for each class of sizes.
type blockPools [blockClasses]sync.Pool

// block is a buffer of a pool.
type block struct{ buf []byte }

// get returns a block with room for n bytes, at most 64 KiB.
func (b *blockPools) get(n int) *block {
	k := blockClass(max(n, 1))
	if x, ok := b[k].Get().(*block); ok {
		return x
	}
	return &block{make([]byte, 1<<(k+smallestBlock))}
}

// put gives a block back. One of no class is left to the collector.
func (b *blockPools) put(x *block) {
	if k := blockClass(max(len(x.buf), 1)); k < blockClasses && len(x.buf) == 1<<(k+smallestBlock) {
		b[k].Put(x)
	}
}
