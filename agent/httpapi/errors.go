package httpapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/sluicemesh/sluice/agent/catalog"
	"github.com/sluicemesh/sluice/agent/state"
)

// statusError is an answer other than 200 that a handler decided on.
type statusError struct {
	code int
	text string
	// reason is the X-Consul-Reason header, where there is one.
	reason string
}

func (e *statusError) Error() string { return e.text }

// status returns an answer with a code and a text of its own.
func status(code int, format string, args ...any) error {
	if len(args) == 0 {
		return &statusError{code: code, text: format}
	}
	return &statusError{code: code, text: fmt.Sprintf(format, args...)}
}

// bad returns an answer 400.
func bad(format string, args ...any) error {
	return status(http.StatusBadRequest, format, args...)
}

// errPassedOn says that another agent's answer has been written.
var errPassedOn = errors.New("passed on")

// Texts that have no home elsewhere.
const (
	textNotAPI       = "Invalid URL path: if attempting to use the HTTP API, ensure the path starts with '/v1/'"
	textUnknownPath  = "Invalid URL path: not a recognized HTTP API endpoint"
	textNoUI         = "Consul Agent: UI disabled. To enable, set ui_config.enabled=true in the agent configuration and restart."
	textBlocked      = "Endpoint is blocked by agent configuration"
	textRestricted   = "Access is restricted"
	textNoConnect    = "Connect must be enabled in order to use this endpoint"
	textACLDisabled  = "ACL support disabled"
	textUnknownID    = `Unknown service ID %q. Ensure that the service ID is passed, not the service name.`
	textUnknownCheck = `Unknown check ID %q. Ensure that the check ID is passed, not the check name.`
	textNamespaces   = "Namespaces are a Consul Enterprise feature"
	textPartitions   = "Partitions are a Consul Enterprise feature"
	textTooLarge     = "Request body too large, max size: %d bytes"
	textTooManyHops  = "Request was passed on too often: the servers do not agree on where it belongs"
)

// errorRule is a row of the table from errors to answers.
type errorRule struct {
	match func(error) bool
	code  int
	text  string // "" is the error's own
	// retry says that the request was not executed, and may succeed when it is
	// made again: there was no leader, or another one.
	retry bool
}

// errorRules is the one place that turns an error into a code and a text; the
// first row that matches counts. Clients match on the texts.
var errorRules = []errorRule{
	{match: is(state.ErrNotLeader), code: 500, text: state.ErrNoLeader.Error(), retry: true},
	{match: is(state.ErrNoLeader), code: 500, text: state.ErrNoLeader.Error(), retry: true},
	{match: is(state.ErrNoServers), code: 500, text: state.ErrNoServers.Error()},
	{match: is(state.ErrNoPath), code: 500, text: state.ErrNoPath.Error()},
	{match: is(state.ErrNoRemoteServer), code: 500, text: state.ErrNoRemoteServer.Error()},
	{match: contains("Permission denied"), code: 403},
	{match: contains("ACL not found"), code: 403},
	{match: contains("RPC rate limit exceeded"), code: 429},
	{match: equals("Rate limit reached, try again later"), code: 429},
	{match: is(catalog.ErrPending), code: 500},
	{match: is(ErrNoProxy), code: 404},
	{match: is(ErrNotDraining), code: 404},
	{match: is(ErrDraining), code: 409},
	{match: is(ErrNoDrain), code: 400},
	{match: is(context.DeadlineExceeded), code: 500, text: "context deadline exceeded"},
	{match: func(error) bool { return true }, code: 500},
}

func is(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

func contains(text string) func(error) bool {
	return func(err error) bool { return strings.Contains(err.Error(), text) }
}

func equals(text string) func(error) bool {
	return func(err error) bool { return err.Error() == text }
}

// answerTo returns the code and text that err is answered with.
func answerTo(err error) (code int, text string, retry bool) {
	if e, ok := errors.AsType[*statusError](err); ok {
		return e.code, e.text, false
	}
	for _, rule := range errorRules {
		if !rule.match(err) {
			continue
		}
		text = rule.text
		if text == "" {
			text = err.Error()
		}
		return rule.code, text, rule.retry
	}
	panic("unreachable: the last rule matches every error")
}
