package state_test

import (
	"fmt"
	"testing"

	"github.com/hashicorp/raft"
)

// populate registers n services, each with a sidecar, on n/100 nodes.
func populate(b *testing.B, n int) *machine {
	m := newMachine(b)
	for i := range n {
		name := fmt.Sprintf("s%05d", i)
		on := fmt.Sprintf("n%03d", i/100)
		if i%100 == 0 {
			m.must(node(on))
		}
		m.must(node(on, with(service(name))))
		m.must(node(on, with(sidecar(name))))
	}
	return m
}

func flip(b *testing.B, index uint64) *raft.Log {
	status := []string{"passing", "critical"}[index%2]
	data, err := node("n000", withCheck(check("c", "s00007-proxy", status))).Encode()
	if err != nil {
		b.Fatal(err)
	}
	return &raft.Log{Index: index, Data: data}
}

func BenchmarkRegister(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			m := populate(b, n)
			logs := []*raft.Log{flip(b, 0), flip(b, 1)}
			b.ReportAllocs()
			for i := uint64(1); b.Loop(); i++ {
				l := *logs[i%2]
				l.Index = m.index + i
				m.fsm.Apply(&l)
			}
		})
	}
}

// BenchmarkRegisterNew is a new service instance each time.
func BenchmarkRegisterNew(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			m := populate(b, n)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				m.must(node("n000", with(sidecar(fmt.Sprintf("new%d", i)))))
			}
		})
	}
}

func BenchmarkConnectAllAfterOneChange(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			m := populate(b, n)
			logs := []*raft.Log{flip(b, 0), flip(b, 1)}
			b.ReportAllocs()
			for i := uint64(1); b.Loop(); i++ {
				l := *logs[i%2]
				l.Index = m.index + i
				m.fsm.Apply(&l)
				if _, all, _ := m.store().ConnectAll(nil); len(all) != n {
					b.Fatal(len(all))
				}
			}
		})
	}
}

func BenchmarkConnectAllUnchanged(b *testing.B) {
	m := populate(b, 10_000)
	s := m.store()
	b.ReportAllocs()
	for b.Loop() {
		s.ConnectAll(nil)
	}
}
