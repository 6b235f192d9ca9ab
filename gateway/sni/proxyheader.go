package sni

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/sluicemesh/sluice/gateway"
)

// proxyHeader is what a header of the PROXY protocol (versions 1 and 2 of
// haproxy's proxy-protocol.txt) says of a connection.
type proxyHeader struct {
	size     int            // bytes of the header
	src, dst netip.AddrPort // not valid where the sender speaks for itself
}

// headerState is what parse found.
type headerState int

const (
	headerMore headerState = iota // a header, as far as it goes
	headerNone                    // something else
	headerBad                     // a header, and wrong
	headerDone
)

const (
	// maxProxyHeader bounds a header with everything that is appended to it.
	maxProxyHeader = 4 << 10
	maxProxyV1     = 107 // its line end included

	proxyV1  = "PROXY "
	proxyV2  = "\r\n\r\n\x00\r\nQUIT\n"
	v2Header = 16
)

// parse reads a header at the start of buf. What it finds does not depend on how
// much follows.
func (h *proxyHeader) parse(buf []byte) headerState {
	*h = proxyHeader{}
	switch {
	case begins(buf, proxyV2):
		return h.parseV2(buf)
	case begins(buf, proxyV1):
		return h.parseV1(buf)
	}
	return headerNone
}

// begins is true when buf starts with s, or s with buf.
func begins(buf []byte, s string) bool {
	n := min(len(buf), len(s))
	return string(buf[:n]) == s[:n]
}

func (h *proxyHeader) parseV2(buf []byte) headerState {
	if len(buf) < v2Header {
		// Refuse by the first byte that cannot be right.
		if len(buf) > len(proxyV2) && buf[12]&^1 != 0x20 {
			return headerBad
		}
		return headerMore
	}
	size := int(binary.BigEndian.Uint16(buf[14:]))
	family, transport := buf[13]>>4, buf[13]&15
	if buf[12]&^1 != 0x20 || family > 3 || transport > 2 || v2Header+size > maxProxyHeader {
		return headerBad
	}
	local := buf[12] == 0x20
	var ipLen int
	switch {
	case local:
	case buf[13] == 0x11:
		ipLen = 4
	case buf[13] == 0x21:
		ipLen = 16
	default:
		// Of no kind that we accept: the sender's own address is what there is.
	}
	if ipLen > 0 && size < 2*ipLen+4 {
		return headerBad
	}
	if len(buf) < v2Header+size {
		return headerMore
	}
	h.size = v2Header + size
	if ipLen > 0 {
		a := buf[v2Header:]
		src, _ := netip.AddrFromSlice(a[:ipLen])
		dst, _ := netip.AddrFromSlice(a[ipLen : 2*ipLen])
		ports := a[2*ipLen:]
		h.src = netip.AddrPortFrom(src.Unmap(), binary.BigEndian.Uint16(ports))
		h.dst = netip.AddrPortFrom(dst.Unmap(), binary.BigEndian.Uint16(ports[2:]))
	}
	return headerDone
}

func (h *proxyHeader) parseV1(buf []byte) headerState {
	line := buf[:min(len(buf), maxProxyV1)]
	end := bytes.IndexByte(line, '\r')
	if end < 0 || end+1 == len(line) {
		if len(line) == maxProxyV1 {
			return headerBad
		}
		return headerMore
	}
	if line[end+1] != '\n' {
		return headerBad
	}
	text := string(line[:end])
	if text == "PROXY UNKNOWN" || strings.HasPrefix(text, "PROXY UNKNOWN ") {
		h.size = end + 2
		return headerDone
	}
	f := strings.Split(text, " ")
	if len(f) != 6 || f[1] != "TCP4" && f[1] != "TCP6" {
		return headerBad
	}
	src, ok1 := v1Address(f[2], f[4], f[1] == "TCP4")
	dst, ok2 := v1Address(f[3], f[5], f[1] == "TCP4")
	if !ok1 || !ok2 {
		return headerBad
	}
	*h = proxyHeader{size: end + 2, src: src, dst: dst}
	return headerDone
}

func v1Address(ip, port string, four bool) (netip.AddrPort, bool) {
	a, err := netip.ParseAddr(ip)
	if err != nil || a.Is4() != four || a.Zone() != "" {
		return netip.AddrPort{}, false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || strconv.FormatUint(n, 10) != port {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), true
}

// appendProxyHeader appends a header of a version, which says that the connection
// is from src to dst.
func appendProxyHeader(b []byte, version gateway.ProxyVersion, src, dst netip.AddrPort) []byte {
	known := src.IsValid() && dst.IsValid()
	four := known && src.Addr().Is4() && dst.Addr().Is4()
	if version == gateway.ProxyV1 {
		if !known {
			return append(b, "PROXY UNKNOWN\r\n"...)
		}
		put := func(a netip.Addr) {
			if a.Is4() && !four {
				a = netip.AddrFrom16(a.As16())
			}
			b = append(a.WithZone("").AppendTo(b), ' ')
		}
		b = append(b, "PROXY TCP6 "...)
		if four {
			b[len(b)-2] = '4'
		}
		put(src.Addr())
		put(dst.Addr())
		b = append(strconv.AppendUint(b, uint64(src.Port()), 10), ' ')
		b = strconv.AppendUint(b, uint64(dst.Port()), 10)
		return append(b, "\r\n"...)
	}
	b = append(b, proxyV2...)
	switch {
	case !known:
		return append(b, 0x20, 0, 0, 0)
	case four:
		s, d := src.Addr().As4(), dst.Addr().As4()
		b = append(append(append(b, 0x21, 0x11, 0, 12), s[:]...), d[:]...)
	default:
		s, d := src.Addr().As16(), dst.Addr().As16()
		b = append(append(append(b, 0x21, 0x21, 0, 36), s[:]...), d[:]...)
	}
	b = binary.BigEndian.AppendUint16(b, src.Port())
	return binary.BigEndian.AppendUint16(b, dst.Port())
}

// trusts says whether a peer's header is believed.
func (t *terms) trusts(peer netip.Addr) bool {
	return slices.ContainsFunc(t.trusted, func(p netip.Prefix) bool { return p.Contains(peer) })
}

// expects says whether a header may come from a peer. A reason is one to refuse
// the connection at once.
func (t *terms) expects(peer netip.Addr) (expect bool, reason, detail string) {
	if t.accept == "" {
		return false, "", ""
	}
	if expect = t.trusts(peer); !expect && t.accept == gateway.ProxyStrict {
		return false, gateway.RefuseProxyHeader, "not from a trusted network"
	}
	return expect, "", ""
}

// header looks for a header of an expected sender at the start of data. more
// says that it has not all come.
func (t *terms) header(data []byte) (h proxyHeader, more bool, reason, detail string) {
	if len(data) == 0 {
		return h, true, "", ""
	}
	switch h.parse(data) {
	case headerMore:
		return h, true, "", ""
	case headerBad:
		return h, false, gateway.RefuseProxyHeader, "malformed"
	case headerNone:
		if t.accept == gateway.ProxyStrict {
			return h, false, gateway.RefuseProxyHeader, "missing"
		}
	}
	return h, false, "", ""
}
