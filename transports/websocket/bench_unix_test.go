//go:build unix

package websocket

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// BenchmarkEcho sends data to an echo and back, through this package and through
// bare gorilla, in turns, and reports bytes a CPU second (both ends are in this
// process) as a ratio.
func BenchmarkEcho(b *testing.B) {
	for _, size := range []int{1 << 10, 16 << 10, 32 << 10} {
		for _, scheme := range []string{"ws", "wss"} {
			b.Run(fmt.Sprintf("%s/%dK", scheme, size>>10), func(b *testing.B) {
				p := newPair(b, scheme)
				client, server := p.connect(b)
				go echoStream(server, size)
				bare, bareEnd := bareEcho(b, p, scheme, size)
				const chunk = 16 << 20
				var ours, theirs time.Duration
				b.SetBytes(2 * chunk)
				for b.Loop() {
					ours += cpuTime(b, func() { through(b, client, size, chunk) })
					theirs += cpuTime(b, func() { throughBare(b, bare, size, chunk) })
				}
				b.ReportMetric(float64(theirs)/float64(ours), "x-bare-gorilla")
				b.ReportMetric(float64(b.N)*2*chunk/ours.Seconds()/1e6, "MB/cpu-s")
				client.Close()
				server.Close()
				bare.Close()
				bareEnd()
			})
		}
	}
}

func cpuTime(b *testing.B, f func()) time.Duration {
	b.Helper()
	now := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	start := now()
	f()
	return now() - start
}

func echoStream(c net.Conn, size int) {
	buf := make([]byte, size)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

func through(b *testing.B, c net.Conn, size, total int) {
	b.Helper()
	done := make(chan error, 1)
	go func() {
		msg := make([]byte, size)
		for sent := 0; sent < total; sent += size {
			if _, err := c.Write(msg); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	buf := make([]byte, size)
	for got := 0; got < total; {
		n, err := c.Read(buf)
		if err != nil {
			b.Fatal(err)
		}
		got += n
	}
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}

// bareEcho is gorilla's example of an echo, with buffers as large as a message
// and without a copy that it can do without.
func bareEcho(b *testing.B, p *pair, scheme string, size int) (*websocket.Conn, func()) {
	b.Helper()
	upgrader := websocket.Upgrader{ReadBufferSize: size + maxHeader, WriteBufferSize: size}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	echo := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		defer c.Close()
		for {
			kind, r, err := c.NextReader()
			if err != nil {
				return
			}
			w, err := c.NextWriter(kind)
			if err != nil {
				return
			}
			if _, err := io.Copy(w, r); err != nil {
				return
			}
			if err := w.Close(); err != nil {
				return
			}
		}
	})}
	dialer := websocket.Dialer{ReadBufferSize: size + maxHeader, WriteBufferSize: size}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if scheme == "ws" {
			_ = echo.Serve(l)
			return
		}
		echo.TLSConfig = serverTLS(b, p)
		_ = echo.ServeTLS(l, "", "")
	}()
	dialer.TLSClientConfig = clientTLS(b, p)
	c, _, err := dialer.Dial(scheme+"://"+strings.Replace(l.Addr().String(), "0.0.0.0", "127.0.0.1", 1), nil)
	if err != nil {
		b.Fatal(err)
	}
	return c, func() {
		echo.Close()
		<-ended
	}
}

func throughBare(b *testing.B, c *websocket.Conn, size, total int) {
	b.Helper()
	done := make(chan error, 1)
	go func() {
		msg := make([]byte, size)
		for sent := 0; sent < total; sent += size {
			if err := c.WriteMessage(websocket.BinaryMessage, msg); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	buf := make([]byte, size)
	for got := 0; got < total; {
		_, r, err := c.NextReader()
		if err != nil {
			b.Fatal(err)
		}
		for {
			n, err := r.Read(buf)
			got += n
			if err == io.EOF {
				break
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	}
	if err := <-done; err != nil {
		b.Fatal(err)
	}
}
