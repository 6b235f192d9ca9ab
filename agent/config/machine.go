package config

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/hashicorp/go-sockaddr/template"
)

type realMachine struct{}

func (realMachine) Hostname() (string, error) { return os.Hostname() }
func (realMachine) PrivateIPv4() (string, error) {
	return template.Parse(`{{ GetPrivateInterfaces | include "type" "ipv4" | join "address" " " }}`)
}
func (realMachine) PublicIPv6() (string, error) {
	return template.Parse(`{{ GetPublicInterfaces | include "type" "ipv6" | join "address" " " }}`)
}
func (realMachine) Expand(t string) (string, error) { return template.Parse(t) }

var uuid = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// EnsureID returns the node's ID: the configured one, else the one that the data
// directory has, else a new one. It is kept in the data directory, which must
// exist, as it is not in dev mode.
func (n Node) EnsureID() (string, error) {
	if n.DataDir == "" {
		if n.ID != "" {
			return n.ID, nil
		}
		return newUUID(), nil
	}
	path := filepath.Join(n.DataDir, "node-id")
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read node ID: %w", err)
	}
	kept := strings.ToLower(strings.TrimSpace(string(old)))
	id := n.ID
	switch {
	case id != "" && id == kept:
		return id, nil
	case id == "" && kept != "":
		if !uuid.MatchString(kept) {
			return "", fmt.Errorf("read node ID: %s: specified NodeID is invalid: %q", path, kept)
		}
		return kept, nil
	case id == "":
		id = newUUID()
	}
	if err := os.WriteFile(path, []byte(id), 0o600); err != nil {
		return "", fmt.Errorf("keep node ID: %w", err)
	}
	return id, nil
}

// newUUID returns a random UUID of version 4.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
