package check

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/sluicemesh/sluice/agent/catalog"
)

// tcp passes when a connection can be opened.
type tcp struct {
	addr   string
	useTLS *tls.Config
}

func tcpProber(def catalog.CheckDefinition) prober {
	p := &tcp{addr: def.TCP}
	if def.TCPUseTLS {
		p.useTLS = &tls.Config{ServerName: def.TLSServerName, InsecureSkipVerify: def.TLSSkipVerify} //nolint:gosec // the operator's choice, per check
	}
	return p
}

func (p *tcp) probe(ctx context.Context) (status, output string) {
	var conn net.Conn
	var err error
	if p.useTLS != nil {
		conn, err = (&tls.Dialer{Config: p.useTLS}).DialContext(ctx, "tcp", p.addr)
	} else {
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", p.addr)
	}
	if err != nil {
		return Critical, err.Error()
	}
	_ = conn.Close() // the check is that it opened
	return Passing, fmt.Sprintf("TCP connect %s: Success", p.addr)
}

func (p *tcp) close() {}

// web passes on a 2xx answer, warns on 429, and is critical otherwise.
type web struct {
	client *http.Client
	def    catalog.CheckDefinition
	most   int // bytes of the body to read
}

func httpProber(def catalog.CheckDefinition, most int) prober {
	p := &web{def: def, most: most, client: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,                                                                              // a check must find out whether one can connect
		TLSClientConfig:   &tls.Config{ServerName: def.TLSServerName, InsecureSkipVerify: def.TLSSkipVerify}, //nolint:gosec // the operator's choice, per check
	}}}
	return p
}

func (p *web) probe(ctx context.Context) (status, output string) {
	method := p.def.Method
	if method == "" {
		method = http.MethodGet
	}
	req, err := http.NewRequestWithContext(ctx, method, p.def.HTTP, strings.NewReader(p.def.Body))
	if err != nil {
		return Critical, err.Error()
	}
	for k, vs := range p.def.Header {
		for _, v := range vs {
			req.Header.Add(k, v)
		}
	}
	if h := req.Header.Get("Host"); h != "" {
		req.Host = h
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", "Sluice Health Check")
	}
	if req.Header.Get("Accept") == "" {
		req.Header.Set("Accept", "text/plain, text/*, */*")
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return Critical, err.Error()
	}
	defer resp.Body.Close() //nolint:errcheck // nothing is left to do about it
	body, _ := io.ReadAll(io.LimitReader(resp.Body, int64(p.most)))
	output = fmt.Sprintf("HTTP %s %s: %s Output: %s", method, p.def.HTTP, resp.Status, body)
	switch {
	case resp.StatusCode >= 200 && resp.StatusCode < 300:
		return Passing, output
	case resp.StatusCode == http.StatusTooManyRequests:
		return Warning, output
	}
	return Critical, output
}

func (p *web) close() { p.client.CloseIdleConnections() }
