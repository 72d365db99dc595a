package child

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"

	"pthost/ptipc"
	"pthost/ptipc/internal/tally"
	"pthost/ptipc/localnet"
	"pthost/ptipc/stdio"
	"pthost/socks"
)

// link is a child's end of the pipe to its host.
type link struct {
	dir  string // the state directory
	host stdio.Host
	out  *stdio.Writer
	in   chan ptipc.Message // signals that have come (SIG-1)
	ends *localnet.Ends     // where the ends of streams are marked (SOCKS-20); nil if nowhere

	dropped *tally.Warning // signals
}

// maxSignals bounds the signals that wait for a transport that does not receive
// them (SIG-4). The oldest are dropped: signals may be lost.
const maxSignals = 64

func newLink(dir string, host stdio.Host, stdout io.Writer) *link {
	l := &link{dir: dir, host: host, out: stdio.NewWriter(stdout), in: make(chan ptipc.Message, maxSignals)}
	l.dropped = tally.New(l.logger(), "signals were dropped: the transport does not receive them")
	if host.Ends != 0 {
		ends, err := localnet.InheritEnds(host.Ends)
		if err != nil {
			// A script that has started us may have closed it. The host is not told ends=1.
			l.logger().Warn("a stream that breaks cannot be told from one that ends", "err", err)
		}
		l.ends = ends
	}
	return l
}

// env is what the transport is given, its way out included.
func (l *link) env(role string) (ptipc.Env, error) {
	env := ptipc.Env{Local: l.dir, Status: l.status, Log: l.logger(), Signals: &signals{link: l, server: role == roleServer}}
	if l.host.Proxy == "" {
		return env, nil
	}
	dial, err := socks.UpstreamDialer(l.host.Proxy, nil) // errors do not repeat the URL (PROXY-3)
	if err != nil {
		return env, errors.Join(fmt.Errorf("%w: %w", err, ptipc.ExitUnavailable),
			l.out.Send(stdio.ProxyError{Text: stdio.OneLine(err.Error())}))
	}
	env.DialOut = dial
	return env, l.out.Send(stdio.ProxyDone{}) // PROXY-1
}

// signals is the transport's end of the out-of-band channel (SIG-1).
type signals struct {
	link   *link
	server bool
}

func (s *signals) Send(_ context.Context, m ptipc.Message) error {
	if s.server {
		return s.link.out.Send(stdio.SMessage{Message: m})
	}
	return s.link.out.Send(stdio.CMessage{Message: m})
}

func (s *signals) Receive(ctx context.Context) (ptipc.Message, error) {
	select {
	case m := <-s.link.in:
		return m, nil
	case <-ctx.Done():
		return ptipc.Message{}, context.Cause(ctx)
	}
}

// deliver keeps a signal until the transport wants it.
func (l *link) deliver(m ptipc.Message) {
	for {
		select {
		case l.in <- m:
			return
		default:
		}
		select {
		case <-l.in:
			l.dropped.Add(1)
		default:
		}
	}
}

// readLines answers the host until its end of the pipe closes.
func (l *link) readLines(in *stdio.Reader, own side) error {
	for {
		line, err := in.ReadLine()
		if errors.Is(err, stdio.ErrTooLong) {
			continue // LINE-1: nothing after it is lost
		}
		if err != nil {
			return err
		}
		message, err := stdio.ParseHost(line)
		if err != nil {
			l.logger().Debug("the host wrote a line that is not a control line", "err", err)
			continue
		}
		switch m := message.(type) {
		case stdio.StatsRequest:
			text, err := json.Marshal(own.stats(m.Client))
			if err != nil {
				text = nil // null: not known
			}
			if err := l.out.Send(stdio.StatsReply{ID: m.ID, JSON: text}); err != nil {
				return err
			}
		case stdio.CMessage:
			if _, ok := own.(*server); ok {
				l.deliver(m.Message)
			}
		case stdio.SMessage:
			if _, ok := own.(*client); ok {
				l.deliver(m.Message)
			}
		}
	}
}

// uids are the users of this machine that may talk to this child (SOCKS-17).
func (l *link) uids() []uint32 {
	var uids []uint32
	if uid := os.Geteuid(); uid >= 0 {
		uids = append(uids, uint32(uid))
	}
	if l.host.UID != nil {
		uids = append(uids, *l.host.UID)
	}
	return uids
}

// status passes bootstrap progress to the host (LINE-10, LIFE-1).
func (l *link) status(_ context.Context, attrs ...slog.Attr) {
	message := stdio.Status{}
	for _, a := range attrs {
		if a.Key == "transport" {
			message.Transport = a.Value.Resolve().String()
			continue
		}
		message.Attrs = append(message.Attrs, stdio.KV{Key: a.Key, Value: a.Value.Resolve().String()})
	}
	if err := l.out.Send(message); err != nil {
		l.logger().Warn("a status could not be told", "err", err)
	}
}

func (l *link) logger() *slog.Logger { return slog.New(&logHandler{out: l.out}) }

// guard keeps other users out where the system can tell them apart.
func guard(l net.Listener, network string, log *slog.Logger, uids []uint32) net.Listener {
	if runtime.GOOS != "linux" && !localnet.Supported(network) {
		return l
	}
	return localnet.Guard(l, log, uids...)
}
