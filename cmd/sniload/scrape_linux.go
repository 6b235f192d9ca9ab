package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

// scrapeEvery is how often a forwarder is asked about itself while it is measured.
// It is more often than is usual: a load takes little more than a second.
const scrapeEvery = time.Second

// scraper asks a forwarder about itself.
type scraper struct {
	addr   string
	client http.Client
}

// startScraping asks until stop is called, which tells how often that went wrong. It
// does nothing where addr is "".
func startScraping(ctx context.Context, addr string) (stop func() (failed int, err error)) {
	if addr == "" {
		return func() (int, error) { return 0, nil }
	}
	s := scraper{addr, http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{}}}
	ctx, cancel := context.WithCancel(ctx)
	var (
		wg     sync.WaitGroup
		failed int
		first  error
	)
	wg.Go(func() {
		defer s.client.CloseIdleConnections()
		for ctx.Err() == nil {
			next := time.Now().Add(scrapeEvery)
			if err := s.scrape(ctx); err != nil && ctx.Err() == nil {
				failed++
				first = errors.Join(first, err)
			}
			settle(ctx, time.Until(next))
		}
	})
	return func() (int, error) {
		cancel()
		wg.Wait()
		return failed, first
	}
}

func (s *scraper) scrape(ctx context.Context) error {
	for _, path := range []string{"/metrics", "/status", "/connections?limit=100"} {
		if err := s.get(ctx, path); err != nil {
			return fmt.Errorf("ask for %s: %w", path, err)
		}
	}
	return nil
}

func (s *scraper) get(ctx context.Context, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.addr+path, http.NoBody)
	if err != nil {
		return err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}
