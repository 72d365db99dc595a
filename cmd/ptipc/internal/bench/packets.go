package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// The roles of [RunPeer] for datagrams.
const (
	rolePacketFar   = "packet-far"   // packet-far IP:PORT: sends every datagram back
	rolePacketRelay = "packet-relay" // packet-relay IP:PORT: a relay to that address
)

const (
	packetSize   = 1200 // of a payload, as QUIC has it at first
	packetWindow = 64   // on their way at once
	// lostAfter is how long nothing has to come back until what is on its way is lost.
	lostAfter = 100 * time.Millisecond
)

// runPacketPeer is RunPeer for datagrams.
func runPacketPeer(ctx context.Context, role, addr string, stdin io.Reader, stdout io.Writer) error {
	listen := "127.0.0.1:0"
	if role == rolePacketFar {
		listen = addr
	}
	var config net.ListenConfig
	listener, err := config.ListenPacket(ctx, "udp", listen)
	if err != nil {
		return err
	}
	conn := listener.(*net.UDPConn)
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, stdin)
		cancel()
	}()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	if _, err := fmt.Fprintln(stdout, conn.LocalAddr()); err != nil {
		return err
	}
	if role == rolePacketFar {
		err = sendBack(conn)
	} else {
		err = relayPackets(ctx, conn, addr)
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func sendBack(conn *net.UDPConn) error {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		_, _ = conn.WriteToUDPAddrPort(buf[:n], from) // one that is lost is counted
	}
}

// relayPackets is what a Go programmer writes without thinking of speed: one datagram
// at a time, and a socket for each source.
func relayPackets(ctx context.Context, front *net.UDPConn, to string) error {
	wires := map[netip.AddrPort]net.Conn{}
	defer func() {
		for _, wire := range wires {
			_ = wire.Close() // nothing is left to be said
		}
	}()
	buf := make([]byte, 1<<16)
	for {
		n, from, err := front.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		wire := wires[from]
		if wire == nil {
			var d net.Dialer
			if wire, err = d.DialContext(ctx, "udp", to); err != nil {
				return err
			}
			wires[from] = wire
			go func() {
				buf := make([]byte, 1<<16)
				for {
					n, err := wire.Read(buf)
					if err != nil {
						return
					}
					_, _ = front.WriteToUDPAddrPort(buf[:n], from) // one that is lost is counted
				}
			}()
		}
		_, _ = wire.Write(buf[:n]) // as above
	}
}

// A packetTurn is a way for datagrams whose turn comes in every round.
type packetTurn struct {
	*instance
	column string
	conn   net.PacketConn
	to     net.Addr
}

// packets sends datagrams to and fro: many at a time, and one.
func (b *bench) packets(ctx context.Context) (err error) {
	if b.packetName == "" {
		b.note("the transport carries no datagrams, and packets are not measured")
		return nil
	}
	listen := b.config.Listen
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	far, farAddr, err := b.startPeer(ctx, rolePacketFar, listen)
	if err != nil {
		return fmt.Errorf("the far end: %w", err)
	}
	defer func() { err = errors.Join(err, far.stop()) }()
	hop, hopAddr, err := b.startPeer(ctx, rolePacketRelay, farAddr)
	if err != nil {
		return fmt.Errorf("the relay: %w", err)
	}
	defer func() { err = errors.Join(err, hop.stop()) }()
	child, err := b.config.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, child.Transport.Close()) }()

	wireTo := farAddr
	if b.config.PacketsTo != "" {
		wireTo = b.config.PacketsTo
	}
	turns := []packetTurn{
		{instance: &instance{pid: child.Pid}, column: ChildDial}, {instance: &instance{}, column: Direct}, {instance: &instance{pid: hop.pid}, column: Relay},
	}
	for i, to := range []string{wireTo, farAddr, hopAddr} {
		t := &turns[i]
		addr, err := netip.ParseAddrPort(to)
		if err != nil {
			return err
		}
		t.to = net.UDPAddrFromAddrPort(addr)
		if i == 0 {
			t.conn, err = child.Transport.Packets[b.packetName](ctx)
		} else {
			var config net.ListenConfig
			t.conn, err = config.ListenPacket(ctx, "udp", ":0")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", short(t.column), err)
		}
		defer t.conn.Close()
		if err := t.try(ctx); err != nil {
			return fmt.Errorf("%s: %w", short(t.column), err)
		}
	}
	for _, window := range []int{packetWindow, 1} {
		name, title := fmt.Sprintf("packets.%d", window), fmt.Sprintf("packets of %d bytes and back, %d at once", packetSize, window)
		for round := range b.config.Rounds {
			b.config.Progress(fmt.Sprintf("%s, round %d of %d", title, round+1, b.config.Rounds))
			for _, t := range turns {
				x, times, err := b.exchange(ctx, t, window)
				if err != nil {
					return fmt.Errorf("%s: %s: %w", title, short(t.column), err)
				}
				b.report.add(Metric{Name: name, Title: title, Unit: "/s", HigherIsBetter: true}, t.column, float64(x.count)/x.elapsed.Seconds())
				b.report.add(Metric{Name: name + ".loss", Title: title + ", lost", Unit: "%"}, t.column, 100*float64(x.sent-min(x.sent, x.back))/float64(x.sent))
				if window == 1 {
					b.addTimes(name, title, t.column, times)
				}
				// Each has gone through twice.
				b.report.add(Metric{Name: name + ".cpu", Title: title + ", CPU a packet", Unit: "µs"}, t.column, x.cpu*1e6/float64(2*x.count))
			}
		}
	}
	return nil
}

// tries is how often a first datagram is sent until there is no way.
const tries = 20

// try waits for a first datagram to come back, which also warms the way up.
func (t *packetTurn) try(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = t.conn.SetReadDeadline(time.Unix(1, 0)) })()
	buf := make([]byte, 1<<16)
	for range tries {
		if _, err := t.conn.WriteTo(make([]byte, packetSize), t.to); err != nil {
			return fmt.Errorf("a datagram could not be sent: %w", err)
		}
		_ = t.conn.SetReadDeadline(time.Now().Add(lostAfter))
		_, _, err := t.conn.ReadFrom(buf)
		var timeout net.Error
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !errors.As(err, &timeout) || !timeout.Timeout():
			return fmt.Errorf("the socket broke: %w", err)
		}
	}
	return fmt.Errorf("no datagram comes back from %s; what is sent there has to reach the far end (--listen)", t.to)
}

// An exchange is a measurement with what was sent, and came back, before and after it too.
type exchange struct {
	measurement
	sent, back uint64
}

// exchange keeps window datagrams on their way for the time of one figure.
func (b *bench) exchange(ctx context.Context, t packetTurn, window int) (x exchange, times []time.Duration, err error) {
	err = bounded(ctx, b.config.Duration, func(ctx context.Context) error {
		going, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		_ = t.conn.SetReadDeadline(time.Time{})
		var sent, back atomic.Uint64
		var over atomic.Bool
		came := make(chan struct{}, window)
		var both sync.WaitGroup
		both.Go(func() {
			buf := make([]byte, 1<<16)
			for {
				n, _, err := t.conn.ReadFrom(buf)
				if err != nil {
					if !over.Load() {
						cancel(fmt.Errorf("the socket broke: %w", err))
					}
					return
				}
				if n != packetSize {
					continue
				}
				back.Add(1)
				select {
				case came <- struct{}{}:
				default: // it comes after it was given up
				}
			}
		})
		both.Go(func() {
			lost := time.NewTimer(lostAfter)
			defer lost.Stop()
			p := make([]byte, packetSize)
			for free := window; going.Err() == nil && !over.Load(); {
				start := time.Now()
				for ; free > 0; free-- {
					sent.Add(1)
					if _, err := t.conn.WriteTo(p, t.to); err != nil {
						cancel(fmt.Errorf("a datagram could not be sent: %w", err))
						return
					}
				}
				lost.Reset(lostAfter)
				select {
				case <-came:
					free++
					if window == 1 {
						times = append(times, time.Since(start))
					}
				case <-lost.C:
					free = window
				case <-going.Done():
				}
			}
		})
		m, err := b.measure(going, t.instance, &back)
		over.Store(true)
		_ = pause(ctx, 10*time.Millisecond) // what is on its way is not lost
		_ = t.conn.SetReadDeadline(time.Unix(1, 0))
		cancel(nil)
		both.Wait()
		x = exchange{m, sent.Load(), back.Load()}
		return err
	})
	return x, times, err
}
