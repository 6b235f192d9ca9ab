package gateway

import (
	"testing"

	"golang.org/x/net/bpf"
)

// TestSynFilter runs the filter on TCP headers.
func TestSynFilter(t *testing.T) {
	raw := make([]bpf.RawInstruction, len(synFilter))
	for i, f := range synFilter {
		raw[i] = bpf.RawInstruction{Op: f.Code, Jt: f.Jt, Jf: f.Jf, K: f.K}
	}
	prog, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("it does not disassemble")
	}
	vm, err := bpf.NewVM(prog)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name  string
		flags byte
		pass  bool
	}{
		{"SYN", 0x02, false},
		{"SYN with ECN", 0x02 | 0x40 | 0x80, false},
		{"SYN ACK", 0x12, true},
		{"ACK", 0x10, true},
		{"PSH ACK", 0x18, true},
		{"FIN ACK", 0x11, true},
		{"RST", 0x04, true},
	} {
		header := make([]byte, 20)
		header[13] = test.flags
		n, err := vm.Run(header)
		if err != nil {
			t.Fatal(err)
		}
		if pass := n >= len(header); pass != test.pass {
			t.Errorf("%s passes: %v, want %v", test.name, pass, test.pass)
		}
	}
}
