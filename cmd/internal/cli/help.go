package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/cli"
)

// sections order the commands of the overview. A command that none of them names
// comes last, so that it is not lost.
var sections = []struct {
	title string
	names []string
}{
	{"Run", []string{"agent", "forward", "demo"}},
	{"Configure", []string{"validate", "reload", "config", "services"}},
	{"Look and connect", []string{"catalog", "intention", "connect", "drain"}},
	{"Cluster", []string{"members", "join", "leave", "force-leave"}},
	{"Other", []string{"version"}},
}

// overview is the text of sluice alone.
func overview(commands map[string]cli.CommandFactory) string {
	var b strings.Builder
	b.WriteString("Usage: sluice [-version] [-help] COMMAND [ARGUMENTS]\n\n  A mesh-gateway agent for Consul-compatible service meshes.\n")
	width := 0
	for name := range commands {
		width = max(width, len(name))
	}
	shown := map[string]bool{}
	section := func(title string, names []string) {
		fmt.Fprintf(&b, "\n%s:\n\n", title)
		for _, name := range names {
			factory := commands[name]
			if factory == nil {
				continue
			}
			shown[name] = true
			if c, err := factory(); err == nil {
				fmt.Fprintf(&b, "    %-*s  %s\n", width, name, c.Synopsis())
			}
		}
	}
	for _, s := range sections {
		section(s.title, s.names)
	}
	var rest []string
	for _, name := range sorted(commands) {
		if !shown[name] {
			rest = append(rest, name)
		}
	}
	if len(rest) > 0 {
		section("More", rest)
	}
	b.WriteString("\n`sluice COMMAND -h` tells of one command.")
	return b.String()
}

// groupCommands are the names that only begin others.
func groupCommands() []*command {
	return []*command{
		{group: true, name: "catalog", args: "SUBCOMMAND", synopsis: "Read the catalog of nodes and services"},
		{group: true, name: "config", args: "SUBCOMMAND", synopsis: "Read and write configuration entries"},
		{group: true, name: "connect", args: "SUBCOMMAND", synopsis: "Run a sidecar, and manage the certificate authority"},
		{group: true, name: "connect ca", args: "SUBCOMMAND", synopsis: "Manage the certificate authority"},
		{group: true, name: "intention", args: "SUBCOMMAND", synopsis: "Say which service may connect to which"},
		{group: true, name: "services", args: "SUBCOMMAND", synopsis: "Register and deregister services of the agent"},
	}
}

// subcommands answers a group that was called without one of its subcommands.
func (c *command) subcommands(args []string) int {
	if len(args) == 0 {
		return cli.RunResultHelp
	}
	if strings.HasPrefix(args[0], "-") {
		c.e.fail(usage("%q comes after a subcommand of %q", args[0], c.name))
		return exitUsage
	}
	var names []string
	for name := range c.e.commands() {
		if strings.HasPrefix(name, c.name+" ") {
			names = append(names, name)
		}
	}
	return c.e.unknown(c.name+" "+args[0], names)
}

// unknown says that there is no such command, and which may have been meant.
func (e *env) unknown(name string, names []string) int {
	fmt.Fprintf(e.err, "error: there is no command %q\n", name)
	if near := nearest(name, names); near != "" {
		fmt.Fprintf(e.err, "hint: did you mean `sluice %s`?\n", near)
	} else {
		fmt.Fprintln(e.err, "hint: `sluice -h` lists the commands")
	}
	return exitUnknown
}

// nearest returns the name that takes the fewest edits to be typed as it was, ""
// where none is near.
func nearest(typed string, names []string) string {
	best, least := "", len(typed)/3+1
	slices.Sort(names)
	for _, name := range names {
		if d := distance(strings.ToLower(typed), name); d < least || d == least && best == "" {
			best, least = name, d
		}
	}
	if best == "" {
		// "service" for "services register" is no misspelling but half of a name.
		for _, name := range names {
			if strings.HasPrefix(name, typed) {
				return name
			}
		}
	}
	return best
}

// distance is how many insertions, deletions, replacements and swaps of
// neighbours turn a into b.
func distance(a, b string) int {
	// Three rows of the usual matrix: a swap looks back two.
	before, above, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range above {
		above[j] = j
	}
	for i := range len(a) {
		row[0] = i + 1
		for j := range len(b) {
			row[j+1] = min(row[j], above[j+1]) + 1
			replaced := above[j]
			if a[i] != b[j] {
				replaced++
			}
			row[j+1] = min(row[j+1], replaced)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, above, row = above, row, before
	}
	return above[len(b)]
}
