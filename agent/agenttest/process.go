package agenttest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// build makes the binary once for all tests of this process.
var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "sluice-test-")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(dir, "sluice")
	out, err := exec.Command("go", "build", "-o", bin, "github.com/sluicemesh/sluice/cmd/sluice").CombinedOutput()
	if err != nil {
		return "", errors.Join(fmt.Errorf("go build: %w: %s", err, out), os.RemoveAll(dir))
	}
	built = dir
	return bin, nil
})

// built is the directory of the binary, "" before there is one.
var built string

// Binary returns the path of the real binary, which the first call builds. Its
// package's TestMain must use [Main].
func Binary(t testing.TB) string {
	t.Helper()
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

// Main runs the tests and removes what they share. It returns the exit code.
func Main(m *testing.M) int {
	code := m.Run()
	if built != "" {
		if err := os.RemoveAll(built); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return max(code, 1)
		}
	}
	return code
}

// StartProcess runs an agent as a process of the real binary, behind the command
// given (such as "ip netns exec NAME"); the end of the test kills it.
func StartProcess(t testing.TB, c Config, behind ...string) *Node {
	t.Helper()
	n := write(t, c)
	log := &output{w: t.Output(), name: c.Name}
	n.log = log
	args := append(behind, Binary(t), "agent", "-config-dir", n.configDir())
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill() // it may have ended already
		_ = cmd.Wait()         // by the signal
		log.end()
	})
	t.Cleanup(n.stop)
	return n
}
