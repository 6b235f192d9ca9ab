package agent

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"strconv"
	"sync"

	"github.com/sluicemesh/sluice/agent/config"
)

// boundListener is an address the API is served at.
type boundListener struct {
	net.Listener
	tls *tls.Config // nil in clear text
}

// bindHTTP opens every listener of the API, or none.
func bindHTTP(rt *config.Runtime) (ls []boundListener, err error) {
	defer func() {
		if err != nil {
			for _, l := range ls {
				_ = l.Close() // it is the other listener's error that counts
			}
			ls = nil
		}
	}()
	for _, l := range rt.Network.HTTP {
		ln, err := bind(l, rt)
		if err != nil {
			return ls, fmt.Errorf("open http listener: %w", err)
		}
		ls = append(ls, boundListener{Listener: ln})
	}
	if len(rt.Network.HTTPS) == 0 {
		return ls, nil
	}
	tc, err := httpsTLS(rt.TLS.HTTPS)
	if err != nil {
		return ls, err
	}
	for _, l := range rt.Network.HTTPS {
		ln, err := bind(l, rt)
		if err != nil {
			return ls, fmt.Errorf("open https listener: %w", err)
		}
		ls = append(ls, boundListener{Listener: ln, tls: tc})
	}
	return ls, nil
}

func bind(l config.Listen, rt *config.Runtime) (net.Listener, error) {
	if l.Network == "unix" {
		if fi, err := os.Lstat(l.Address); err == nil && fi.Mode().Type() == fs.ModeSocket {
			if err := os.Remove(l.Address); err != nil { // one that another process left behind
				return nil, err
			}
		}
	}
	ln, err := net.Listen(l.Network, l.Address) //nolint:noctx // binding does not block
	if err != nil {
		return nil, err
	}
	if l.Network == "unix" {
		if err := permit(l.Address, rt.Network.UnixSocket); err != nil {
			return nil, errors.Join(err, ln.Close())
		}
	}
	if n := rt.Limits.HTTPMaxConns; n > 0 && l.Network != "unix" {
		return &limitListener{Listener: ln, limit: n, open: map[string]int{}}, nil
	}
	return ln, nil
}

// permit gives a socket to those who may use it, by name or number. The owner
// comes first: a change of it may take bits of the mode away.
func permit(path string, to config.UnixSocket) error {
	uid, gid := -1, -1
	var err error
	if to.User != "" {
		if uid, err = strconv.Atoi(to.User); err != nil {
			u, err := user.Lookup(to.User)
			if err != nil {
				return fmt.Errorf("unix_sockets.user: %w", err)
			}
			if uid, err = strconv.Atoi(u.Uid); err != nil {
				return fmt.Errorf("unix_sockets.user: %w", err)
			}
		}
	}
	if to.Group != "" {
		if gid, err = strconv.Atoi(to.Group); err != nil {
			g, err := user.LookupGroup(to.Group)
			if err != nil {
				return fmt.Errorf("unix_sockets.group: %w", err)
			}
			if gid, err = strconv.Atoi(g.Gid); err != nil {
				return fmt.Errorf("unix_sockets.group: %w", err)
			}
		}
	}
	if uid >= 0 || gid >= 0 {
		if err := os.Chown(path, uid, gid); err != nil {
			return fmt.Errorf("unix_sockets: %w", err)
		}
	}
	if to.Mode != "" {
		mode, err := strconv.ParseUint(to.Mode, 8, 32)
		if err == nil {
			err = os.Chmod(path, fs.FileMode(mode))
		}
		if err != nil {
			return fmt.Errorf("unix_sockets.mode %q: %w", to.Mode, err)
		}
	}
	return nil
}

// limitListener closes the connections of a client that has too many.
type limitListener struct {
	net.Listener
	limit int

	// mu guards open, the connections by client address.
	mu   sync.Mutex
	open map[string]int
}

// Accept implements [net.Listener].
func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		host, _, err := net.SplitHostPort(c.RemoteAddr().String())
		if err != nil {
			return c, nil
		}
		l.mu.Lock()
		ok := l.open[host] < l.limit
		if ok {
			l.open[host]++
		}
		l.mu.Unlock()
		if ok {
			return &limitedConn{Conn: c, l: l, host: host}, nil
		}
		_ = c.Close() // it is over its limit
	}
}

// limitedConn counts as open until it is closed.
type limitedConn struct {
	net.Conn
	l    *limitListener
	host string
	once sync.Once
}

// Close implements [net.Conn].
func (c *limitedConn) Close() error {
	c.once.Do(func() {
		c.l.mu.Lock()
		defer c.l.mu.Unlock()
		if c.l.open[c.host]--; c.l.open[c.host] <= 0 {
			delete(c.l.open, c.host)
		}
	})
	return c.Conn.Close()
}
