package cli

import (
	"flag"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/agent/config"
)

func (e *env) serviceCommands() []*command {
	var id, name, address, kind string
	var port int
	var tags bool
	return []*command{
		{
			name: "services register", args: "[FILE...]", http: true, synopsis: "Register services on the agent",
			help: "Registers the services of definition files (HCL, JSON or YAML, as an agent's\nown files have them), or one service described by flags.",
			flags: func(fs *flag.FlagSet) {
				fs.StringVar(&id, "id", "", "`ID` of the service; the name where it is empty")
				fs.StringVar(&name, "name", "", "`name` of the service")
				fs.StringVar(&address, "address", "", "`address` of the service")
				fs.IntVar(&port, "port", 0, "`port` of the service")
				fs.StringVar(&kind, "kind", "", "`kind` of the service: connect-proxy, mesh-gateway or none")
			},
			run: func(c *call) error {
				var regs []*api.AgentServiceRegistration
				switch {
				case len(c.args) > 0 && name != "":
					return usage("give either files or -name")
				case name != "":
					regs = []*api.AgentServiceRegistration{{ID: id, Name: name, Address: address, Port: port, Kind: api.ServiceKind(kind)}}
				case len(c.args) == 0:
					return usage("give files or -name")
				}
				regs, err := c.definitions(regs)
				if err != nil {
					return err
				}
				for _, r := range regs {
					if err := c.api.Agent().ServiceRegister(r); err != nil {
						return fmt.Errorf("register service %q: %w", r.Name, err)
					}
					fmt.Fprintf(c.out, "Registered service: %s\n", r.Name)
				}
				return nil
			},
		},
		{
			name: "services deregister", args: "[FILE...]", http: true, synopsis: "Deregister services from the agent",
			flags: func(fs *flag.FlagSet) { fs.StringVar(&id, "id", "", "`ID` of the service") },
			run: func(c *call) error {
				var ids []string
				switch {
				case len(c.args) > 0 && id != "":
					return usage("give either files or -id")
				case id != "":
					ids = []string{id}
				case len(c.args) == 0:
					return usage("give files or -id")
				}
				regs, err := c.definitions(nil)
				if err != nil {
					return err
				}
				for _, r := range regs {
					ids = append(ids, r.ID)
				}
				for _, id := range ids {
					if err := c.api.Agent().ServiceDeregister(id); err != nil {
						return fmt.Errorf("deregister service %q: %w", id, err)
					}
					fmt.Fprintf(c.out, "Deregistered service: %s\n", id)
				}
				return nil
			},
		},
		{
			name: "catalog datacenters", http: true, synopsis: "List the datacenters",
			run: func(c *call) error {
				dcs, err := c.api.Catalog().Datacenters()
				if err != nil {
					return fmt.Errorf("list datacenters: %w", err)
				}
				for _, dc := range dcs {
					fmt.Fprintln(c.out, dc)
				}
				return nil
			},
		},
		{
			name: "catalog nodes", http: true, synopsis: "List the nodes of a datacenter",
			flags: func(fs *flag.FlagSet) { fs.StringVar(&name, "service", "", "only nodes with this `service`") },
			run: func(c *call) error {
				rows := [][]string{{"Node", "ID", "Address", "DC"}}
				add := func(node, id, addr, dc string) {
					rows = append(rows, []string{node, strings.SplitN(id, "-", 2)[0], addr, dc})
				}
				if name != "" {
					list, _, err := c.api.Catalog().Service(name, "", c.query())
					if err != nil {
						return fmt.Errorf("list nodes of service %q: %w", name, err)
					}
					for _, s := range list {
						add(s.Node, s.ID, s.Address, s.Datacenter)
					}
				} else {
					list, _, err := c.api.Catalog().Nodes(c.query())
					if err != nil {
						return fmt.Errorf("list nodes: %w", err)
					}
					for _, n := range list {
						add(n.Node, n.ID, n.Address, n.Datacenter)
					}
				}
				c.table(rows...)
				return nil
			},
		},
		{
			name: "catalog services", http: true, synopsis: "List the services of a datacenter",
			flags: func(fs *flag.FlagSet) {
				fs.StringVar(&name, "node", "", "only services of this `node`")
				fs.BoolVar(&tags, "tags", false, "show the tags")
			},
			run: func(c *call) error {
				services := map[string][]string{}
				if name != "" {
					n, _, err := c.api.Catalog().Node(name, c.query())
					if err != nil {
						return fmt.Errorf("list services of node %q: %w", name, err)
					}
					if n == nil {
						return fmt.Errorf("there is no node %q in the catalog", name)
					}
					for _, s := range n.Services {
						services[s.Service] = append(services[s.Service], s.Tags...)
					}
				} else {
					var err error
					if services, _, err = c.api.Catalog().Services(c.query()); err != nil {
						return fmt.Errorf("list services: %w", err)
					}
				}
				var rows [][]string
				for _, s := range sorted(services) {
					row := []string{s}
					if tags {
						slices.Sort(services[s])
						row = append(row, strings.Join(slices.Compact(services[s]), ","))
					}
					rows = append(rows, row)
				}
				c.table(rows...)
				return nil
			},
		},
	}
}

// definitions adds the services of the files that the arguments name.
func (c *call) definitions(regs []*api.AgentServiceRegistration) ([]*api.AgentServiceRegistration, error) {
	for _, file := range c.args {
		list, warnings, err := config.ParseServiceFile(file)
		if err != nil {
			return nil, err
		}
		for _, w := range warnings {
			fmt.Fprintf(c.err, "warning: %s\n", w)
		}
		for i := range list {
			regs = append(regs, &list[i].Definition.AgentServiceRegistration)
		}
	}
	return regs, nil
}
