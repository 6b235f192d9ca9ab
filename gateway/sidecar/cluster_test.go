package sidecar

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
)

func TestFailuresOfAnEndpoint(t *testing.T) {
	c := newCluster(&gateway.Cluster{Name: "api", Endpoints: []gateway.Endpoint{{Address: "10.0.0.1", Port: 443}}}, nil)
	tls := func(err error) error { return fmt.Errorf("%w with api: %w", errHandshake, err) }
	for _, err := range []error{
		syscall.ECONNREFUSED, context.DeadlineExceeded,
		tls(io.EOF), tls(syscall.ECONNRESET), tls(os.ErrDeadlineExceeded), tls(errors.New("bad certificate")),
	} {
		c.endpoints[0].fail(err)
	}
	got := c.status().Endpoints[0]
	if got.EjectedUntil.IsZero() {
		t.Error("it is still used")
	}
	got.EjectedUntil = gateway.EndpointStatus{}.EjectedUntil
	want := gateway.EndpointStatus{
		Address: "10.0.0.1:443", Failed: 6, LastError: tls(errors.New("bad certificate")).Error(),
		Failures: map[string]uint64{
			gateway.FailRefused: 1, gateway.FailTimeout: 1, gateway.FailClosed: 1, gateway.FailReset: 1,
			gateway.FailNoAnswer: 1, gateway.FailHandshake: 1,
		},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
