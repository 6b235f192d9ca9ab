package cluster

import (
	"net/netip"
	"runtime"
	"strconv"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/serf/serf"
)

// TestAllowedNetworks keeps members out whose address is not in an allowed
// network.
func TestAllowedNetworks(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("loopback has one address")
	}
	for allowed, joins := range map[string]int{"127.0.0.0/8": 1, "127.0.0.1/32": 0} {
		t.Run(allowed, func(t *testing.T) {
			open := func(name, ip string, allowed ...netip.Prefix) *pool {
				c := &Config{
					NodeName: name, Datacenter: "dc1", BindLAN: ip, AdvertiseLAN: ip, Dev: true,
					AllowedLAN: allowed, Logger: hclog.NewNullLogger(),
				}
				p, err := openPool(t.Context(), c, false, c.tags(false, 0), func(serf.MemberEvent) {})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(p.close)
				return p
			}
			a, b := open("a", "127.0.0.1", netip.MustParsePrefix(allowed)), open("b", "127.0.0.2")
			// The members are exchanged before join returns.
			if _, err := a.join([]string{b.LocalMember().Addr.String() + ":" + strconv.Itoa(b.port())}); err != nil {
				t.Fatal(err)
			}
			if got := len(a.Members()); got != 1+joins {
				t.Errorf("%d members, want %d", got, 1+joins)
			}
		})
	}
}
