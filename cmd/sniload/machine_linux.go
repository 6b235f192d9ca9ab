package main

import (
	"os"
	"regexp"
	"runtime"
	"strings"
	"time"
)

// machineInfo describes where a report was made, without naming it.
func machineInfo() info {
	i := info{CPUs: runtime.NumCPU(), Go: runtime.Version(), Date: time.Now().UTC().Format(time.DateOnly)}
	b, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			i.Model = strings.TrimSpace(v)
			break
		}
	}
	b, _ = os.ReadFile("/proc/sys/kernel/osrelease")
	i.Kernel = regexp.MustCompile(`^\d+(\.\d+)*`).FindString(string(b))
	b, _ = os.ReadFile("/proc/meminfo")
	i.Memory = field(b, "MemTotal:") << 10
	return i
}
