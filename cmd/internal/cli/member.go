package cli

import (
	"flag"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/consul/api"
)

// statuses are serf's, by number.
var statuses = []string{"none", "alive", "leaving", "left", "failed"}

func (e *env) memberCommands() []*command {
	var wan, detailed, prune bool
	var status string
	return []*command{
		{
			name: "members", synopsis: "List the members of the cluster", http: true,
			flags: func(fs *flag.FlagSet) {
				fs.BoolVar(&wan, "wan", false, "list the servers of all datacenters instead")
				fs.BoolVar(&detailed, "detailed", false, "show the tags")
				fs.StringVar(&status, "status", ".*", "only members of this `status`: alive, leaving, left or failed")
			},
			run: func(c *call) error {
				members, err := c.api.Agent().Members(wan)
				if err != nil {
					return fmt.Errorf("list members: %w", err)
				}
				slices.SortFunc(members, func(a, b *api.AgentMember) int { return strings.Compare(a.Name, b.Name) })
				rows := [][]string{{"Node", "Address", "Status", "Type", "Build", "DC"}}
				if detailed {
					rows = [][]string{{"Node", "Address", "Status", "Tags"}}
				}
				for _, m := range members {
					state := "unknown"
					if m.Status >= 0 && m.Status < len(statuses) {
						state = statuses[m.Status]
					}
					if status != ".*" && status != state {
						continue
					}
					addr := net.JoinHostPort(m.Addr, strconv.Itoa(int(m.Port)))
					if detailed {
						var tags []string
						for _, k := range sorted(m.Tags) {
							tags = append(tags, k+"="+m.Tags[k])
						}
						rows = append(rows, []string{m.Name, addr, state, strings.Join(tags, ",")})
						continue
					}
					kind := "client"
					if m.Tags["role"] == "consul" {
						kind = "server"
					}
					build, _, _ := strings.Cut(m.Tags["build"], ":")
					rows = append(rows, []string{m.Name, addr, state, kind, build, m.Tags["dc"]})
				}
				c.table(rows...)
				return nil
			},
		},
		{
			name: "join", args: "ADDRESS...", synopsis: "Make the agent join a cluster", http: true,
			flags: func(fs *flag.FlagSet) { fs.BoolVar(&wan, "wan", false, "join the servers of another datacenter") },
			run: func(c *call) error {
				if len(c.args) == 0 {
					return usage("name at least one address to join")
				}
				joined := 0
				for _, addr := range c.args {
					if err := c.api.Agent().Join(addr, wan); err != nil {
						fmt.Fprintf(c.err, "error: join %s: %v\n", addr, err)
						continue
					}
					joined++
				}
				if joined == 0 {
					return errSilent
				}
				fmt.Fprintf(c.out, "Successfully joined cluster by contacting %d nodes.\n", joined)
				return nil
			},
		},
		{
			name: "leave", synopsis: "Make the agent leave the cluster gracefully and stop", http: true,
			run: func(c *call) error {
				if err := c.api.Agent().Leave(); err != nil {
					return fmt.Errorf("leave: %w", err)
				}
				fmt.Fprintln(c.out, "Graceful leave complete")
				return nil
			},
		},
		{
			name: "force-leave", args: "NODE", synopsis: "Turn a failed member into one that has left", http: true,
			flags: func(fs *flag.FlagSet) {
				fs.BoolVar(&prune, "prune", false, "forget the member altogether")
				fs.BoolVar(&wan, "wan", false, "in the pool of all datacenters' servers")
			},
			run: func(c *call) error {
				if len(c.args) != 1 {
					return usage("name one node")
				}
				err := c.api.Agent().ForceLeaveOptions(c.args[0], api.ForceLeaveOpts{Prune: prune, WAN: wan}, nil)
				if err != nil {
					return fmt.Errorf("force-leave %s: %w", c.args[0], err)
				}
				return nil
			},
		},
		{
			name: "reload", synopsis: "Make the agent read its configuration files again", http: true,
			run: func(c *call) error {
				if err := c.api.Agent().Reload(); err != nil {
					return fmt.Errorf("reload: %w", err)
				}
				fmt.Fprintln(c.out, "Configuration reload triggered")
				return nil
			},
		},
	}
}
