package cli

import (
	"context"
	"flag"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/sluicemesh/sluice/cmd/internal/demo"
)

func (e *env) demoCommands() []*command {
	var o demo.Options
	return []*command{{
		name: "demo", synopsis: "Run two federated datacenters on this machine and send traffic through both gateways",
		help: "Starts two agents on loopback addresses, each the one server of its datacenter\nwith a mesh gateway and a service, waits until a request has gone from web in\ndc1 through both gateways to api in dc2, prints the way it took, and stays up\nuntil it is interrupted.",
		flags: func(fs *flag.FlagSet) {
			fs.BoolVar(&o.Once, "once", false, "stop after the first success")
			fs.StringVar(&o.Dir, "dir", "", "`directory` for configuration and data, kept at the end; a temporary one where it is empty")
			fs.DurationVar(&o.Timeout, "timeout", time.Minute, "how long the start may take")
		},
		run: func(c *call) error {
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			o.Out = c.out
			return demo.Run(ctx, o)
		},
	}}
}
