package main

import (
	"bytes"
	"slices"
	"testing"
)

func TestHelloLen(t *testing.T) {
	hello, err := newHello("h000001.bench.test")
	if err != nil {
		t.Fatal(err)
	}
	if len(hello) < 1400 || !bytes.Contains(hello, []byte("h000001.bench.test")) {
		t.Fatalf("a hello of %d bytes: it has no post-quantum key share, or another name", len(hello))
	}
	for _, size := range []int{1, 3, 100, 1 << 14} {
		records := splitRecords(hello, size)
		if got := helloLen(append(slices.Clone(records), "more"...)); got != len(records) {
			t.Errorf("in records of %d: length %d of %d", size, got, len(records))
		}
		for n := range records {
			if got := helloLen(records[:n]); got != 0 {
				t.Fatalf("in records of %d: length %d of the first %d of %d bytes", size, got, n, len(records))
			}
		}
	}
	for _, other := range []string{"GET / HTTP/1.1\r\n", "\x16\x03\x01\x00\x04\x02\x00\x00\x00"} {
		if got := helloLen([]byte(other)); got != -1 {
			t.Errorf("%q: length %d of what is no hello", other, got)
		}
	}
}

func TestNewHellos(t *testing.T) {
	hellos, err := newHellos(3, 100_000)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{"h000000.bench.test", "h049999.bench.test", "h099999.bench.test"} {
		if !bytes.Contains(hellos[i], []byte(name)) {
			t.Errorf("hello %d is not of %s", i, name)
		}
	}
}
