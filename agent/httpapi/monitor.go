package httpapi

import (
	"bytes"
	"fmt"
	"net/http"
	"sync/atomic"

	"github.com/hashicorp/go-hclog"
)

// agentMonitor streams the log until the client goes away or the agent stops.
func (c *call) agentMonitor() (any, error) {
	level := hclog.Info
	if name := c.query.Get("loglevel"); name != "" {
		if level = hclog.LevelFromString(name); level == hclog.NoLevel {
			return nil, bad("Unknown log level: %s", name)
		}
	}
	log, ok := c.h.cfg.Logger.(hclog.InterceptLogger)
	if !ok {
		return nil, status(http.StatusNotFound, "this agent's log cannot be streamed")
	}
	c.w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if c.r.Method == http.MethodHead {
		return raw{contentType: "text/plain; charset=utf-8"}, nil
	}
	lines := &logLines{ch: make(chan []byte, logLinesKept)}
	sink := hclog.NewSinkAdapter(&hclog.LoggerOptions{
		Level: level, Output: lines, JSONFormat: c.query.Has("logjson"), TimeFormat: "2006-01-02T15:04:05.000Z07:00",
	})
	log.RegisterSink(sink)
	defer log.DeregisterSink(sink)
	flush := http.NewResponseController(c.w)
	c.w.WriteHeader(http.StatusOK)
	_ = flush.Flush() // not every writer can
	for {
		select {
		case <-c.ctx().Done():
			return written{}, nil
		case line := <-lines.ch:
			if n := lines.dropped.Swap(0); n > 0 && !c.query.Has("logjson") {
				line = append(fmt.Appendf(nil, "[INFO] %d lines dropped: they came faster than they were read\n", n), line...)
			}
			if _, err := c.w.Write(line); err != nil {
				return written{}, nil //nolint:nilerr // the client has gone
			}
			_ = flush.Flush()
		}
	}
}

// logLinesKept is how many lines wait for a client before others are dropped.
const logLinesKept = 512

// logLines takes lines of the log and never makes the one who logs wait.
type logLines struct {
	ch      chan []byte
	dropped atomic.Int64
}

// Write implements [io.Writer]; the logger calls it once for each line.
func (l *logLines) Write(b []byte) (int, error) {
	select {
	case l.ch <- bytes.Clone(b):
	default:
		l.dropped.Add(1)
	}
	return len(b), nil
}
