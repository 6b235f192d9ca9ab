package cli

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"strconv"

	"github.com/hashicorp/consul/api"
)

func (e *env) connectCommands() []*command {
	var allow, deny, replace, destination, source bool
	var file, description string
	// exact takes the two names of an intention.
	exact := func(c *call) (source, destination string, err error) {
		if len(c.args) != 2 {
			return "", "", usage("name the source and the destination")
		}
		return c.args[0], c.args[1], nil
	}
	return []*command{
		{
			name: "intention create", args: "SOURCE DESTINATION", http: true, synopsis: "Allow or deny a service to connect to another",
			help: "Says whether a service may connect to another; * stands for every service.\nIntentions are kept in the primary datacenter and hold in all of them.",
			flags: func(fs *flag.FlagSet) {
				fs.BoolVar(&allow, "allow", false, "allow the connection (the default)")
				fs.BoolVar(&deny, "deny", false, "deny the connection")
				fs.BoolVar(&replace, "replace", false, "replace an intention that exists")
				fs.StringVar(&description, "description", "", "`text` that says what it is for")
			},
			run: func(c *call) error {
				src, dst, err := exact(c)
				if err != nil {
					return err
				}
				if allow && deny {
					return usage("-allow and -deny exclude each other")
				}
				i := &api.Intention{SourceName: src, DestinationName: dst, SourceType: api.IntentionSourceConsul, Action: api.IntentionActionAllow, Description: description}
				if deny {
					i.Action = api.IntentionActionDeny
				}
				if !replace {
					old, _, err := c.api.Connect().IntentionGetExact(src, dst, nil)
					if err != nil {
						return fmt.Errorf("read intention %s => %s: %w", src, dst, err)
					}
					if old != nil {
						return fmt.Errorf("create intention: %s => %s exists (%s); -replace replaces it", src, dst, old.Action)
					}
				}
				if _, err := c.api.Connect().IntentionUpsert(i, nil); err != nil {
					return fmt.Errorf("create intention %s => %s: %w", src, dst, err)
				}
				fmt.Fprintf(c.out, "Created: %s => %s (%s)\n", src, dst, i.Action)
				return nil
			},
		},
		{
			name: "intention delete", args: "SOURCE DESTINATION", http: true, synopsis: "Delete an intention",
			run: func(c *call) error {
				src, dst, err := exact(c)
				if err != nil {
					return err
				}
				if _, err := c.api.Connect().IntentionDeleteExact(src, dst, nil); err != nil {
					return fmt.Errorf("delete intention %s => %s: %w", src, dst, err)
				}
				fmt.Fprintln(c.out, "Intention deleted.")
				return nil
			},
		},
		{
			name: "intention get", args: "SOURCE DESTINATION", http: true, synopsis: "Show an intention",
			run: func(c *call) error {
				src, dst, err := exact(c)
				if err != nil {
					return err
				}
				i, _, err := c.api.Connect().IntentionGetExact(src, dst, c.query())
				if err != nil {
					return fmt.Errorf("read intention %s => %s: %w", src, dst, err)
				}
				if i == nil {
					return fmt.Errorf("there is no intention %s => %s", src, dst)
				}
				rows := [][]string{
					{"Source:", i.SourceName}, {"Destination:", i.DestinationName}, {"Action:", string(i.Action)},
					{"Precedence:", strconv.Itoa(i.Precedence)},
				}
				if i.Description != "" {
					rows = append(rows, []string{"Description:", i.Description})
				}
				for _, k := range sorted(i.Meta) {
					rows = append(rows, []string{"Meta:", k + "=" + i.Meta[k]})
				}
				c.table(rows...)
				return nil
			},
		},
		{
			name: "intention list", http: true, synopsis: "List the intentions",
			run: func(c *call) error {
				list, _, err := c.api.Connect().Intentions(c.query())
				if err != nil {
					return fmt.Errorf("list intentions: %w", err)
				}
				if len(list) == 0 {
					fmt.Fprintln(c.out, "There are no intentions.")
					return nil
				}
				rows := [][]string{{"Source", "Action", "Destination", "Precedence"}}
				for _, i := range list {
					action := string(i.Action)
					if len(i.Permissions) > 0 {
						action = "permissions"
					}
					rows = append(rows, []string{i.SourceName, action, i.DestinationName, strconv.Itoa(i.Precedence)})
				}
				c.table(rows...)
				return nil
			},
		},
		{
			name: "intention check", args: "SOURCE DESTINATION", http: true, synopsis: "Tell whether a service may connect to another",
			help: "Prints Allowed and ends with 0, or Denied and ends with 2.",
			run: func(c *call) error {
				src, dst, err := exact(c)
				if err != nil {
					return err
				}
				ok, _, err := c.api.Connect().IntentionCheck(&api.IntentionCheck{Source: src, Destination: dst, SourceType: api.IntentionSourceConsul}, c.query())
				if err != nil {
					return fmt.Errorf("check intention %s => %s: %w", src, dst, err)
				}
				if !ok {
					fmt.Fprintln(c.out, "Denied")
					return exitCode(2)
				}
				fmt.Fprintln(c.out, "Allowed")
				return nil
			},
		},
		{
			name: "intention match", args: "SERVICE", http: true, synopsis: "List the intentions that apply to a service",
			flags: func(fs *flag.FlagSet) {
				fs.BoolVar(&source, "source", false, "the service is the source")
				fs.BoolVar(&destination, "destination", false, "the service is the destination (the default)")
			},
			run: func(c *call) error {
				if len(c.args) != 1 {
					return usage("name one service")
				}
				if source && destination {
					return usage("-source and -destination exclude each other")
				}
				by := api.IntentionMatchDestination
				if source {
					by = api.IntentionMatchSource
				}
				m, _, err := c.api.Connect().IntentionMatch(&api.IntentionMatch{By: by, Names: c.args}, c.query())
				if err != nil {
					return fmt.Errorf("match intentions of %s: %w", c.args[0], err)
				}
				for _, i := range m[c.args[0]] {
					action := string(i.Action)
					if len(i.Permissions) > 0 {
						action = fmt.Sprintf("%d permissions", len(i.Permissions))
					}
					fmt.Fprintf(c.out, "%s => %s (%s)\n", i.SourceName, i.DestinationName, action)
				}
				return nil
			},
		},
		{
			name: "connect ca get-config", http: true, synopsis: "Print the configuration of the certificate authority",
			run: func(c *call) error {
				conf, _, err := c.api.Connect().CAGetConfig(c.query())
				if err != nil {
					return fmt.Errorf("read CA configuration: %w", err)
				}
				b, err := json.MarshalIndent(conf, "", "    ")
				if err != nil {
					return err
				}
				fmt.Fprintln(c.out, string(b))
				return nil
			},
		},
		{
			name: "connect ca set-config", http: true, synopsis: "Replace the configuration of the certificate authority",
			help:  "Replaces the configuration, which may rotate the root. The file is JSON, as\n`sluice connect ca get-config` prints it; - is standard input.",
			flags: func(fs *flag.FlagSet) { fs.StringVar(&file, "config-file", "", "`file` with the configuration") },
			run: func(c *call) error {
				if file == "" {
					return usage("-config-file says what to set")
				}
				b, err := c.readFile(file)
				if err != nil {
					return err
				}
				conf := new(api.CAConfig)
				dec := json.NewDecoder(bytes.NewReader(b))
				dec.DisallowUnknownFields()
				if err := dec.Decode(conf); err != nil {
					return fmt.Errorf("%s: %w", file, err)
				}
				if _, err := c.api.Connect().CASetConfig(conf, nil); err != nil {
					return fmt.Errorf("set CA configuration: %w", err)
				}
				fmt.Fprintln(c.out, "Configuration updated!")
				return nil
			},
		},
	}
}

// exitCode is an error that has been told, with a code of its own.
type exitCode int

// Error implements [error].
func (c exitCode) Error() string { return "exit code " + strconv.Itoa(int(c)) }
