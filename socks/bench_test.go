package socks

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"pthost/ptipc"
)

// minimal is what people write when they need a SOCKS5 server without
// authentication: the yardstick of the dial rate.
func minimal(conn net.Conn) {
	defer conn.Close()
	b := make([]byte, 262)
	if _, err := io.ReadFull(conn, b[:2]); err != nil {
		return
	}
	if _, err := io.ReadFull(conn, b[:b[1]]); err != nil {
		return
	}
	if _, err := conn.Write([]byte{5, 0}); err != nil {
		return
	}
	if _, err := io.ReadFull(conn, b[:10]); err != nil { // IPv4 alone
		return
	}
	dest := net.TCPAddr{IP: b[4:8], Port: int(binary.BigEndian.Uint16(b[8:]))}
	wire, err := net.DialTCP("tcp", nil, &dest)
	if err != nil {
		return
	}
	defer wire.Close()
	if _, err := conn.Write([]byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
		return
	}
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(wire, conn)
		_ = wire.CloseWrite()
		close(ended)
	}()
	_, _ = io.Copy(conn, wire)
	_ = conn.(*net.TCPConn).CloseWrite()
	<-ended
}

// serveOneByte answers every connection with a byte and the end.
func serveOneByte(b *testing.B) string {
	l, _ := listen(b, "tcp")
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = conn.Write([]byte{1})
				conn.Close()
			}()
		}
	}()
	return l.Addr().String()
}

// BenchmarkDial compares dials through the server, with settings, with the same
// through a minimal server without any, and with its ordinary client. Both run
// in turns. "ratio" is the rate of ours to that of the minimal server.
func BenchmarkDial(b *testing.B) {
	target := serveOneByte(b)
	settings := ptipc.Opaque(`{"padding":true,"server":"192.0.2.1:443"}`)

	theirs, _ := listen(b, "tcp")
	defer theirs.Close()
	go func() {
		for {
			conn, err := theirs.Accept()
			if err != nil {
				return
			}
			go minimal(conn)
		}
	}()
	finish := func(conn net.Conn) {
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			b.Error(err)
		}
		conn.Close()
	}
	ordinary := func() {
		conn, err := net.Dial("tcp", theirs.Addr().String())
		if err != nil {
			b.Error(err)
			return
		}
		if err := ConnectUpstream(context.Background(), conn, nil, target); err != nil {
			b.Error(err)
		}
		finish(conn)
	}
	for _, network := range []string{"tcp", "unix"} {
		for _, parallel := range []int{1, 16} {
			b.Run(network+"/"+strconv.Itoa(parallel), func(b *testing.B) {
				l, dial := listen(b, network)
				start(b, &Server{Dial: func(ctx context.Context, r *Request) (net.Conn, error) {
					var d net.Dialer
					return d.DialContext(ctx, "tcp", r.Dest)
				}}, l)
				ours := func() {
					conn := dial()
					if err := Connect(context.Background(), conn, settings, target); err != nil {
						b.Error(err)
					}
					finish(conn)
				}
				var took [2]time.Duration
				measure := func(i, n int, f func()) {
					begin := time.Now()
					work := make(chan struct{})
					done := make(chan struct{})
					for range parallel {
						go func() {
							for range work {
								f()
							}
							done <- struct{}{}
						}()
					}
					for range n {
						work <- struct{}{}
					}
					close(work)
					for range parallel {
						<-done
					}
					took[i] += time.Since(begin)
				}
				for done := 0; done < b.N; done += 200 {
					n := min(200, b.N-done)
					measure(0, n, ours)
					measure(1, n, ordinary)
				}
				b.ReportMetric(float64(took[1])/float64(took[0]), "ratio")
				b.ReportMetric(float64(b.N)/took[0].Seconds(), "dials/s")
				b.ReportMetric(0, "ns/op") // it is the time of both
			})
		}
	}
}

// BenchmarkHandshake is the server's work for one connection without sockets.
func BenchmarkHandshake(b *testing.B) {
	in, err := os.ReadFile(filepath.Join(vectorDir, "README.md")) // early data
	if err != nil {
		b.Fatal(err)
	}
	in = append([]byte("\x05\x01\x80{\"padding\":true,\"server\":\"192.0.2.1:443\"}"+request[3:]), in[:16]...)
	b.ReportAllocs()
	server := new(Server)
	for b.Loop() {
		h := newHandshake(&script{in: in, piece: 1 << 20})
		if _, err := h.read(server); err != nil {
			b.Fatal(err)
		}
		h.release()
	}
}

// BenchmarkIdle reports what an idle connection costs in user memory, stacks
// included. The two ends that belong to client and target are in it, about 1 KB.
func BenchmarkIdle(b *testing.B) {
	const conns = 2000
	target, _ := listen(b, "tcp")
	defer target.Close()
	l, dial := listen(b, "unix")
	start(b, &Server{Dial: func(ctx context.Context, _ *Request) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", target.Addr().String())
	}}, l)
	held := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	before := held()
	for b.Loop() {
		var open []net.Conn
		for range conns {
			conn := dial()
			if err := Connect(context.Background(), conn, ptipc.Opaque(`{"padding":true}`), "example.com:443"); err != nil {
				b.Fatal(err)
			}
			far, err := target.Accept()
			if err != nil {
				b.Fatal(err)
			}
			open = append(open, conn, far)
		}
		b.ReportMetric((float64(held())-float64(before))/conns, "B/conn")
		for _, conn := range open {
			conn.Close()
		}
	}
}
