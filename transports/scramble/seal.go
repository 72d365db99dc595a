package scramble

import (
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
)

const (
	// MaxPayload is the largest payload of a datagram. A longer one is refused, never cut.
	MaxPayload = 4096

	nonceSize  = chacha20poly1305.NonceSizeX
	tagSize    = chacha20poly1305.Overhead
	headerSize = 8 + 8 + 4 + 2 // session, counter, time, length of the payload
	overhead   = nonceSize + headerSize + tagSize

	maxPadding = 255
	minPadding = 32 // that much may be added at most to any datagram, whatever its length
	// fitting is the UDP payload that fits a path of 1,500 bytes over IPv6.
	fitting = 1500 - 40 - 8
	maxWire = overhead + MaxPayload + maxPadding
)

// The labels under which the keys of the two directions are derived (SCRAM-3).
const (
	fromClient = "ptipc scramble 1, client to server"
	fromServer = "ptipc scramble 1, server to client"
)

// keys are what one transport seals and opens with, and what it has opened already:
// all of its sockets share that, since a datagram for one could be sent to another
// again.
type keys struct {
	seal, open cipher.AEAD
	windows    windows
}

func newKeys(shared Key, side Side) (*keys, error) {
	own, other := fromClient, fromServer
	if side == ServerSide {
		own, other = other, own
	}
	seal, err := derive(shared, own)
	if err != nil {
		return nil, err
	}
	open, err := derive(shared, other)
	if err != nil {
		return nil, err
	}
	return &keys{seal: seal, open: open}, nil
}

func derive(shared Key, label string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, shared[:], nil, label, chacha20poly1305.KeySize)
	if err != nil {
		return nil, fmt.Errorf("scramble: deriving a key: %w", err)
	}
	return chacha20poly1305.NewX(key)
}

// A header is what stands before the payload inside of the seal.
type header struct {
	session uint64 // random, of one sender's socket
	counter uint64 // of the session's datagrams, from 0
	sent    uint32 // seconds since 1970
}

// sealed appends a sealed datagram to dst. nonce is used once (SCRAM-2).
func (k *keys) sealed(dst []byte, nonce *[nonceSize]byte, h header, payload []byte, padding int) []byte {
	dst = append(dst, nonce[:]...)
	start := len(dst)
	dst = binary.BigEndian.AppendUint64(dst, h.session)
	dst = binary.BigEndian.AppendUint64(dst, h.counter)
	dst = binary.BigEndian.AppendUint32(dst, h.sent)
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(payload)))
	dst = append(dst, payload...)
	dst = append(dst, zeros[:padding]...)
	return k.seal.Seal(dst[:start], nonce[:], dst[start:], nil)
}

var zeros [maxPadding]byte

// errForged: whoever made the datagram does not have the key.
var errForged = errors.New("the seal is broken")

// errForm: the seal is whole, and what is in it is not of the form.
var errForm = errors.New("a sealed datagram has a length that lies")

// opened opens a datagram in its own memory and returns the payload (SCRAM-1). What it
// says still has to be accepted by the windows.
func (k *keys) opened(wire []byte) (header, []byte, error) {
	if len(wire) < overhead || len(wire) > maxWire {
		return header{}, nil, errForged
	}
	plain, err := k.open.Open(wire[nonceSize:nonceSize], wire[:nonceSize], wire[nonceSize:], nil)
	if err != nil {
		return header{}, nil, errForged
	}
	h := header{binary.BigEndian.Uint64(plain), binary.BigEndian.Uint64(plain[8:]), binary.BigEndian.Uint32(plain[16:])}
	n, rest := int(binary.BigEndian.Uint16(plain[20:])), plain[headerSize:]
	if n > len(rest) || n > MaxPayload {
		return header{}, nil, errForm
	}
	return h, rest[:n], nil
}

// randomPadding is how many bytes go behind a payload: enough to hide its length, and
// where it can be no more than the path takes in one piece (SCRAM-4).
func randomPadding(payload int, random uint16) int {
	room := max(minPadding, min(maxPadding, fitting-overhead-payload))
	return int(random) % (room + 1)
}

// A sender is one socket's side of a session.
type sender struct {
	session uint64

	mu      sync.Mutex
	counter uint64
}

func newSender() *sender {
	var session [8]byte
	_, _ = rand.Read(session[:]) // never fails
	return &sender{session: binary.BigEndian.Uint64(session[:])}
}

func (s *sender) next() header {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := header{s.session, s.counter, uint32(time.Now().Unix())}
	s.counter++
	return h
}

const (
	// maxSkew is how far the clocks of both sides may be apart, a datagram's way
	// included.
	maxSkew = 120 * time.Second
	// windowSize is how many datagrams one may come late.
	windowSize = 1024
	// maxSessions bounds what is kept of other sides' sockets.
	maxSessions = 4096
)

var (
	errTime     = errors.New("a datagram was sealed too long ago, or in the future: it is a replay, or a clock is wrong")
	errReplay   = errors.New("a datagram came again, or very late")
	errSessions = errors.New("too many sockets of the other side are in use")
)

// windows keep a datagram from being accepted twice (SCRAM-5): within a session by
// its counter, and after the session was forgotten by its time. The zero value is ready.
type windows struct {
	mu       sync.Mutex
	sessions map[uint64]*window
	swept    uint32
}

// A window knows which of the last counters of a session have come.
type window struct {
	newest uint32 // the latest time that was told
	next   uint64 // after the highest counter
	seen   [windowSize / 64]uint64
}

// accept says whether a datagram is new, and that it has come.
func (w *windows) accept(h header, now time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	at := uint32(now.Unix())
	const skew = uint32(maxSkew / time.Second)
	if apart := int32(at - h.sent); apart > int32(skew) || apart < -int32(skew) {
		return errTime
	}
	s, ok := w.sessions[h.session]
	if !ok {
		if int32(at-w.swept) > int32(skew) || len(w.sessions) >= maxSessions {
			w.sweep(at)
		}
		if len(w.sessions) >= maxSessions {
			return errSessions
		}
		if w.sessions == nil {
			w.sessions = make(map[uint64]*window)
		}
		s = &window{newest: h.sent}
		w.sessions[h.session] = s
	}
	if !s.take(h.counter) {
		return errReplay
	}
	if int32(h.sent-s.newest) > 0 {
		s.newest = h.sent
	}
	return nil
}

// sweep forgets the sessions of which nothing could be accepted any more by its time.
func (w *windows) sweep(at uint32) {
	w.swept = at
	for session, s := range w.sessions {
		if int32(at-s.newest) > int32(maxSkew/time.Second) {
			delete(w.sessions, session)
		}
	}
}

func (w *window) take(counter uint64) bool {
	if counter == ^uint64(0) {
		return false // next could not go beyond it
	}
	if counter >= w.next {
		ahead := counter - w.next + 1
		if ahead >= windowSize {
			clear(w.seen[:])
		} else {
			for c := w.next; c <= counter; c++ {
				w.seen[c/64%uint64(len(w.seen))] &^= 1 << (c % 64)
			}
		}
		w.next = counter + 1
	} else if w.next-counter > windowSize {
		return false
	}
	word, bit := &w.seen[counter/64%uint64(len(w.seen))], uint64(1)<<(counter%64)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}
