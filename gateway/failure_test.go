package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/gateway"
)

func TestFailures(t *testing.T) {
	var f gateway.Failures
	if got := f.Map(); got != nil {
		t.Errorf("before the first: %v", got)
	}
	for _, err := range []error{
		fmt.Errorf("dial: %w", &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}),
		syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ETIMEDOUT,
		context.DeadlineExceeded, os.ErrDeadlineExceeded, errors.New("odd"),
	} {
		f.Add(gateway.FailReason(err))
	}
	f.Add("a reason of nobody's")
	want := map[string]uint64{gateway.FailRefused: 2, gateway.FailUnreachable: 2, gateway.FailTimeout: 3, gateway.FailOther: 2}
	if d := cmp.Diff(want, f.Map()); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
