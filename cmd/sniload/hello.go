package main

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
)

// newHello records the ClientHello that crypto/tls sends for a server name: with
// a post-quantum key share, 1.5 kB, as browsers do.
func newHello(name string) ([]byte, error) {
	ours, theirs := net.Pipe()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		// It ends with an error when the pipe closes under it.
		_ = tls.Client(theirs, &tls.Config{ServerName: name, NextProtos: []string{"h2", "http/1.1"}}).Handshake()
	}()
	defer func() {
		ours.Close()
		<-ended
	}()
	header := make([]byte, 5)
	if _, err := io.ReadFull(ours, header); err != nil {
		return nil, fmt.Errorf("record hello of %q: %w", name, err)
	}
	body := make([]byte, int(header[3])<<8|int(header[4]))
	if _, err := io.ReadFull(ours, body); err != nil {
		return nil, fmt.Errorf("record hello of %q: %w", name, err)
	}
	return append(header, body...), nil
}

// newHellos makes n hellos whose names are spread evenly over a set of routes.
func newHellos(n, routes int) ([][]byte, error) {
	n = min(n, routes)
	out := make([][]byte, n)
	for i := range out {
		k := 0
		if n > 1 {
			k = i * (routes - 1) / (n - 1)
		}
		var err error
		if out[i], err = newHello(hostName(k)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// splitRecords puts a hello of one TLS record into records of at most size bytes.
func splitRecords(hello []byte, size int) []byte {
	var out []byte
	for body := hello[5:]; len(body) > 0; {
		n := min(size, len(body))
		out = append(out, hello[0], hello[1], hello[2], byte(n>>8), byte(n))
		out = append(out, body[:n]...)
		body = body[n:]
	}
	return out
}

// helloLen is the length of the ClientHello at the start of b, with its record
// headers: 0 as long as it is not complete, -1 if it is none.
func helloLen(b []byte) int {
	var message []byte // its first bytes, which tell its length
	got, off := 0, 0
	for {
		if off < len(b) && b[off] != 0x16 {
			return -1
		}
		if off+5 > len(b) {
			return 0
		}
		n := int(b[off+3])<<8 | int(b[off+4])
		off += 5
		if off+n > len(b) {
			return 0
		}
		got += n
		message = append(message, b[off:off+min(n, 4-len(message))]...)
		off += n
		if len(message) < 4 {
			continue
		}
		if message[0] != 1 {
			return -1
		}
		if got >= 4+(int(message[1])<<16|int(message[2])<<8|int(message[3])) {
			return off
		}
	}
}

// pattern is what the backend sends: byte i of it is i*7. Its period is 256.
var pattern = func() []byte {
	b := make([]byte, 256<<10)
	for i := range b {
		b[i] = byte(i * 7)
	}
	return b
}()
