package config

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Options say what [Load] reads.
type Options struct {
	// Paths are files and directories in the order in which they are read.
	Paths []string
	// Format is what the files are in whatever their names say: hcl, json or yaml;
	// empty goes by the name.
	Format string
	// Dev starts from the settings of a one-node server in memory.
	Dev bool
	// HCL are fragments that are read last.
	HCL []string
	// Machine answers what depends on the machine; nil asks the real one.
	Machine Machine

	flags []flagValue
}

// Machine answers what a configuration leaves to the machine it is on.
type Machine interface {
	// Hostname is the node's name where none is configured.
	Hostname() (string, error)
	// PrivateIPv4 returns the private addresses of all interfaces that are up,
	// separated by spaces.
	PrivateIPv4() (string, error)
	// PublicIPv6 does so for an agent that binds to all addresses of IPv6.
	PublicIPv6() (string, error)
	// Expand evaluates a go-sockaddr template; text without one is returned as it is.
	Expand(template string) (string, error)
}

type flagValue struct {
	flag agentFlag
	// value is a string, int64, bool or, for pairs, a [2]string.
	value any
}

type flagKind uint8

const (
	stringFlag flagKind = iota
	intFlag
	boolFlag
	durationFlag
	listFlag // may be repeated
	pairFlag // key:value, may be repeated
	optionFlag
)

type agentFlag struct {
	name  string
	kind  flagKind
	key   string // the configuration key it sets; "" has no effect
	usage string
}

// flagGroups are the flags of sluice agent as its usage shows them.
var flagGroups = []struct {
	title string
	flags []agentFlag
}{
	{"Configuration", []agentFlag{
		{"config-dir", optionFlag, "", "Read the files of a directory, by name; not those of directories within. Repeatable, in one order with -config-file."},
		{"config-file", optionFlag, "", "Read a file in HCL, JSON or YAML. Repeatable."},
		{"config-format", optionFlag, "", "Format of all files whatever their names: hcl, json or yaml."},
		{"hcl", optionFlag, "", "HCL fragment that is read after everything else. Repeatable."},
		{"dev", optionFlag, "", "Run a one-node server on loopback that keeps nothing."},
	}},
	{"Node", []agentFlag{
		{"node", stringFlag, "node_name", "Name of this node; the host's name by default."},
		{"node-id", stringFlag, "node_id", "UUID of this node; made and kept in the data directory by default."},
		{"node-meta", pairFlag, "node_meta", "Metadata of the node, as key:value. Repeatable."},
		{"datacenter", stringFlag, "datacenter", "Datacenter of this agent (dc1)."},
		{"primary-datacenter", stringFlag, "primary_datacenter", "Datacenter that certificates and configuration entries come from."},
		{"domain", stringFlag, "domain", "Domain of server certificates (consul.)."},
		{"alt-domain", stringFlag, "alt_domain", "Another domain to answer to."},
		{"data-dir", stringFlag, "data_dir", "Directory of the agent's state."},
		{"pid-file", stringFlag, "pid_file", "File to write the process ID to."},
	}},
	{"Servers", []agentFlag{
		{"server", boolFlag, "server", "Be a server of the datacenter."},
		{"bootstrap", boolFlag, "bootstrap", "Let this server elect itself."},
		{"bootstrap-expect", intFlag, "bootstrap_expect", "How many servers must meet before they elect one."},
		{"primary-gateway", listFlag, "primary_gateways", "Mesh gateway of the primary datacenter. Repeatable."},
	}},
	{"Membership", []agentFlag{
		{"retry-join", listFlag, "retry_join", "Agent to join through, until it answers. Repeatable."},
		{"retry-interval", durationFlag, "retry_interval", "Time between attempts (30s)."},
		{"retry-max", intFlag, "retry_max", "Attempts before the agent gives up; 0 is never."},
		{"retry-join-wan", listFlag, "retry_join_wan", "Server of another datacenter to join through. Repeatable."},
		{"retry-interval-wan", durationFlag, "retry_interval_wan", "Time between attempts (30s)."},
		{"retry-max-wan", intFlag, "retry_max_wan", "Attempts before the agent gives up; 0 is never."},
		{"join", listFlag, "start_join", "Deprecated: use -retry-join."},
		{"join-wan", listFlag, "start_join_wan", "Deprecated: use -retry-join-wan."},
		{"rejoin", boolFlag, "rejoin_after_leave", "Join the former members again after a leave."},
		{"encrypt", stringFlag, "encrypt", "Key of the gossip, in base64."},
	}},
	{"Addresses", []agentFlag{
		{"bind", stringFlag, "bind_addr", "Address for traffic within the cluster (0.0.0.0); may be a go-sockaddr template."},
		{"client", stringFlag, "client_addr", "Addresses for the API (127.0.0.1), separated by spaces."},
		{"advertise", stringFlag, "advertise_addr", "Address that others of the datacenter use."},
		{"advertise-wan", stringFlag, "advertise_addr_wan", "Address that other datacenters use."},
		{"serf-lan-bind", stringFlag, "serf_lan", "Address for the gossip of the datacenter."},
		{"serf-wan-bind", stringFlag, "serf_wan", "Address for the gossip between datacenters."},
		{"serf-lan-allowed-cidrs", listFlag, "serf_lan_allowed_cidrs", "Network that members may come from. Repeatable."},
		{"serf-wan-allowed-cidrs", listFlag, "serf_wan_allowed_cidrs", "Network that members may come from. Repeatable."},
		{"allow-write-http-from", listFlag, "http_config.allow_write_http_from", "Network that may write through the API. Repeatable."},
	}},
	{"Ports", []agentFlag{
		{"http-port", intFlag, "ports.http", "API (8500); -1 turns it off."},
		{"https-port", intFlag, "ports.https", "API over TLS (off)."},
		{"grpc-port", intFlag, "ports.grpc", "xDS (off)."},
		{"grpc-tls-port", intFlag, "ports.grpc_tls", "xDS over TLS (8503 on servers)."},
		{"server-port", intFlag, "ports.server", "Traffic between agents and servers (8300)."},
		{"serf-lan-port", intFlag, "ports.serf_lan", "Gossip of the datacenter (8301)."},
		{"serf-wan-port", intFlag, "ports.serf_wan", "Gossip between datacenters (8302); -1 turns it off."},
	}},
	{"Log", []agentFlag{
		{"log-level", stringFlag, "log_level", "trace, debug, info, warn or error (info)."},
		{"log-json", boolFlag, "log_json", "Log in JSON."},
		{"log-file", stringFlag, "log_file", "File to log to as well."},
		{"log-rotate-bytes", intFlag, "log_rotate_bytes", "Size at which the file is rotated."},
		{"log-rotate-duration", durationFlag, "log_rotate_duration", "Age at which the file is rotated (24h)."},
		{"log-rotate-max-files", intFlag, "log_rotate_max_files", "Rotated files to keep; 0 is all."},
	}},
	{"API and checks", []agentFlag{
		{"ui", boolFlag, "ui_config.enabled", "Serve the web interface."},
		{"default-query-time", durationFlag, "default_query_time", "How long a blocking query waits that does not say (5m)."},
		{"max-query-time", durationFlag, "max_query_time", "How long a blocking query may wait (10m)."},
		{"enable-script-checks", boolFlag, "enable_script_checks", "Run checks that are scripts, also those registered through the API."},
		{"enable-local-script-checks", boolFlag, "enable_local_script_checks", "Run checks that are scripts, if a file defines them."},
		{"check_output_max_size", intFlag, "check_output_max_size", "Bytes of a check's output that are kept (4096)."},
	}},
	{"Accepted for Consul's sake, without effect", []agentFlag{
		{"dns-port", intFlag, "ports.dns", "No DNS."},
		{"recursor", listFlag, "recursors", "No DNS."},
		{"ui-dir", stringFlag, "ui_dir", ""},
		{"ui-content-path", stringFlag, "ui_content_path", ""},
		{"disable-host-node-id", boolFlag, "disable_host_node_id", ""},
		{"disable-keyring-file", boolFlag, "disable_keyring_file", ""},
		{"protocol", intFlag, "protocol", ""},
		{"raft-protocol", intFlag, "raft_protocol", ""},
		{"syslog", boolFlag, "enable_syslog", ""},
		{"segment", stringFlag, "segment", ""},
		{"read-replica", boolFlag, "read_replica", ""},
		{"non-voting-server", boolFlag, "read_replica", ""},
		{"auto-reload-config", boolFlag, "auto_reload_config", ""},
	}},
}

// value implements [flag.Value] for one flag and appends to the options.
type optionValue struct {
	flag agentFlag
	o    *Options
}

func (v optionValue) String() string { return "" }

func (v optionValue) IsBoolFlag() bool {
	return v.flag.kind == boolFlag || v.flag.name == "dev"
}

func (v optionValue) Set(s string) error {
	add := func(x any) { v.o.flags = append(v.o.flags, flagValue{v.flag, x}) }
	switch v.flag.kind {
	case stringFlag, listFlag:
		add(s)
	case intFlag:
		i, err := strconv.ParseInt(s, 0, 64)
		if err != nil {
			return errors.New("expected a whole number")
		}
		add(i)
	case boolFlag:
		b, err := strconv.ParseBool(s)
		if err != nil {
			return errors.New("expected true or false")
		}
		add(b)
	case durationFlag:
		if _, err := time.ParseDuration(s); err != nil {
			return errors.New(`expected a duration such as "30s"`)
		}
		add(s)
	case pairFlag:
		k, x, ok := strings.Cut(s, ":")
		if !ok || k == "" {
			return errors.New("expected key:value")
		}
		add([2]string{k, x})
	case optionFlag:
		switch v.flag.name {
		case "config-dir", "config-file":
			v.o.Paths = append(v.o.Paths, s)
		case "config-format":
			if !slices.Contains([]string{formatHCL, formatJSON, formatYAML}, s) {
				return errors.New(`expected "hcl", "json" or "yaml"`)
			}
			v.o.Format = s
		case "hcl":
			v.o.HCL = append(v.o.HCL, s)
		case "dev":
			b, err := strconv.ParseBool(s)
			if err != nil {
				return errors.New("expected true or false")
			}
			v.o.Dev = b
		}
	}
	return nil
}

// NewFlagSet returns the flags of sluice agent, which set o when they are
// parsed. Its usage goes to output, by groups.
func NewFlagSet(o *Options, output io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet("agent", flag.ContinueOnError)
	fs.SetOutput(output)
	for _, g := range flagGroups {
		for _, f := range g.flags {
			fs.Var(optionValue{f, o}, f.name, f.usage)
		}
	}
	fs.Usage = func() { fmt.Fprint(output, Usage()) }
	return fs
}

// ParseFlags parses the arguments of sluice agent. Errors and the usage are
// written to output as well; [flag.ErrHelp] is returned when help was asked for.
func ParseFlags(args []string, output io.Writer) (Options, error) {
	var o Options
	fs := NewFlagSet(&o, output)
	if err := fs.Parse(args); err != nil {
		return Options{}, err
	}
	if fs.NArg() > 0 {
		return Options{}, fmt.Errorf("Unexpected extra arguments: %v", fs.Args())
	}
	return o, nil
}

// Usage is the help text of sluice agent.
func Usage() string {
	var b strings.Builder
	b.WriteString("Usage: sluice agent [options]\n\n" +
		"  Runs an agent until it is told to stop. List-valued options come before\n" +
		"  what files say, others replace it. Files may be in HCL, JSON or YAML.\n")
	for _, g := range flagGroups {
		b.WriteString("\n" + g.title + ":\n")
		for _, f := range g.flags {
			name := "-" + f.name
			switch f.kind {
			case boolFlag:
			case intFlag:
				name += "=<n>"
			case durationFlag:
				name += "=<duration>"
			case pairFlag:
				name += "=<key:value>"
			default:
				if f.name != "dev" {
					name += "=<value>"
				}
			}
			if f.usage == "" {
				fmt.Fprintf(&b, "  %s\n", name)
				continue
			}
			fmt.Fprintf(&b, "  %s\n", name)
			for _, line := range wrap(f.usage, 70) {
				fmt.Fprintf(&b, "      %s\n", line)
			}
		}
	}
	return b.String()
}

func wrap(s string, width int) []string {
	var lines []string
	line := ""
	for _, w := range strings.Fields(s) {
		if line != "" && len(line)+1+len(w) > width {
			lines = append(lines, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += w
	}
	return append(lines, line)
}

// tree returns the flags as a source: those with lists, or the others.
func (o Options) tree(lists bool) *node {
	root := &node{kind: mapNode}
	for _, f := range o.flags {
		isList := f.flag.kind == listFlag || f.flag.kind == pairFlag
		if isList != lists {
			continue
		}
		pos := Pos{File: "-" + f.flag.name}
		n := &node{pos: pos, scalar: f.value}
		switch x := f.value.(type) {
		case [2]string:
			n = &node{pos: pos, kind: mapNode, entries: []entry{{x[0], pos, &node{pos: pos, scalar: x[1]}}}}
		default:
			if f.flag.kind == listFlag {
				n = &node{pos: pos, kind: listNode, list: []*node{n}}
			}
		}
		keys := strings.Split(f.flag.key, ".")
		for i := len(keys) - 1; i > 0; i-- {
			n = &node{pos: pos, kind: mapNode, entries: []entry{{keys[i], pos, n}}}
		}
		root.entries = append(root.entries, entry{keys[0], pos, n})
	}
	return root
}
