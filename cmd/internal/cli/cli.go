// Package cli holds the commands. All but agent, demo, forward, validate and
// version speak to an agent through its HTTP API; only agent and demo run one.
package cli

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/hashicorp/cli"
	"github.com/hashicorp/consul/api"
)

// Exit codes.
const (
	exitOK      = 0
	exitError   = 1
	exitUsage   = 1   // as Consul: a bad flag is an error like any other
	exitUnknown = 127 // there is no such command, as a shell has it
)

// env is what a command has to do with the world.
type env struct {
	in       io.Reader
	out, err io.Writer
}

// Run runs the command that args name, and returns its exit code.
func Run(args []string, in io.Reader, out, errw io.Writer) int {
	e := &env{in: in, out: out, err: errw}
	commands := e.commands()
	c := &cli.CLI{
		Name: "sluice", Version: versionLine(), Args: args, Commands: commands,
		HelpFunc: overview, HelpWriter: out, ErrorWriter: errw,
		Autocomplete: false,
	}
	if name := c.Subcommand(); name != "" && commands[name] == nil {
		return e.unknown(name, slices.Collect(maps.Keys(commands)))
	}
	code, err := c.Run()
	if err != nil {
		e.fail(err)
		return exitError
	}
	return code
}

// command is one command: its flags, its arguments, what it does.
type command struct {
	e *env
	// name is as typed after "sluice".
	name, args, synopsis, help string
	// flags defines the command's own flags; nil where it has none.
	flags func(*flag.FlagSet)
	// http gives it the flags of all that speak to an agent.
	http bool
	run  func(c *call) error

	// raw gets the arguments unparsed, for a command with a flag set of its own; its
	// help is the whole text.
	raw func(args []string) int
	// group says that the name is only the first part of others.
	group bool
}

// call is one use of a command.
type call struct {
	*env
	args []string
	conn connection
	api  *api.Client // nil for a command that speaks to no agent
}

var (
	// errUsage is wrapped by errors that the usage text answers.
	errUsage = errors.New("see -h")
	// errSilent ends a command with code 1 after it has said everything itself.
	errSilent = errors.New("")
)

// hinted is an error with what can be done about it.
type hinted struct {
	error
	hint string
}

// Unwrap returns the error itself.
func (h hinted) Unwrap() error { return h.error }

func usage(format string, args ...any) error {
	return fmt.Errorf("%s (%w)", fmt.Sprintf(format, args...), errUsage)
}

// Synopsis implements [cli.Command].
func (c *command) Synopsis() string { return c.synopsis }

// Help implements [cli.Command].
func (c *command) Help() string {
	if c.raw != nil {
		return strings.TrimSpace(c.help)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: sluice %s\n\n", strings.TrimSpace(c.name+" "+c.args))
	for line := range strings.Lines(strings.TrimSpace(cmp.Or(c.help, c.synopsis+"."))) {
		if strings.TrimSpace(line) != "" {
			b.WriteString("  ")
		}
		b.WriteString(line)
	}
	b.WriteString("\n")
	if c.group {
		return strings.TrimSpace(b.String())
	}
	own := flag.NewFlagSet("", flag.ContinueOnError)
	if c.flags != nil {
		c.flags(own)
		printFlags(&b, "Options", own)
	}
	if c.http {
		fs := flag.NewFlagSet("", flag.ContinueOnError)
		new(connection).register(fs)
		printFlags(&b, "HTTP API options", fs)
	}
	return strings.TrimSpace(b.String())
}

func printFlags(b *strings.Builder, title string, fs *flag.FlagSet) {
	fmt.Fprintf(b, "\n%s:\n\n", title)
	fs.SetOutput(b)
	fs.PrintDefaults()
}

// Run implements [cli.Command].
func (c *command) Run(args []string) int {
	if c.raw != nil {
		return c.raw(args)
	}
	if c.group {
		return c.subcommands(args)
	}
	fs := flag.NewFlagSet("sluice "+c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	call := &call{env: c.e}
	if c.flags != nil {
		c.flags(fs)
	}
	if c.http {
		call.conn.register(fs)
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(c.e.out, c.Help())
			return exitOK
		}
		c.e.fail(err)
		fmt.Fprintf(c.e.err, "hint: `sluice %s -h` shows the flags\n", c.name)
		return exitUsage
	}
	call.args = fs.Args()
	if err := call.prepare(c); err != nil {
		c.e.fail(err)
		return exitUsage
	}
	if err := c.run(call); err != nil {
		if code := exitCode(0); errors.As(err, &code) {
			return int(code)
		}
		if !errors.Is(err, errSilent) {
			c.e.fail(err)
		}
		return exitError
	}
	return exitOK
}

// prepare refuses arguments that the command does not take, and makes the client
// of one that speaks to an agent.
func (c *call) prepare(cmd *command) (err error) {
	if cmd.args == "" && len(c.args) > 0 {
		return usage("too many arguments: %q", strings.Join(c.args, " "))
	}
	if cmd.http {
		c.api, err = c.client()
	}
	return err
}

// fail prints an error, and beside it what can be done.
func (e *env) fail(err error) {
	fmt.Fprintf(e.err, "error: %v\n", err)
	if hint := hintFor(err); hint != "" {
		fmt.Fprintf(e.err, "hint: %s\n", hint)
	}
}

// hintFor knows what helps with the errors that people meet first.
func hintFor(err error) string {
	if h := (hinted{}); errors.As(err, &h) {
		return h.hint
	}
	text, _, _ := strings.Cut(err.Error(), "\n") // what follows may be somebody's log
	switch {
	case strings.Contains(text, "connection refused"):
		return "is an agent running there? -http-addr or CONSUL_HTTP_ADDR says where to ask; `sluice agent -dev` starts one"
	case strings.Contains(text, "No cluster leader"):
		return "the datacenter has no leader yet, or has lost it: `sluice members` shows which servers are there"
	case strings.Contains(text, "No path to datacenter"):
		return "`sluice members -wan` shows the datacenters this one is federated with"
	}
	return ""
}

// connection says which agent to speak to, and how.
type connection struct {
	addr, token, tokenFile, dc string
	caFile, caPath, cert, key  string
	serverName                 string
	stale                      bool
}

func (c *connection) register(fs *flag.FlagSet) {
	fs.StringVar(&c.addr, "http-addr", "", "`address` of the agent, with or without a scheme; or unix:///path (CONSUL_HTTP_ADDR, default 127.0.0.1:8500)")
	fs.StringVar(&c.token, "token", "", "ACL `token` to use (CONSUL_HTTP_TOKEN)")
	fs.StringVar(&c.tokenFile, "token-file", "", "`file` that holds the token (CONSUL_HTTP_TOKEN_FILE)")
	fs.StringVar(&c.dc, "datacenter", "", "`datacenter` to ask; the agent's own where it is empty")
	fs.StringVar(&c.caFile, "ca-file", "", "`file` of CA certificates for TLS (CONSUL_CACERT)")
	fs.StringVar(&c.caPath, "ca-path", "", "`directory` of CA certificates for TLS (CONSUL_CAPATH)")
	fs.StringVar(&c.cert, "client-cert", "", "`file` of a client certificate (CONSUL_CLIENT_CERT)")
	fs.StringVar(&c.key, "client-key", "", "`file` of the client certificate's key (CONSUL_CLIENT_KEY)")
	fs.StringVar(&c.serverName, "tls-server-name", "", "`name` to expect of the server (CONSUL_TLS_SERVER_NAME)")
	fs.BoolVar(&c.stale, "stale", false, "let any server answer, not only the leader")
}

// client returns the API client that the flags and the environment describe.
func (c *call) client() (*api.Client, error) {
	client, _, err := c.connect()
	return client, err
}

// connect is client, and returns besides where and how it asks.
func (c *call) connect() (*api.Client, *api.Config, error) {
	conf := api.DefaultConfig()
	set := func(dst *string, v string) {
		if v != "" {
			*dst = v
		}
	}
	set(&conf.Address, c.conn.addr)
	set(&conf.Token, c.conn.token)
	set(&conf.TokenFile, c.conn.tokenFile)
	set(&conf.Datacenter, c.conn.dc)
	set(&conf.TLSConfig.CAFile, c.conn.caFile)
	set(&conf.TLSConfig.CAPath, c.conn.caPath)
	set(&conf.TLSConfig.CertFile, c.conn.cert)
	set(&conf.TLSConfig.KeyFile, c.conn.key)
	set(&conf.TLSConfig.Address, c.conn.serverName)
	// It fills in what the environment says and the flags do not.
	client, err := api.NewClient(conf)
	if err != nil {
		return nil, nil, fmt.Errorf("make API client: %w", err)
	}
	return client, conf, nil
}

// query returns the options of a read.
func (c *call) query() *api.QueryOptions { return &api.QueryOptions{AllowStale: c.conn.stale} }

// table prints rows under a header, columns aligned.
func (c *call) table(rows ...[]string) {
	width := map[int]int{}
	for _, r := range rows {
		for i, cell := range r {
			width[i] = max(width[i], len(cell))
		}
	}
	for _, r := range rows {
		var b strings.Builder
		for i, cell := range r {
			b.WriteString(cell)
			if i < len(r)-1 {
				b.WriteString(strings.Repeat(" ", width[i]-len(cell)+2))
			}
		}
		fmt.Fprintln(c.out, strings.TrimRight(b.String(), " "))
	}
}

// readFile reads a file, or standard input for "-".
func (c *call) readFile(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(c.in)
	}
	return os.ReadFile(name)
}

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// commands returns all of them by name.
func (e *env) commands() map[string]cli.CommandFactory {
	m := map[string]cli.CommandFactory{}
	for _, c := range slices.Concat(
		groupCommands(), e.agentCommands(), e.memberCommands(), e.serviceCommands(), e.configCommands(),
		e.connectCommands(), e.proxyCommands(), e.drainCommands(), e.forwardCommands(), e.demoCommands(),
	) {
		c.e = e
		m[c.name] = func() (cli.Command, error) { return c, nil }
	}
	return m
}
