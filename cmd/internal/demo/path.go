package demo

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/sluicemesh/sluice/agent/connect"
	"github.com/sluicemesh/sluice/gateway"
)

// hop is one stop of the way from web to api.
type hop struct {
	name, addr string
	// took is the time of a whole request that enters the way here.
	took  time.Duration
	plain bool // spoken to in clear text
}

// path is the way a request takes, as the agents' own forwarding tables have it.
type path struct {
	hops []hop
	mode string
	// sni is what both gateways route by, and spiffe who must answer.
	sni, spiffe string
	// identity is who did answer, from the certificate of the far side.
	identity string
	answer   string
}

// await asks until the request goes all the way; the error names the hop that
// did not work.
func (d *demo) await(ctx context.Context) (*path, error) {
	d.step("waiting for the first request to go all the way")
	var p *path
	err := d.until(ctx, d.dc1, "reach api in dc2 from web", func() (err error) {
		if p, err = d.walk(ctx); err != nil {
			return err
		}
		return d.measure(ctx, p)
	})
	if err != nil {
		return nil, err
	}
	d.step("ready")
	return p, nil
}

// walk follows the tables from web's upstream listener to the service.
func (d *demo) walk(ctx context.Context) (*path, error) {
	web, err := table(ctx, d.dc1, "web-sidecar-proxy")
	if err != nil {
		return nil, err
	}
	api, err := table(ctx, d.dc2, "api-sidecar-proxy")
	if err != nil {
		return nil, err
	}
	p := &path{}
	p.hops = append(p.hops, hop{name: "web (dc1)", addr: d.dc1.addr(d.dc1.appPort), plain: true})
	var at string
	for _, l := range web.Listeners {
		if l.Mode != gateway.ListenUpstream {
			continue
		}
		p.hops = append(p.hops, hop{name: "sidecar of web (dc1)", addr: l.Address, plain: true})
		c := web.Cluster(l.Cluster)
		if c == nil || c.TLS == nil || len(c.TLS.SPIFFE) == 0 {
			return nil, errors.New("sidecar of web (dc1): its upstream has no cluster yet")
		}
		p.sni, p.spiffe = c.TLS.ServerName, c.TLS.SPIFFE[0]
		if at, err = healthy(c); err != nil {
			return nil, fmt.Errorf("sidecar of web (dc1): %w", err)
		}
	}
	if at == "" {
		return nil, errors.New("sidecar of web (dc1): it has no upstream listener yet")
	}
	for _, s := range []*site{d.dc1, d.dc2} {
		gw := s.addr(portGateway)
		if at != gw {
			continue
		}
		name := fmt.Sprintf("mesh gateway (%s)", s.name)
		p.hops = append(p.hops, hop{name: name, addr: gw})
		t, err := table(ctx, s, "mesh-gateway")
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		_, c := t.Lookup(p.sni)
		if c == nil {
			return nil, fmt.Errorf("%s: it has no route for %s", name, p.sni)
		}
		if at, err = healthy(c); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	for _, l := range api.Listeners {
		if l.Mode != gateway.ListenInbound {
			continue
		}
		if l.Address != at {
			return nil, fmt.Errorf("the way leads to %s, and the sidecar of api listens on %s", at, l.Address)
		}
		p.hops = append(p.hops, hop{name: "sidecar of api (dc2)", addr: at})
		if c := api.Cluster(l.Cluster); c != nil {
			if at, err = healthy(c); err != nil {
				return nil, fmt.Errorf("sidecar of api (dc2): %w", err)
			}
			p.hops = append(p.hops, hop{name: "api (dc2)", addr: at, plain: true})
		}
	}
	p.mode = map[int]string{4: "none", 5: "remote", 6: "local"}[len(p.hops)]
	return p, nil
}

func healthy(c *gateway.Cluster) (string, error) {
	for _, e := range c.Endpoints {
		if e.Healthy {
			return net.JoinHostPort(e.Address, strconv.Itoa(e.Port)), nil
		}
	}
	if len(c.Endpoints) == 0 {
		return "", fmt.Errorf("cluster %s has no endpoint yet", c.Name)
	}
	return "", fmt.Errorf("cluster %s has no healthy endpoint: %s", c.Name, c.Endpoints[0].Why)
}

// measure sends a request into the way at every hop, the last one first: so the
// first that fails is the one that is broken, and the times tell what each costs.
func (d *demo) measure(ctx context.Context, p *path) error {
	id, err := webIdentity(ctx, d.dc1)
	if err != nil {
		return fmt.Errorf("certificate of web: %w", err)
	}
	for i := len(p.hops) - 1; i >= 0; i-- {
		h := &p.hops[i]
		start := time.Now()
		body, peer, err := request(ctx, h, p, id)
		if err != nil {
			return fmt.Errorf("broken at %s, %s: %w", h.name, h.addr, err)
		}
		h.took = time.Since(start)
		if peer != "" {
			p.identity = peer
		}
		p.answer = strings.TrimSpace(body)
	}
	return nil
}

// identity is what the demo proves itself to the mesh with: it takes the place of
// web's sidecar to enter the way behind it.
type identity struct {
	cert  tls.Certificate
	roots *connect.Verifier
}

func webIdentity(ctx context.Context, s *site) (*identity, error) {
	var leaf struct{ CertPEM, PrivateKeyPEM string }
	if err := getJSON(ctx, s.url("/v1/agent/connect/ca/leaf/web"), &leaf); err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair([]byte(leaf.CertPEM), []byte(leaf.PrivateKeyPEM))
	if err != nil {
		return nil, err
	}
	roots := new(connect.Roots)
	if err := getJSON(ctx, s.url("/v1/agent/connect/ca/roots"), roots); err != nil {
		return nil, err
	}
	v, err := connect.NewVerifier(roots)
	return &identity{cert: cert, roots: v}, err
}

// request makes one HTTP request at a hop, over mutual TLS where the hop expects
// it; peer is the identity of who answered it.
func request(ctx context.Context, h *hop, p *path, id *identity) (body, peer string, err error) {
	const limit = 5 * time.Second
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", h.addr)
	if err != nil {
		return "", "", err
	}
	defer conn.Close() //nolint:errcheck // it has served
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return "", "", err
		}
	}
	if !h.plain {
		tc := tls.Client(conn, &tls.Config{
			ServerName: p.sni, Certificates: []tls.Certificate{id.cert}, MinVersion: tls.VersionTLS12,
			InsecureSkipVerify: true, //nolint:gosec // VerifyConnection verifies chain and SPIFFE identity
			VerifyConnection: func(cs tls.ConnectionState) error {
				return id.roots.Verify(cs.PeerCertificates, time.Now(), []string{p.spiffe})
			},
		})
		if err := tc.HandshakeContext(ctx); err != nil {
			return "", "", err
		}
		peer = tc.ConnectionState().PeerCertificates[0].URIs[0].String()
		conn = tc
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://api/demo", nil)
	if err != nil {
		return "", "", err
	}
	req.Close = true
	if err := req.Write(conn); err != nil {
		return "", "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close() //nolint:errcheck // it has been read
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", "", fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(b)))
	}
	return string(b), peer, nil
}

// report prints the way.
func (d *demo) report(p *path) {
	fmt.Fprintf(d.Out, "\nweb in dc1 called api in dc2 (mode %s):\n\n", p.mode)
	for i, h := range p.hops {
		how := "mutual TLS"
		if h.plain {
			how = "plain HTTP"
		}
		arrow := "  "
		if i > 0 {
			arrow = "→ "
		}
		fmt.Fprintf(d.Out, "  %s%-22s %-18s %-10s %8.2f ms from here\n", arrow, h.name, h.addr, how, float64(h.took.Microseconds())/1000)
	}
	fmt.Fprintf(d.Out, `
  server name   %s
                (what the gateways route by; they do not decrypt)
  who answered  %s
                (from its certificate, checked against the mesh's roots)
  answer        %s
`, p.sni, p.identity, p.answer)
}

func table(ctx context.Context, s *site, proxy string) (*gateway.Table, error) {
	t := new(gateway.Table)
	if err := getJSON(ctx, s.url("/v1/agent/proxy/"+proxy+"/table"), t); err != nil {
		return nil, fmt.Errorf("%s in %s has no forwarding table yet: %w", proxy, s.name, err)
	}
	return t, nil
}

func getJSON(ctx context.Context, url string, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close() //nolint:errcheck // it has been read
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(b)))
	}
	return json.Unmarshal(b, out)
}
