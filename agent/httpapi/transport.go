package httpapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
)

type inProcessKey struct{}

func isInProcess(ctx context.Context) bool {
	ok, _ := ctx.Value(inProcessKey{}).(bool)
	return ok
}

// Transport returns a RoundTripper that serves requests with this handler in
// process, as requests of the agent itself: they may do what the RPC port may,
// and the restrictions of the HTTP port do not concern them. The host of the
// URL is ignored.
//
// An answer streams as it is written, and the request's context ends the
// handler's. As with any RoundTripper, the caller closes the answer's body.
func (h *Handler) Transport() http.RoundTripper {
	return &inProcess{handler: h, wg: &h.inProcess, trusted: true}
}

// Wait returns when no request of [Handler.Transport] is being served. It is
// for the end: the contexts of the requests have been cancelled by then.
func (h *Handler) Wait() { h.inProcess.Wait() }

// inProcess is an [http.RoundTripper] that calls a handler.
type inProcess struct {
	handler http.Handler
	wg      *sync.WaitGroup
	// trusted marks the requests as the agent's own.
	trusted bool
}

// RoundTrip implements [http.RoundTripper].
func (t *inProcess) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		closeBody(r.Body)
		return nil, err
	}
	ctx, cancel := context.WithCancel(r.Context())
	if t.trusted {
		ctx = context.WithValue(ctx, inProcessKey{}, true)
	}
	in := r.Clone(ctx)
	in.RequestURI = r.URL.RequestURI()
	in.Proto, in.ProtoMajor, in.ProtoMinor = "HTTP/1.1", 1, 1
	if in.Host == "" {
		in.Host = r.URL.Host
	}
	if in.Body == nil {
		in.Body = http.NoBody
	}
	body, pw := io.Pipe()
	w := &pipeWriter{header: http.Header{}, body: pw, begun: make(chan struct{})}
	t.wg.Go(func() {
		defer cancel()
		defer closeBody(in.Body)
		serveInto(t.handler, w, in)
	})
	select {
	case <-w.begun:
	case <-r.Context().Done():
		_ = body.CloseWithError(r.Context().Err()) // frees the handler, if it writes
		return nil, r.Context().Err()
	}
	if w.code == 0 {
		_ = body.Close()
		if err := r.Context().Err(); err != nil {
			return nil, err
		}
		return nil, errAborted
	}
	return &http.Response{
		Status:        fmt.Sprintf("%d %s", w.code, http.StatusText(w.code)),
		StatusCode:    w.code,
		Proto:         in.Proto,
		ProtoMajor:    in.ProtoMajor,
		ProtoMinor:    in.ProtoMinor,
		Header:        w.sent,
		Body:          &pipeBody{PipeReader: body, cancel: cancel, stop: context.AfterFunc(r.Context(), func() { _ = pw.CloseWithError(r.Context().Err()) })},
		ContentLength: -1,
		Request:       r,
	}, nil
}

func closeBody(b io.Closer) {
	if b != nil {
		_ = b.Close()
	}
}

// errAborted is what a caller reads when the handler broke off.
var errAborted = errors.New("httpapi: the answer was broken off")

// serveInto calls the handler and ends the answer.
func serveInto(h http.Handler, w *pipeWriter, r *http.Request) {
	defer func() {
		// The one panic that is a message and no fault, as in net/http.
		switch v := recover(); v {
		case nil:
			w.WriteHeader(http.StatusOK)
			_ = w.body.Close()
		case http.ErrAbortHandler:
			w.once.Do(func() { close(w.begun) })
			_ = w.body.CloseWithError(errAborted)
		default:
			panic(v)
		}
	}()
	h.ServeHTTP(w, r)
}

// pipeWriter is the handler's side of an answer in process. Only the handler's
// goroutine uses it until begun is closed.
type pipeWriter struct {
	header http.Header
	body   *io.PipeWriter
	once   sync.Once
	begun  chan struct{} // closed when the answer has begun, or never will
	code   int           // 0 if it never will
	sent   http.Header
}

func (w *pipeWriter) Header() http.Header { return w.header }

func (w *pipeWriter) WriteHeader(code int) {
	w.once.Do(func() {
		w.code, w.sent = code, w.header.Clone()
		close(w.begun)
	})
}

func (w *pipeWriter) Write(b []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	if len(b) == 0 {
		return 0, nil
	}
	return w.body.Write(b)
}

// Flush implements [http.Flusher]: nothing is held back.
func (w *pipeWriter) Flush() { w.WriteHeader(http.StatusOK) }

// pipeBody is the caller's side of an answer in process.
type pipeBody struct {
	*io.PipeReader
	cancel context.CancelFunc
	stop   func() bool
}

// Close ends the handler if it is still writing.
func (b *pipeBody) Close() error {
	b.stop()
	err := b.PipeReader.Close()
	b.cancel()
	return err
}
