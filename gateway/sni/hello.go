package sni

import (
	"github.com/sluicemesh/sluice/gateway"
)

const (
	recordHeader    = 5
	recordHandshake = 22
	maxRecord       = 1 << 14 // RFC 8446 5.1: plaintext of one record

	msgHeader      = 4
	msgClientHello = 1

	extServerName = 0
	extALPN       = 16

	maxName = 255
)

// helloScan follows the records of a ClientHello as bytes come in. It looks at
// every byte once, so that a hello in segments of one byte costs no more than
// one in a single segment. The zero value is at the start of a connection.
type helloScan struct {
	pos    int32  // bytes looked at
	recEnd int32  // where the current record ends; equal to pos between records
	msg    int32  // bytes of the handshake message seen
	need   int32  // bytes the message has, its header included; 0 while unknown
	head   uint32 // the message header as far as it was seen
	recs   int32  // records begun
}

// feed looks at buf, all the bytes of the connection so far, of which limit may
// be read. It returns true when the message is complete, or a reason to refuse.
func (s *helloScan) feed(buf []byte, limit int) (done bool, reason string) {
	n := int32(len(buf))
	for {
		if s.pos == s.recEnd {
			h := buf[s.pos:]
			// Refuse by the first byte that cannot be right: whoever speaks another
			// protocol may be waiting for our answer. The version of a record says
			// nothing (RFC 8446 5.1), but one that TLS will never reach tells of
			// something else; crypto/tls draws the line at the same place.
			if len(h) > 0 && h[0] != recordHandshake || len(h) > 1 && h[1] >= 0x10 {
				return false, gateway.RefuseNotTLS
			}
			if len(h) < recordHeader {
				break
			}
			size := int32(h[3])<<8 | int32(h[4])
			if size == 0 || size > maxRecord {
				return false, gateway.RefuseNotTLS
			}
			s.recs++
			s.pos += recordHeader
			s.recEnd = s.pos + size
		}
		avail := min(s.recEnd, n) - s.pos
		if avail <= 0 {
			break
		}
		for s.msg < msgHeader && avail > 0 {
			s.head = s.head<<8 | uint32(buf[s.pos])
			s.pos++
			s.msg++
			avail--
			if s.msg == 1 && s.head != msgClientHello {
				return false, gateway.RefuseNotTLS
			}
			if s.msg == msgHeader {
				s.need = msgHeader + int32(s.head&0xffffff)
				if int(s.need)+recordHeader > limit {
					return false, gateway.RefuseHelloTooLarge
				}
			}
		}
		if s.need != 0 {
			take := min(avail, s.need-s.msg)
			s.pos += take
			s.msg += take
			if s.msg == s.need {
				return true, ""
			}
		}
	}
	if len(buf) >= limit {
		return false, gateway.RefuseHelloTooLarge
	}
	return false, ""
}

// more says whether buf has bytes behind the complete hello.
func (s *helloScan) more(buf []byte) bool { return int(s.pos) < len(buf) }

// message returns the complete handshake message in buf without its header. A
// message in one record is returned in place; one in several is put together in
// scratch, which must hold as many bytes as buf.
func (s *helloScan) message(buf, scratch []byte) []byte {
	if s.recs == 1 {
		return buf[recordHeader+msgHeader : recordHeader+int(s.need)]
	}
	out := scratch[:0]
	for len(out) < int(s.need) {
		size := int(buf[3])<<8 | int(buf[4])
		rec := buf[recordHeader:]
		rec = rec[:min(size, len(rec), int(s.need)-len(out))]
		out = append(out, rec...)
		if len(out) < int(s.need) {
			buf = buf[recordHeader+size:]
		}
	}
	return out[msgHeader:]
}

// hello is what a ClientHello asks for. It is reused from one connection to the
// next and allocates nothing.
type hello struct {
	nameBuf [maxName + 1]byte
	nameLen int
	// alpn is the protocol list as sent (each with one byte of length before it);
	// it points into the bytes that were parsed.
	alpn []byte
}

// name is the server name, lower-case and without a trailing dot. It is valid
// until the next parse.
func (h *hello) name() []byte { return h.nameBuf[:h.nameLen] }

// protocols copies the ALPN list for a reader of refusals: printable and short.
func (h *hello) protocols() []string {
	var out []string
	for b := h.alpn; len(b) > 0 && len(out) < 8; {
		n := int(b[0])
		if 1+n > len(b) {
			break
		}
		out = append(out, printable(b[1:1+n]))
		b = b[1+n:]
	}
	return out
}

// printable makes what a stranger sent fit to be shown.
func printable(b []byte) string {
	const most = 64
	out := make([]byte, 0, min(len(b), most))
	for _, c := range b[:min(len(b), most)] {
		if c < 0x21 || c > 0x7e {
			c = '?'
		}
		out = append(out, c)
	}
	return string(out)
}

// cursor reads the presentation language of RFC 8446. Every method returns
// false, and leaves the cursor in no particular place, when bytes are missing.
type cursor []byte

func (c *cursor) skip(n int) bool {
	if len(*c) < n {
		return false
	}
	*c = (*c)[n:]
	return true
}

func (c *cursor) u16(v *int) bool {
	if len(*c) < 2 {
		return false
	}
	*v = int((*c)[0])<<8 | int((*c)[1])
	*c = (*c)[2:]
	return true
}

func (c *cursor) vec8(out *cursor) bool {
	if len(*c) < 1 || len(*c) < 1+int((*c)[0]) {
		return false
	}
	n := int((*c)[0])
	*out, *c = (*c)[1:1+n], (*c)[1+n:]
	return true
}

func (c *cursor) vec16(out *cursor) bool {
	var n int
	if !c.u16(&n) || len(*c) < n {
		return false
	}
	*out, *c = (*c)[:n], (*c)[n:]
	return true
}

// parse reads a ClientHello message (without its header). It returns "" or the
// reason to refuse. The name is kept for the refusal where it was read.
func (h *hello) parse(msg []byte) (reason string) {
	h.nameLen, h.alpn = 0, nil
	c := cursor(msg)
	var session, suites, compression, exts cursor
	if !c.skip(2+32) || !c.vec8(&session) ||
		!c.vec16(&suites) || len(suites)%2 != 0 || !c.vec8(&compression) {
		return gateway.RefuseNotTLS
	}
	if len(c) == 0 {
		return gateway.RefuseNoServerName
	}
	if !c.vec16(&exts) || len(c) != 0 {
		return gateway.RefuseNotTLS
	}
	var name []byte
	var seenName, seenALPN bool
	for len(exts) > 0 {
		var typ int
		var data cursor
		if !exts.u16(&typ) || !exts.vec16(&data) {
			return gateway.RefuseNotTLS
		}
		switch typ {
		case extServerName:
			if seenName || !serverName(data, &name) {
				return gateway.RefuseNotTLS
			}
			seenName = true
		case extALPN:
			var list cursor
			if seenALPN || !data.vec16(&list) || len(data) != 0 || len(list) == 0 {
				return gateway.RefuseNotTLS
			}
			seenALPN = true
			for rest := list; len(rest) > 0; {
				var proto cursor
				if !rest.vec8(&proto) || len(proto) == 0 {
					return gateway.RefuseNotTLS
				}
			}
			h.alpn = list
		}
	}
	if name == nil {
		return gateway.RefuseNoServerName
	}
	if !h.setName(name) {
		return gateway.RefuseBadServerName
	}
	return ""
}

// serverName reads the extension of RFC 6066 3, and sets name to the one host
// name in it; to nil when it has only names of other types.
func serverName(ext cursor, name *[]byte) bool {
	var list cursor
	if !ext.vec16(&list) || len(ext) != 0 || len(list) == 0 {
		return false
	}
	for len(list) > 0 {
		typ := list[0]
		var v cursor
		if !list.skip(1) || !list.vec16(&v) || len(v) == 0 {
			return false
		}
		if typ != 0 {
			continue
		}
		if *name != nil {
			return false
		}
		*name = v
	}
	return true
}

// setName takes a name in lower case, without one trailing dot (RFC 6066 has
// none there, but resolvers let users write one and some clients pass it on).
// It returns false for what is no host name; then the name is kept in a form
// that can be shown.
func (h *hello) setName(name []byte) bool {
	if n := len(name); name[n-1] == '.' {
		name = name[:n-1]
	}
	if len(name) == 0 || len(name) > maxName {
		h.nameLen = 0
		if len(name) > 0 {
			h.nameLen = copy(h.nameBuf[:], printable(name))
		}
		return false
	}
	ok, label := true, 0
	for i, c := range name {
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '_':
			label++
		case 'A' <= c && c <= 'Z':
			c |= 0x20
			label++
		case c == '-' && label > 0 && i+1 < len(name) && name[i+1] != '.':
			label++
		case c == '.' && label > 0:
			label = 0
		default:
			ok = false
			if c < 0x21 || c > 0x7e {
				c = '?'
			}
		}
		if label > 63 {
			ok = false
		}
		h.nameBuf[i] = c
	}
	h.nameLen = len(name)
	return ok && label > 0
}
