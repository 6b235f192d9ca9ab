package agent_test

import (
	"os"
	"testing"

	"github.com/sluicemesh/sluice/agent/agenttest"
)

func TestMain(m *testing.M) { os.Exit(agenttest.Main(m)) }
