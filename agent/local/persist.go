package local

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/sluicemesh/sluice/acl"
	"github.com/sluicemesh/sluice/agent/catalog"
)

// dir is the part of the data directory that keeps registrations: one file each,
// named by the SHA-256 of the ID, mode 0600, written whole or not at all.
type dir struct {
	services, checks, states string
}

// persistVersion is the form of the files; a reader refuses what is newer.
const persistVersion = 1

type serviceFile struct {
	Version      int
	Service      *api.AgentServiceRegistration
	Token        string `json:",omitempty"`
	SidecarToken string `json:",omitempty"`
	// SidecarPort is the port that was given to a sidecar that named none: it
	// stays the same over a restart.
	SidecarPort int `json:",omitempty"`
}

type checkFile struct {
	Version                            int
	ID, Name, Notes, ServiceID, Status string
	Def                                catalog.CheckDefinition
	Token                              string `json:",omitempty"`
}

type ttlState struct {
	CheckID        string
	Status, Output string
	Expires        time.Time
}

func openDir(data string) (*dir, error) {
	d := &dir{
		services: filepath.Join(data, "services"),
		checks:   filepath.Join(data, "checks"),
		states:   filepath.Join(data, "checks", "state"),
	}
	for _, p := range []string{d.services, d.checks, d.states} {
		if err := os.MkdirAll(p, 0o700); err != nil {
			return nil, fmt.Errorf("open data directory: %w", err)
		}
	}
	return d, nil
}

func fileName(id string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(id))) }

func (d *dir) saveService(def *catalog.Definition, sidecarPort int) error {
	reg := def.AgentServiceRegistration
	return write(filepath.Join(d.services, fileName(def.ID)), serviceFile{
		Version: persistVersion, Service: &reg, SidecarPort: sidecarPort,
		Token: def.Token.Reveal(), SidecarToken: def.SidecarToken.Reveal(),
	})
}

func (d *dir) removeService(id string) error { return remove(filepath.Join(d.services, fileName(id))) }

func (d *dir) saveCheck(c CheckRegistration) error {
	return write(filepath.Join(d.checks, fileName(c.ID)), checkFile{
		Version: persistVersion, ID: c.ID, Name: c.Name, Notes: c.Notes, ServiceID: c.ServiceID, Status: c.Status,
		Def: c.Def, Token: c.Token.Reveal(),
	})
}

func (d *dir) removeCheck(id string) error {
	return errors.Join(remove(filepath.Join(d.checks, fileName(id))), remove(filepath.Join(d.states, fileName(id))))
}

func (d *dir) saveTTLState(id string, s ttlState) error {
	s.CheckID = id
	return write(filepath.Join(d.states, fileName(id)), s)
}

type persistedService struct {
	def         *catalog.Definition
	sidecarPort int
}

// load reads every file. A file that cannot be read is a problem of its own.
func (d *dir) load() (services []persistedService, checks []CheckRegistration, problems []error) {
	problems = append(problems, each(d.services, func(b []byte) error {
		var f serviceFile
		if err := json.Unmarshal(b, &f); err != nil {
			return err
		}
		if f.Version != persistVersion || f.Service == nil {
			return fmt.Errorf("version %d is not one this agent reads (%d)", f.Version, persistVersion)
		}
		services = append(services, persistedService{
			def: &catalog.Definition{
				AgentServiceRegistration: *f.Service, Token: acl.Secret(f.Token), SidecarToken: acl.Secret(f.SidecarToken),
			},
			sidecarPort: f.SidecarPort,
		})
		return nil
	})...)
	problems = append(problems, each(d.checks, func(b []byte) error {
		var f checkFile
		if err := json.Unmarshal(b, &f); err != nil {
			return err
		}
		if f.Version != persistVersion {
			return fmt.Errorf("version %d is not one this agent reads (%d)", f.Version, persistVersion)
		}
		checks = append(checks, CheckRegistration{
			ID: f.ID, Name: f.Name, Notes: f.Notes, ServiceID: f.ServiceID, Status: f.Status, Def: f.Def, Token: acl.Secret(f.Token),
		})
		return nil
	})...)
	return services, checks, problems
}

// loadTTLStates returns the results that have not expired, and deletes the others.
func (d *dir) loadTTLStates(now time.Time) map[string]ttlState {
	states := map[string]ttlState{}
	for _, err := range each(d.states, func(b []byte) error {
		var s ttlState
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
		if now.After(s.Expires) {
			return remove(filepath.Join(d.states, fileName(s.CheckID)))
		}
		states[s.CheckID] = s
		return nil
	}) {
		_ = err // a lost result costs one interval: the check is critical until its next update
	}
	return states
}

// each calls f with the contents of every regular file of a directory.
func each(path string, f func([]byte) error) (problems []error) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return []error{err}
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || strings.HasSuffix(e.Name(), ".tmp") {
			continue
		}
		name := filepath.Join(path, e.Name())
		b, err := os.ReadFile(name)
		if err == nil {
			err = f(b)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", name, err))
		}
	}
	return problems
}

// write replaces a file atomically: a crash leaves the old one or the new one.
func write(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
