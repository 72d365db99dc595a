package localnet

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// What naming, guarding and identifying cost a dial, against the net package
// alone, alternating in one run.
func BenchmarkDialAccept(b *testing.B) {
	b.Run("unix", func(b *testing.B) {
		path := b.TempDir()
		if err := os.Chmod(path, 0o700); err != nil {
			b.Fatal(err)
		}
		d, err := OpenDir(path)
		if err != nil {
			b.Fatal(err)
		}
		defer d.Close()
		l, err := d.Listen("guarded")
		if err != nil {
			b.Fatal(err)
		}
		plain, err := net.Listen("unix", filepath.Join(path, "plain"))
		if err != nil {
			b.Fatal(err)
		}
		compare(b, plain, Guard(l, nil), func() (net.Conn, error) { return d.Dial(b.Context(), "guarded") })
	})
	b.Run("tcp", func(b *testing.B) {
		l, err := ListenTCP("127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		plain, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		addr, err := ParseAddr(l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		compare(b, plain, Guard(l, nil), func() (net.Conn, error) { return DialTCP(b.Context(), addr) })
	})
}

func compare(b *testing.B, plain, guarded net.Listener, dial func() (net.Conn, error)) {
	defer plain.Close()
	defer guarded.Close()
	once := func(l net.Listener, dial func() (net.Conn, error)) time.Duration {
		started := time.Now()
		c, err := dial() // the kernel completes it before Accept
		if err != nil {
			b.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		took := time.Since(started)
		for _, c := range []net.Conn{c, s} {
			if tcp, ok := c.(*net.TCPConn); ok {
				_ = tcp.SetLinger(0) // no TIME_WAIT: ports would run out
			}
			c.Close()
		}
		return took
	}
	var without, with []time.Duration
	for b.Loop() {
		without = append(without, once(plain, func() (net.Conn, error) { return net.Dial(plain.Addr().Network(), plain.Addr().String()) }))
		with = append(with, once(guarded, dial))
	}
	// Medians: other work on the machine lands on either side.
	median := func(d []time.Duration) float64 {
		slices.Sort(d)
		return float64(d[len(d)/2])
	}
	b.ReportMetric(median(without), "plain-ns")
	b.ReportMetric(median(with), "guarded-ns")
	b.ReportMetric(median(with)/median(without), "ratio")
}

func BenchmarkPeer(b *testing.B) {
	l, err := ListenTCP("127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for b.Loop() {
		if _, err := Peer(s); err != nil {
			b.Fatal(err)
		}
	}
}
