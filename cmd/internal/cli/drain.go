package cli

import (
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/gateway"
)

func (e *env) drainCommands() []*command {
	var o drainOptions
	return []*command{{
		name: "drain", synopsis: "Take a gateway out of use, connection by connection", http: true,
		help: `
Says in the catalog that the gateway is going (service maintenance, reason "draining"), waits until others know, and
closes its listeners: new connections go to other gateways, open ones go on. After the timeout those that are left are
ended, a few per second. Shows how far it is, and ends when no connection is left.

The gateway stays out of use until the agent is started again, or sluice drain -cancel. What the flags do not say is as
the agent's configuration has it, in data_plane.drain. Stopping this command does not stop the drain.`,
		flags: func(fs *flag.FlagSet) {
			o = drainOptions{}
			fs.StringVar(&o.proxy, "proxy", "", "service `ID` of the gateway or sidecar; may be left out where the agent has one gateway")
			fs.BoolVar(&o.all, "all", false, "drain every gateway of the agent")
			fs.StringVar(&o.grace, "grace", "", "`time` from telling others to closing the listeners, such as 5s")
			fs.StringVar(&o.timeout, "timeout", "", "`time` that open connections have to finish, such as 60s")
			fs.StringVar(&o.rate, "rate", "", "how many of the rest are ended per second: `N` or N/s; 0 is all at once")
			fs.BoolVar(&o.cancel, "cancel", false, "take the drain back: serve again")
			fs.BoolVar(&o.detach, "detach", false, "do not wait for the end")
		},
		run: func(c *call) error { return c.drain(&o) },
	}}
}

type drainOptions struct {
	proxy, grace, timeout, rate string
	all, cancel, detach         bool
}

// body returns the request.
func (o *drainOptions) body() (map[string]any, error) {
	body := map[string]any{}
	for _, f := range []struct{ flag, key, text string }{{"grace", "Wait", o.grace}, {"timeout", "Timeout", o.timeout}} {
		if f.text == "" {
			continue
		}
		if d, err := time.ParseDuration(f.text); err != nil || d < 0 {
			return nil, usage("-%s %q is no time such as 30s", f.flag, f.text)
		}
		body[f.key] = f.text
	}
	if o.rate != "" {
		r, err := strconv.ParseFloat(strings.TrimSuffix(o.rate, "/s"), 64)
		if err != nil || !(r >= 0 && r <= 1e6) {
			return nil, usage("-rate %q is no number such as 50 or 50/s", o.rate)
		}
		body["Rate"] = r
	}
	return body, nil
}

func (c *call) drain(o *drainOptions) error {
	if o.all && o.proxy != "" {
		return usage("-all and -proxy exclude each other")
	}
	body, err := o.body()
	if err != nil {
		return err
	}
	ids, err := proxiesToDrain(c.api, o)
	if err != nil {
		return err
	}
	path := func(id string) string { return "/v1/agent/proxy/" + url.PathEscape(id) + "/drain" }
	if o.cancel {
		for _, id := range ids {
			if _, err := c.api.Raw().Delete(path(id), nil); err != nil {
				return fmt.Errorf("take back the drain of %s: %w", id, err)
			}
			fmt.Fprintf(c.out, "%s: in use again\n", id)
		}
		return nil
	}
	for _, id := range ids {
		_, err := c.api.Raw().Write(path(id), body, nil, nil)
		if status := (api.StatusError{}); errors.As(err, &status) && status.Code == http.StatusConflict {
			fmt.Fprintf(c.out, "%s: is being drained already\n", id) // by its own plan
			continue
		}
		if err != nil {
			return fmt.Errorf("drain %s: %w", id, err)
		}
	}
	if o.detach {
		return nil
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		var left []string
		for _, id := range ids {
			var p gateway.Progress
			if _, err := c.api.Raw().Query(path(id), &p, nil); err != nil {
				return fmt.Errorf("ask for the drain of %s: %w", id, err)
			}
			fmt.Fprintln(c.out, progressLine(id, &p, time.Now()))
			if p.Phase != gateway.DrainDrained {
				left = append(left, id)
			}
		}
		if ids = left; len(ids) == 0 {
			return nil
		}
		<-tick.C
	}
}

// proxiesToDrain returns those that the flags name, sorted.
func proxiesToDrain(client *api.Client, o *drainOptions) ([]string, error) {
	if o.proxy != "" {
		return []string{o.proxy}, nil
	}
	var proxies map[string]gateway.ProxyStatus
	if _, err := client.Raw().Query("/v1/agent/proxies", &proxies, nil); err != nil {
		return nil, fmt.Errorf("list the proxies of the agent: %w", err)
	}
	var ids []string
	for id, p := range proxies {
		if p.Kind == api.ServiceKindMeshGateway && (!o.cancel || p.Drain != nil) {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	switch {
	case len(ids) == 0 && o.cancel:
		return nil, errors.New("no gateway of the agent is being drained")
	case len(ids) == 0:
		return nil, hinted{errors.New("the agent has no gateway"), "-proxy drains a sidecar; -http-addr or CONSUL_HTTP_ADDR says which agent to ask"}
	case len(ids) > 1 && !o.all:
		return nil, usage("say -all, or with -proxy which of %s", strings.Join(ids, ", "))
	}
	return ids, nil
}

// progressLine is a line about a drain.
func progressLine(id string, p *gateway.Progress, now time.Time) string {
	line := fmt.Sprintf("%s: %-9s  open %d", id, p.Phase, p.Open)
	if p.Finished+p.Closed > 0 {
		line += fmt.Sprintf("  finished %d  closed %d", p.Finished, p.Closed)
	}
	if p.Phase == gateway.DrainDrained {
		return line + fmt.Sprintf("  after %s", now.Sub(p.Since).Round(100*time.Millisecond))
	}
	if p.Rate > 0 {
		line += fmt.Sprintf("  %.1f/s", p.Rate)
	}
	return line + fmt.Sprintf("  ETA %s", max(0, p.ETA.Sub(now)).Round(time.Second))
}
