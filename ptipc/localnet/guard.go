package localnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	refusalLogInterval = time.Second
	minAcceptPause     = 5 * time.Millisecond
	maxAcceptPause     = time.Second
)

// A GuardedListener lets in only some users of this machine; [Guard] and [GuardFunc]
// make it.
type GuardedListener struct {
	net.Listener
	log     *slog.Logger
	allow   func(Cred) bool
	refused atomic.Uint64

	closeOnce sync.Once
	closed    chan struct{}

	mu       sync.Mutex
	logged   time.Time  // when a refusal was last logged
	unlogged uint64     // refusals since then
	last     error      // why the last of them was
	level    slog.Level // debug if all of them had left by themselves, which is everyday
}

// Guard is a listener that accepts only connections from the users uids, by
// default the effective user, and closes all others, as well as those whose user
// cannot be told (SOCKS-17). The connections are returned as l accepted them, and must be of
// a kind that [Peer] takes. Accept waits and tries again when the process or the
// system is out of descriptors or memory (SOCKS-10). log gets at most one line a second
// about refused connections; nil discards.
func Guard(l net.Listener, log *slog.Logger, uids ...uint32) *GuardedListener {
	if len(uids) == 0 {
		uids = []uint32{uint32(os.Geteuid())}
	}
	uids = slices.Clone(uids)
	return GuardFunc(l, log, func(peer Cred) bool { return slices.Contains(uids, peer.UID) })
}

// GuardFunc is [Guard] for whom allow lets in, which is asked for each connection.
func GuardFunc(l net.Listener, log *slog.Logger, allow func(peer Cred) bool) *GuardedListener {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &GuardedListener{Listener: l, log: log, allow: allow, closed: make(chan struct{}), level: slog.LevelDebug}
}

// Refused is the number of connections that were closed because of their user.
func (g *GuardedListener) Refused() uint64 { return g.refused.Load() }

// Accept returns the next connection of a user who is let in.
func (g *GuardedListener) Accept() (net.Conn, error) {
	pause := minAcceptPause
	for {
		conn, err := g.Listener.Accept()
		if err != nil {
			if !temporary(err) {
				return nil, err
			}
			g.log.LogAttrs(context.Background(), slog.LevelWarn, "cannot accept connections for now",
				slog.Any("error", err), slog.Duration("pause", pause))
			if !g.wait(pause) {
				return nil, &net.OpError{Op: "accept", Net: g.Addr().Network(), Addr: g.Addr(), Err: net.ErrClosed}
			}
			pause = min(2*pause, maxAcceptPause)
			continue
		}
		pause = minAcceptPause
		cred, err := Peer(conn)
		if err == nil && g.allow(cred) {
			return conn, nil
		}
		conn.Close()
		if err == nil {
			err = fmt.Errorf("uid %d (process %d) is not let in", cred.UID, cred.PID)
		}
		g.refuse(err)
	}
}

// Close closes the listener and ends a wait in Accept.
func (g *GuardedListener) Close() error {
	g.closeOnce.Do(func() {
		close(g.closed)
		g.mu.Lock()
		defer g.mu.Unlock()
		g.logRefusals()
	})
	return g.Listener.Close()
}

// wait reports false when the listener was closed meanwhile.
func (g *GuardedListener) wait(pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-g.closed:
		return false
	}
}

func (g *GuardedListener) refuse(err error) {
	g.refused.Add(1)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.unlogged++
	if !errors.Is(err, ErrPeerGone) {
		g.last, g.level = err, slog.LevelWarn
	} else if g.level < slog.LevelWarn {
		g.last = err
	}
	// Another user could otherwise fill the log.
	if now := time.Now(); now.Sub(g.logged) >= refusalLogInterval {
		g.logged = now
		g.logRefusals()
	}
}

// logRefusals is called with mu held.
func (g *GuardedListener) logRefusals() {
	if g.unlogged == 0 {
		return
	}
	g.log.LogAttrs(context.Background(), g.level, "refused connections",
		slog.String("listener", g.Addr().String()), slog.Uint64("count", g.unlogged), slog.Any("last", g.last))
	g.unlogged, g.last, g.level = 0, nil, slog.LevelDebug
}

// temporary reports whether accepting can succeed later.
func temporary(err error) bool {
	return slices.ContainsFunc(temporaryErrors, func(t error) bool { return errors.Is(err, t) })
}
