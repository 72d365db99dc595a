package websocket

import (
	"bytes"
	"context"
	"crypto/sha256"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"

	"pthost/ptipc"
)

// A countingConn counts what reaches the network.
type countingConn struct {
	net.Conn
	writes *atomic.Int32
}

func (c countingConn) Write(b []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(b)
}

// Under TLS a frame is one write of the network, and what has come of several records
// is one Read.
func TestRecordsTogether(t *testing.T) {
	const frames = 32
	p := generated(t, "wss")
	p.listen(t)
	writes := new(atomic.Int32)
	p.open(t, ptipc.Env{DialOut: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return countingConn{c, writes}, nil
	}})
	client, server := p.connect(t)
	defer client.Close()
	defer server.Close()

	data := make([]byte, maxPayload)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data) // never fails
	want, got := sha256.New(), sha256.New()
	var largest int
	read := make(chan error, 1)
	go func() {
		b := make([]byte, maxPayload)
		for left := frames * len(data); left > 0; {
			n, err := server.Read(b[:min(len(b), left)])
			got.Write(b[:n])
			largest = max(largest, n)
			left -= n
			if err != nil {
				read <- err
				return
			}
		}
		read <- nil
	}()
	before := writes.Load()
	for range frames {
		if _, err := client.Write(data); err != nil {
			t.Fatal(err)
		}
		want.Write(data)
	}
	if n := writes.Load() - before; n != frames {
		t.Errorf("%d frames were %d writes", frames, n)
	}
	if err := <-read; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Error("what came is not what was sent")
	}
	if largest <= 16<<10 {
		t.Errorf("no Read gave more than one record: the largest has %d bytes", largest)
	}
}

// What TLS writes on its own while a frame is kept back comes behind the frame, and
// what waits behind bytes that a deadline has kept comes behind those.
func TestCork(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	var g group
	w := g.add(near, nil)
	w.cork()
	for _, part := range []string{"one ", "frame"} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatal(n, err)
		}
	}
	done := make(chan error, 1)
	go func() {
		err := w.uncork()
		if err == nil {
			_, err = w.Write([]byte(", more"))
		}
		done <- err
	}()
	b := make([]byte, 64)
	for _, want := range []string{"one frame", ", more"} {
		n, err := far.Read(b)
		if got := string(b[:n]); got != want || err != nil {
			t.Errorf("got %q and %v, want %q in one piece", got, err, want)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	g.close()
}
