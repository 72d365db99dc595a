package turn

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/pion/logging"
	"github.com/pion/stun"
)

// MaxPayload is the largest payload, in bytes, that passes in either direction. A
// larger one is dropped and counted, never cut (TURN-12).
const MaxPayload = 2000

// DefaultMaxAllocations is how many allocations a [Server] has at once unless it is
// told otherwise (TURN-9).
const DefaultMaxAllocations = 1024

// Credentials are what a client needs to be served: long-term credentials of RFC 5389,
// section 10.2. A child tells them to its host in the ARGS of a CMETHOD line.
type Credentials struct {
	Username, Password, Realm string
}

// NewCredentials returns credentials that nobody can guess (TURN-1).
func NewCredentials() Credentials {
	var b [36]byte
	_, _ = rand.Read(b[:]) // it never fails
	text := base64.RawURLEncoding.EncodeToString(b[:])
	return Credentials{Username: text[:16], Password: text[16:], Realm: "ptipc"}
}

// check refuses what cannot be credentials of RFC 5389.
func (c Credentials) check() error {
	for _, part := range []struct{ name, value string }{
		{"username", c.Username}, {"password", c.Password}, {"realm", c.Realm},
	} {
		if part.value == "" || len(part.value) > 512 {
			return fmt.Errorf("turn: the %s of the credentials has %d bytes; give it 1 to 512", part.name, len(part.value))
		}
	}
	return nil
}

// key is the key of MESSAGE-INTEGRITY.
func (c Credentials) key() stun.MessageIntegrity {
	return stun.NewLongTermIntegrity(c.Username, c.Realm, c.Password)
}

// Stats is what a [Server] or a [Conn] has done. Packets and bytes are those of
// payloads that were handed on.
type Stats struct {
	Allocations     int    // a server's, at this moment
	Allocated       uint64 // in total; of a Conn: how often it has got one
	SentPackets     uint64 // from the client to peers
	SentBytes       uint64
	ReceivedPackets uint64 // from peers to the client
	ReceivedBytes   uint64
	Dropped         Dropped
}

// Dropped counts the datagrams that went no further, by reason.
type Dropped struct {
	Malformed  uint64 // not STUN or ChannelData, or its lengths lie (TURN-2)
	Stranger   uint64 // refused by Allow, or from an address that is not the server's (TURN-3)
	Unexpected uint64 // well-formed, but without an allocation, channel, permission or transaction (TURN-4)
	TooLarge   uint64 // a payload of more than MaxPayload bytes (TURN-12)
	Full       uint64 // no room in a queue
	Failed     uint64 // the socket or the packet connection did not take it
}

// Total is the sum of all reasons.
func (d Dropped) Total() uint64 {
	return d.Malformed + d.Stranger + d.Unexpected + d.TooLarge + d.Full + d.Failed
}

// counters is Stats as it grows.
type counters struct {
	allocated                       atomic.Uint64
	sentPackets, sentBytes          atomic.Uint64
	receivedPackets, receivedBytes  atomic.Uint64
	malformed, stranger, unexpected atomic.Uint64
	tooLarge, full, failed          atomic.Uint64
}

func (c *counters) stats() Stats {
	return Stats{
		Allocated:       c.allocated.Load(),
		SentPackets:     c.sentPackets.Load(),
		SentBytes:       c.sentBytes.Load(),
		ReceivedPackets: c.receivedPackets.Load(),
		ReceivedBytes:   c.receivedBytes.Load(),
		Dropped: Dropped{
			Malformed:  c.malformed.Load(),
			Stranger:   c.stranger.Load(),
			Unexpected: c.unexpected.Load(),
			TooLarge:   c.tooLarge.Load(),
			Full:       c.full.Load(),
			Failed:     c.failed.Load(),
		},
	}
}

func orDiscard(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}

// pionLog hands what pion has to say to the logger, for debugging only: what matters
// is logged here.
type pionLog struct{ log *slog.Logger }

var (
	_ logging.LoggerFactory = pionLog{}
	_ logging.LeveledLogger = pionLog{}
)

func (l pionLog) NewLogger(string) logging.LeveledLogger { return l }

func (l pionLog) Trace(msg string)          { l.log.Debug("turn: pion", "text", msg) }
func (l pionLog) Debug(msg string)          { l.Trace(msg) }
func (l pionLog) Info(msg string)           { l.Trace(msg) }
func (l pionLog) Warn(msg string)           { l.Trace(msg) }
func (l pionLog) Error(msg string)          { l.Trace(msg) }
func (l pionLog) Tracef(f string, a ...any) { l.format(f, a) }
func (l pionLog) Debugf(f string, a ...any) { l.format(f, a) }
func (l pionLog) Infof(f string, a ...any)  { l.format(f, a) }
func (l pionLog) Warnf(f string, a ...any)  { l.format(f, a) }
func (l pionLog) Errorf(f string, a ...any) { l.format(f, a) }

func (l pionLog) format(f string, a []any) {
	if l.log.Enabled(nil, slog.LevelDebug) { //nolint:staticcheck // no handler of ours asks a context
		l.Trace(fmt.Sprintf(f, a...))
	}
}
