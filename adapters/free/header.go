package free

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"pthost/ptipc"
)

const (
	version = 1 // FREE-1; see versionMany

	prefixSize = 3    // version and length
	maxLength  = 4096 // what the length may say (FREE-3)

	addressIPv4 = 1
	addressName = 3
	addressIPv6 = 4

	answerSize = 2 // version and class (FREE-7)
)

// appendHeader appends the header for dest, "host:port" (FREE-1). A name stays a
// name (FREE-5).
func appendHeader(b []byte, dest string) ([]byte, error) {
	host, portText, err := net.SplitHostPort(dest)
	if err != nil {
		return nil, ptipc.WithClass(ptipc.ErrNotAllowed, fmt.Errorf("free: the destination must be host:port: %w", err))
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil || port == 0 { // FREE-6
		return nil, fmt.Errorf("free: the destination's port %q must be a number from 1 to 65535: %w", portText, ptipc.ErrNotAllowed)
	}
	start := len(b)
	b = append(b, version, 0, 0)
	if ip, err := netip.ParseAddr(host); err == nil && ip.Zone() == "" {
		kind := byte(addressIPv6)
		if ip.Is4() {
			kind = addressIPv4
		}
		b = append(b, kind)
		b = append(b, ip.AsSlice()...)
	} else {
		if err := checkName(host); err != nil {
			return nil, err
		}
		b = append(b, addressName, byte(len(host)))
		b = append(b, host...)
	}
	b = binary.BigEndian.AppendUint16(b, uint16(port))
	binary.BigEndian.PutUint16(b[start+1:], uint16(len(b)-start-prefixSize))
	return b, nil
}

// checkName refuses names that are empty (FREE-6), and those that would make
// "host:port" mean something else to whoever takes it apart again.
func checkName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("free: the destination has an empty name: %w", ptipc.ErrNotAllowed)
	case len(name) > 255:
		return fmt.Errorf("free: the destination's name has %d bytes, at most 255 can be sent: %w", len(name), ptipc.ErrNotAllowed)
	case !utf8.ValidString(name),
		strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f || strings.ContainsRune("[]:%", r) }):
		return fmt.Errorf("free: the destination %q is neither a name nor an address without a zone: %w", name, ptipc.ErrNotAllowed)
	}
	return nil
}

// errSilent is the error of a client that went away before its header was whole:
// there is nobody to answer.
var errSilent = errors.New("no whole header has come")

// errMany says that the carrier is one of many streams: its greeting has been read.
var errMany = errors.New("a carrier of many streams")

// readHeader reads one header, and not a byte more (FREE-9), and returns the
// destination. The class of its error is the answer, if it is not errSilent.
func readHeader(r io.Reader) (dest string, err error) {
	var prefix [prefixSize]byte
	if err := readFull(r, prefix[:]); err != nil {
		return "", err
	}
	if prefix[0] != version && prefix[0] != versionMany { // FREE-2
		return "", fmt.Errorf("the header is of version %d, not %d: %w", prefix[0], version, ptipc.ErrCommand)
	}
	length := binary.BigEndian.Uint16(prefix[1:])
	if length > maxLength { // FREE-3
		return "", fmt.Errorf("the header has %d bytes, at most %d are allowed: %w", length, maxLength, ptipc.ErrSettingsTooLarge)
	}
	body := make([]byte, length)
	if err := readFull(r, body); err != nil {
		return "", err
	}
	if prefix[0] == versionMany {
		return "", errMany // what a later version may say in the body is not for us (FREE-16)
	}
	return parseBody(body)
}

func readFull(r io.Reader, b []byte) error {
	_, err := io.ReadFull(r, b)
	var timeout net.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &timeout) && timeout.Timeout(): // FREE-4
		return fmt.Errorf("the header took too long: %w", ptipc.ErrSettingsTimedOut)
	}
	return fmt.Errorf("%w: %w", errSilent, err)
}

// parseBody reads what is behind the length of a header.
func parseBody(b []byte) (dest string, err error) {
	errShort := fmt.Errorf("the header ends before its address and port do: %w", ptipc.ErrGeneral)
	if len(b) == 0 {
		return "", errShort
	}
	kind, b := b[0], b[1:]
	size := 0
	switch kind {
	case addressIPv4:
		size = net.IPv4len
	case addressIPv6:
		size = net.IPv6len
	case addressName:
		if len(b) == 0 {
			return "", errShort
		}
		size, b = int(b[0]), b[1:]
	default:
		return "", fmt.Errorf("the header has address type %d: %w", kind, ptipc.ErrAddressType)
	}
	if len(b) < size+2 {
		return "", errShort
	}
	address, port, options := b[:size], binary.BigEndian.Uint16(b[size:]), b[size+2:]
	host := string(address)
	if kind == addressName { // FREE-5
		if err := checkName(host); err != nil {
			return "", err
		}
	} else {
		ip, _ := netip.AddrFromSlice(address) // of one of the two sizes
		host = ip.String()
	}
	if port == 0 { // FREE-6
		return "", fmt.Errorf("port 0 is no destination: %w", ptipc.ErrNotAllowed)
	}
	if len(options) > 0 { // FREE-10
		var unknown map[string]json.RawMessage // all of them are, in this version
		err := ptipc.Opaque(options).Decode(&unknown)
		if len(bytes.TrimSpace(options)) == 0 { // which Decode takes for {}
			err = errors.New("they are blank")
		}
		if err != nil {
			return "", ptipc.WithClass(ptipc.ErrSettingsNotJSON, fmt.Errorf("the header's options: %w", err))
		}
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port))), nil
}

// readAnswer reads the answer, and not a byte more (FREE-9).
func readAnswer(r io.Reader) error {
	var answer [answerSize]byte
	if _, err := io.ReadFull(r, answer[:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("free: no whole answer from the far end: %w", err)
	}
	if answer[0] != version { // FREE-8
		return fmt.Errorf("free: the far end answers in version %d, it is no free server: %w", answer[0], ptipc.ErrGeneral)
	}
	return refusal(ptipc.Class(answer[1]))
}

// refusal is the error of an answer; nil is success.
func refusal(class ptipc.Class) error {
	switch {
	case class == 0:
		return nil
	case !class.Known(): // FREE-8
		return fmt.Errorf("free: the far end refused for an unknown reason, 0x%02x: %w", byte(class), ptipc.ErrGeneral)
	}
	return fmt.Errorf("free: the far end refused: %w", class)
}
