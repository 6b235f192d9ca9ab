// Command sluice is a mesh-gateway agent for Consul-compatible service meshes.
package main

import (
	"os"

	"github.com/sluicemesh/sluice/cmd/internal/cli"
)

func main() {
	os.Exit(cli.Run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
