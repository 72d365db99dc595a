package turn

import (
	"crypto/hmac"
	"crypto/sha1" //nolint:gosec // RFC 5389 knows no other
	"encoding/binary"
	"errors"
	"hash/crc32"
	"net"
	"net/netip"

	"github.com/pion/stun"
)

const (
	stunHeader    = 20
	channelHeader = 4
	magicCookie   = 0x2112A442

	minChannel = 0x4000 // RFC 5766, section 11
	maxChannel = 0x7FFE
)

// Only this many attributes are looked at. A request of a client has about ten; a
// CreatePermission has one for each peer.
const maxAttributes = 64

var errMalformed = errors.New("turn: malformed")

// A message is a STUN message whose lengths are true. Its slices belong to the datagram.
type message struct {
	raw    []byte
	class  stun.MessageClass
	method stun.Method
	id     [stun.TransactionIDSize]byte

	username, realm, nonce, data, errorCode []byte // nil: absent
	integrity                               int    // where MESSAGE-INTEGRITY begins; 0: absent
	peers                                   []netip.AddrPort
	lifetime                                uint32
	channel                                 uint16
	transport, family                       byte
	reserve                                 bool // EVEN-PORT wants the next port as well
	has                                     presence
	invalid                                 bool              // a known attribute with a value that cannot be
	unknown                                 []stun.AttrType   // comprehension is required
	peerArray                               [4]netip.AddrPort // so that an indication costs no allocation
}

type presence uint16

const (
	hasLifetime presence = 1 << iota
	hasChannel
	hasTransport
	hasFamily
	hasDontFragment
	hasEvenPort
	hasReservation
	hasData
	hasErrorCode
)

// parse looks at every length before it is believed (TURN-2). Nothing that comes from
// a socket is read by anything else before.
func (m *message) parse(b []byte) error {
	*m = message{raw: b}
	m.peers = m.peerArray[:0]
	if len(b) < stunHeader || b[0]&0xC0 != 0 || binary.BigEndian.Uint32(b[4:]) != magicCookie {
		return errMalformed
	}
	if length := int(binary.BigEndian.Uint16(b[2:])); length%4 != 0 || length != len(b)-stunHeader {
		return errMalformed
	}
	var t stun.MessageType
	t.ReadValue(binary.BigEndian.Uint16(b))
	m.class, m.method = t.Class, t.Method
	copy(m.id[:], b[8:])
	for at, count := stunHeader, 0; at < len(b); count++ {
		if len(b)-at < 4 || count == maxAttributes {
			return errMalformed
		}
		kind, length := binary.BigEndian.Uint16(b[at:]), int(binary.BigEndian.Uint16(b[at+2:]))
		end := at + 4 + (length+3)&^3
		if end > len(b) {
			return errMalformed
		}
		if stun.AttrType(kind) == stun.AttrFingerprint {
			// It is the last, and says whether this is STUN at all.
			if length != 4 || end != len(b) || binary.BigEndian.Uint32(b[at+4:]) != crc32.ChecksumIEEE(b[:at])^0x5354554e {
				return errMalformed
			}
		} else if m.integrity == 0 { // what is behind MESSAGE-INTEGRITY is ignored
			m.attribute(stun.AttrType(kind), b[at+4:at+4+length], at)
		}
		at = end
	}
	return nil
}

// attribute takes one attribute. Of several of one kind the first counts, but for peers.
func (m *message) attribute(kind stun.AttrType, v []byte, at int) {
	first := func(into *[]byte) {
		if *into == nil {
			*into = v[:len(v):len(v)]
		}
	}
	sized := func(size int, flag presence) bool {
		if len(v) != size {
			m.invalid = true
			return false
		}
		again := m.has&flag != 0
		m.has |= flag
		return !again
	}
	switch kind {
	case stun.AttrUsername:
		first(&m.username)
	case stun.AttrRealm:
		first(&m.realm)
	case stun.AttrNonce:
		first(&m.nonce)
	case stun.AttrData:
		first(&m.data)
		m.has |= hasData
	case stun.AttrErrorCode:
		if len(v) < 4 {
			m.invalid = true
		} else {
			first(&m.errorCode)
		}
	case stun.AttrMessageIntegrity:
		if sized(sha1.Size, 0) {
			m.integrity = at
		}
	case stun.AttrXORPeerAddress:
		if peer, ok := m.address(v); ok {
			m.peers = append(m.peers, peer)
		} else {
			m.invalid = true
		}
	case stun.AttrLifetime:
		if sized(4, hasLifetime) {
			m.lifetime = binary.BigEndian.Uint32(v)
		}
	case stun.AttrChannelNumber:
		if sized(4, hasChannel) {
			m.channel = binary.BigEndian.Uint16(v)
		}
	case stun.AttrRequestedTransport:
		if sized(4, hasTransport) {
			m.transport = v[0]
		}
	case stun.AttrRequestedAddressFamily:
		if sized(4, hasFamily) {
			m.family = v[0]
		}
	case stun.AttrEvenPort:
		if sized(1, hasEvenPort) {
			m.reserve = v[0]&0x80 != 0
		}
	case stun.AttrReservationToken:
		sized(8, hasReservation)
	case stun.AttrXORMappedAddress, stun.AttrXORRelayedAddress:
		if _, ok := m.address(v); !ok {
			m.invalid = true
		}
	case stun.AttrMappedAddress, stun.AttrUnknownAttributes:
	default:
		if kind < 0x8000 {
			m.unknown = append(m.unknown, kind)
		}
	}
}

// address reads an XOR address.
func (m *message) address(v []byte) (netip.AddrPort, bool) {
	if len(v) < 8 {
		return netip.AddrPort{}, false
	}
	port := binary.BigEndian.Uint16(v[2:]) ^ magicCookie>>16
	switch {
	case v[1] == 1 && len(v) == 8:
		var ip [4]byte
		binary.BigEndian.PutUint32(ip[:], binary.BigEndian.Uint32(v[4:])^magicCookie)
		return netip.AddrPortFrom(netip.AddrFrom4(ip), port), true
	case v[1] == 2 && len(v) == 20:
		var ip [16]byte
		for i := range ip {
			ip[i] = v[4+i] ^ m.raw[4+i] // the cookie and the transaction follow one another
		}
		return netip.AddrPortFrom(netip.AddrFrom16(ip).Unmap(), port), true
	default:
		return netip.AddrPort{}, false
	}
}

// intact says whether MESSAGE-INTEGRITY was made with this key.
func (m *message) intact(key []byte) bool {
	if m.integrity == 0 {
		return false
	}
	mac := hmac.New(sha1.New, key)
	var header [4]byte
	copy(header[:], m.raw[:2])
	binary.BigEndian.PutUint16(header[2:], uint16(m.integrity+4+sha1.Size-stunHeader))
	mac.Write(header[:])
	mac.Write(m.raw[4:m.integrity])
	return hmac.Equal(mac.Sum(nil), m.raw[m.integrity+4:m.integrity+4+sha1.Size])
}

// code is the number of an ERROR-CODE, for example 437.
func (m *message) code() stun.ErrorCode {
	if m.errorCode == nil {
		return 0
	}
	return stun.ErrorCode(int(m.errorCode[2]&7)*100 + int(m.errorCode[3]))
}

// parseChannelData returns the channel and the payload of a ChannelData message over
// UDP, which may have up to three bytes of padding (TURN-2).
func parseChannelData(b []byte) (channel uint16, payload []byte, ok bool) {
	if len(b) < channelHeader {
		return 0, nil, false
	}
	channel = binary.BigEndian.Uint16(b)
	length := int(binary.BigEndian.Uint16(b[2:]))
	if channel < minChannel || channel > maxChannel || length > len(b)-channelHeader || len(b)-channelHeader-length > 3 {
		return 0, nil, false
	}
	return channel, b[channelHeader : channelHeader+length], true
}

// indicationHeader is how much is put in front of the payload of an indication.
func indicationHeader(peer netip.AddrPort) int {
	if peer.Addr().Is4() {
		return stunHeader + 12 + 4
	}
	return stunHeader + 24 + 4
}

// putIndication writes a Send or Data indication around the payload that lies behind
// room for indicationHeader, and returns the whole, which can be three bytes longer.
func putIndication(b []byte, method stun.Method, peer netip.AddrPort, payload int, id [stun.TransactionIDSize]byte) []byte {
	header := indicationHeader(peer)
	end := header + (payload+3)&^3
	b = b[:end]
	binary.BigEndian.PutUint16(b, stun.NewType(method, stun.ClassIndication).Value())
	binary.BigEndian.PutUint16(b[2:], uint16(end-stunHeader))
	binary.BigEndian.PutUint32(b[4:], magicCookie)
	copy(b[8:], id[:])
	at := stunHeader
	binary.BigEndian.PutUint16(b[at:], uint16(stun.AttrXORPeerAddress))
	b[at+4] = 0
	binary.BigEndian.PutUint16(b[at+6:], peer.Port()^magicCookie>>16)
	if peer.Addr().Is4() {
		ip := peer.Addr().As4()
		binary.BigEndian.PutUint16(b[at+2:], 8)
		b[at+5] = 1
		binary.BigEndian.PutUint32(b[at+8:], binary.BigEndian.Uint32(ip[:])^magicCookie)
		at += 12
	} else {
		ip := peer.Addr().As16()
		binary.BigEndian.PutUint16(b[at+2:], 20)
		b[at+5] = 2
		for i := range ip {
			b[at+8+i] = ip[i] ^ b[4+i]
		}
		at += 24
	}
	binary.BigEndian.PutUint16(b[at:], uint16(stun.AttrData))
	binary.BigEndian.PutUint16(b[at+2:], uint16(payload))
	clear(b[header+payload : end])
	return b
}

// attribute sets one attribute of a message that is built.
func attribute(kind stun.AttrType, v ...byte) stun.Setter {
	return stun.RawAttribute{Type: kind, Value: v}
}

func uint32Attribute(kind stun.AttrType, v uint32) stun.Setter {
	return attribute(kind, binary.BigEndian.AppendUint32(nil, v)...)
}

// addressAttribute sets an XOR-PEER-ADDRESS, and others of this form.
type addressAttribute struct {
	kind stun.AttrType
	addr netip.AddrPort
}

func (a addressAttribute) AddTo(m *stun.Message) error {
	return stun.XORMappedAddress{IP: net.IP(a.addr.Addr().AsSlice()), Port: int(a.addr.Port())}.AddToAs(m, a.kind)
}

// transaction sets the transaction of a message that is built.
func transaction(id [stun.TransactionIDSize]byte) stun.Setter { return stun.NewTransactionIDSetter(id) }

// plainAddr is the address with IPv4 as IPv4, whatever socket it came from.
func plainAddr(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
