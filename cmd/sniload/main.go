// Command sniload measures forwarders that route TLS connections by server name,
// and checks that they are correct. It is a tool of this repository's developers
// (make bench, make sni-check) and no part of the product.
//
// What is measured is the CPU that a forwarder's processes spend per unit of work
// (connection, gigabyte, round trip), because on a machine that client, forwarder
// and server share it says more than throughput, and because it can be compared
// when others use the machine as well: contenders take turns, and ratios are made
// within a turn.
//
// The load that is measured is made without the standard library's network package: a generator
// that costs more than what it measures measures itself. So it is Linux only.
//
// The backend reads one ClientHello, of whatever number of records, answers with
// the byte 'H', and then takes commands:
//
//	'S' n  swallow n bytes, then answer 'K'
//	'D' n  send n bytes of [pattern]
//	'E'    echo from here on, until the end
//	'C'    count until the end, then answer with the count and close
//	'Q'    answer with the bytes sent for 'D' so far, and the open connections
//
// where n and the answers' numbers are 8 bytes, most significant first.
package main

import (
	"fmt"
	"os"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "sniload:", err)
		os.Exit(1)
	}
}
