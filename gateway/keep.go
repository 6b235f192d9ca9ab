package gateway

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/sluicemesh/sluice/acl"
)

// keepVersion is the format of the files; another one is not read.
const keepVersion = 1

// keepRefresh is how often a file is written again only to say that the table is
// still current.
const keepRefresh = time.Minute

// Keep has the last table of each proxy on disk: the last known good. A file
// holds the private key of the table, so files are 0600 in a directory of 0700.
// Methods may be called from several goroutines, for different proxies at the
// same time.
type Keep struct {
	dir string

	mu    sync.Mutex
	saved map[string]Kept // by proxy ID; what the files hold
}

// Kept is a table that was on disk.
type Kept struct {
	Table *Table
	// DataPlane is the name of the one that had the table.
	DataPlane string
	SavedAt   time.Time
}

// envelope is the form of a file. Key stands beside the table, because a table's
// JSON form has no private keys in it.
type envelope struct {
	Version   int
	SavedAt   time.Time
	DataPlane string `json:",omitempty"`
	Sum       string // SHA-256 of Key and Table
	Key       string `json:",omitempty"`
	Table     json.RawMessage
}

func (e *envelope) sum() string {
	h := sha256.New()
	fmt.Fprintf(h, "%d:%s", len(e.Key), e.Key)
	h.Write(e.Table)
	return hex.EncodeToString(h.Sum(nil))
}

// OpenKeep opens a directory, and makes it where there is none. What an
// interrupted write left behind is removed.
func OpenKeep(dir string) (*Keep, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open kept tables: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*.tmp"))
	if err != nil {
		return nil, fmt.Errorf("open kept tables: %w", err)
	}
	for _, f := range left {
		if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("open kept tables: %w", err)
		}
	}
	return &Keep{dir: dir, saved: make(map[string]Kept)}, nil
}

// path returns the file of a proxy. An ID may hold any character.
func (k *Keep) path(proxy string) string {
	name := url.PathEscape(proxy)
	if len(name) > 200 {
		sum := sha256.Sum256([]byte(proxy))
		name = hex.EncodeToString(sum[:])
	}
	return filepath.Join(k.dir, name+".json")
}

// Save writes a table, unless the file has it already; one that differs only in
// its index and age is written once a minute. The write is atomic: a crash
// leaves the old file or the new one.
func (k *Keep) Save(t *Table, dataPlane string) error {
	now := time.Now()
	k.mu.Lock()
	old, ok := k.saved[t.Proxy]
	k.mu.Unlock()
	if ok && old.DataPlane == dataPlane && now.Sub(old.SavedAt) < keepRefresh && sameContent(old.Table, t) {
		return nil
	}
	raw, err := json.Marshal(t)
	if err != nil {
		return fmt.Errorf("keep table of %q: %w", t.Proxy, err)
	}
	e := envelope{Version: keepVersion, SavedAt: now.UTC(), DataPlane: dataPlane, Table: raw}
	if t.Identity != nil {
		e.Key = t.Identity.PrivateKeyPEM.Reveal()
	}
	e.Sum = e.sum()
	data, err := json.Marshal(&e)
	if err != nil {
		return fmt.Errorf("keep table of %q: %w", t.Proxy, err)
	}
	if err := writeAtomic(k.path(t.Proxy), data); err != nil {
		return fmt.Errorf("keep table of %q: %w", t.Proxy, err)
	}
	k.mu.Lock()
	k.saved[t.Proxy] = Kept{Table: t, DataPlane: dataPlane, SavedAt: now}
	k.mu.Unlock()
	return nil
}

// Load reads all tables, by proxy ID. A file that cannot be used is skipped; the
// error names each of them, and what is returned beside it is good.
func (k *Keep) Load() (map[string]Kept, error) {
	files, err := filepath.Glob(filepath.Join(k.dir, "*.json"))
	if err != nil {
		return nil, fmt.Errorf("load kept tables: %w", err)
	}
	out := make(map[string]Kept, len(files))
	var faults []error
	for _, f := range files {
		kept, err := k.read(f)
		if err != nil {
			faults = append(faults, fmt.Errorf("load kept table %s: %w", filepath.Base(f), err))
			continue
		}
		out[kept.Table.Proxy] = kept
	}
	return out, errors.Join(faults...)
}

func (k *Keep) read(file string) (Kept, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return Kept{}, err
	}
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return Kept{}, err
	}
	if e.Version != keepVersion {
		return Kept{}, fmt.Errorf("its format is %d, not %d", e.Version, keepVersion)
	}
	if e.Sum != e.sum() {
		return Kept{}, errors.New("its checksum is wrong")
	}
	t := new(Table)
	if err := json.Unmarshal(e.Table, t); err != nil {
		return Kept{}, err
	}
	if t.Identity != nil {
		t.Identity.PrivateKeyPEM = acl.Secret(e.Key)
	}
	if err := t.Check(); err != nil {
		return Kept{}, err
	}
	if k.path(t.Proxy) != file {
		return Kept{}, fmt.Errorf("it holds the table of another proxy, %q", t.Proxy)
	}
	return Kept{Table: t, DataPlane: e.DataPlane, SavedAt: e.SavedAt}, nil
}

// Delete removes the table of a proxy; none is no error.
func (k *Keep) Delete(proxy string) error {
	k.mu.Lock()
	delete(k.saved, proxy)
	k.mu.Unlock()
	if err := os.Remove(k.path(proxy)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete kept table of %q: %w", proxy, err)
	}
	return nil
}

// sameContent says that two tables differ at most in index and age.
func sameContent(a, b *Table) bool {
	x, y := *a, *b
	x.Index, x.AsOf = y.Index, y.AsOf // copies, so the tables stay as they are
	return reflect.DeepEqual(&x, &y)
}

func writeAtomic(path string, data []byte) (err error) {
	// CreateTemp makes files of mode 0600.
	f, err := os.CreateTemp(filepath.Dir(path), strings.TrimSuffix(filepath.Base(path), ".json")+".*.tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// Best effort: the first error is the one to tell, and OpenKeep removes
			// what is left.
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	// The directory too, so that the new name outlives a power cut.
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
