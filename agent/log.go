package agent

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/sluicemesh/sluice/agent/config"
)

// openLog makes the logger of the configuration.
func (a *Agent) openLog(rt *config.Runtime) error {
	out := a.opts.Log
	if out == nil {
		out = os.Stdout
	}
	if rt.Log.File != "" {
		f, err := openLogFile(rt.Log)
		if err != nil {
			return fmt.Errorf("open log_file: %w", err)
		}
		a.logFile = f
		out = io.MultiWriter(out, f)
	}
	a.log = hclog.NewInterceptLogger(&hclog.LoggerOptions{
		Name: "agent", Level: hclog.LevelFromString(rt.Log.Level), JSONFormat: rt.Log.JSON, Output: out,
		TimeFormat: "2006-01-02T15:04:05.000Z07:00",
	})
	return nil
}

// logFile is a file that is begun anew when it is too large or too old. A path
// that is a directory gets the program's name.
type logFile struct {
	cfg            config.Log
	dir, stem, ext string

	// mu guards what follows.
	mu     sync.Mutex
	f      *os.File
	size   int
	opened time.Time
}

func openLogFile(cfg config.Log) (*logFile, error) {
	dir, name := filepath.Split(cfg.File)
	if name == "" {
		name = "sluice.log"
	}
	ext := filepath.Ext(name)
	if ext == "" {
		ext = ".log"
	}
	l := &logFile{cfg: cfg, dir: dir, stem: strings.TrimSuffix(name, filepath.Ext(name)), ext: ext}
	return l, l.open()
}

func (l *logFile) open() error {
	now := time.Now()
	f, err := os.OpenFile(filepath.Join(l.dir, fmt.Sprintf("%s-%d%s", l.stem, now.UnixNano(), l.ext)), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640) //nolint:gosec // a log may be read by its group
	if err != nil {
		return err
	}
	l.f, l.size, l.opened = f, 0, now
	return nil
}

// Write implements [io.Writer].
func (l *logFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cfg.RotateBytes > 0 && l.size+len(b) > l.cfg.RotateBytes && l.size > 0 ||
		l.cfg.RotateDuration > 0 && time.Since(l.opened) >= l.cfg.RotateDuration {
		if err := l.rotate(); err != nil {
			return 0, err
		}
	}
	n, err := l.f.Write(b)
	l.size += n
	return n, err
}

func (l *logFile) rotate() error {
	if err := l.f.Close(); err != nil {
		return err
	}
	if err := l.open(); err != nil {
		return err
	}
	if l.cfg.RotateMaxFiles == 0 {
		return nil
	}
	old, err := filepath.Glob(filepath.Join(l.dir, l.stem+"-*"+l.ext))
	if err != nil {
		return err
	}
	slices.Sort(old) // by age: the names are times
	old = old[:max(0, len(old)-1-max(0, l.cfg.RotateMaxFiles))]
	for _, f := range old {
		if err := os.Remove(f); err != nil {
			return err
		}
	}
	return nil
}

// Close closes the file.
func (l *logFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.f.Close()
}
