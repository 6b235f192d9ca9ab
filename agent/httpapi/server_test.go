package httpapi

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/hashicorp/consul/api"
)

// TestOverARealServer makes sure that what holds in process holds over TCP.
func TestOverARealServer(t *testing.T) {
	s := seeded(t)
	srv := httptest.NewUnstartedServer(nil)
	srv.Config = s.Server()
	// The handler tells when it has begun, and when it has ended.
	began, ended := make(chan struct{}, 1), make(chan struct{}, 1)
	srv.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("index") {
			began <- struct{}{}
			defer func() { ended <- struct{}{} }()
		}
		s.ServeHTTP(w, r)
	})
	srv.Start()
	defer srv.Close()
	client, err := api.NewClient(&api.Config{Address: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	entries, meta, err := client.Health().Service("web", "", false, nil)
	if err != nil || len(entries) != 2 || meta.LastIndex == 0 {
		t.Fatalf("Service = %d entries, %+v, %v", len(entries), meta, err)
	}
	resp, err := http.Head(srv.URL + "/v1/status/leader") //nolint:noctx // a test's own server
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != 200 || resp.ContentLength != 15 {
		t.Errorf("HEAD = %d, length %d", resp.StatusCode, resp.ContentLength)
	}

	ctx, cancel := context.WithCancel(t.Context())
	failed := make(chan error)
	go func() {
		_, _, err := client.Catalog().Nodes((&api.QueryOptions{WaitIndex: 999}).WithContext(ctx))
		failed <- err
	}()
	<-began
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled query = %v", err)
	}
	<-ended

	// An agent that stops breaks off, and does not answer with nothing. A client
	// with a connection of its own: on a used one it would ask again.
	fresh := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	go func() {
		resp, err := fresh.Get(srv.URL + "/v1/catalog/nodes?index=999") //nolint:noctx // a test's own server
		if err == nil {
			_, err = io.ReadAll(resp.Body)
			_ = resp.Body.Close()
		}
		failed <- err
	}()
	<-began
	srv.CloseClientConnections()
	if err := <-failed; err == nil {
		t.Error("a query that was cut off read as answered")
	}
	<-ended
}
