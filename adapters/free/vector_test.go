package free

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"

	"pthost/ptipc"
	"pthost/ptipc/relay"
	"pthost/ptipc/testvector"
)

const vectorDir = "../../testdata/free"

// A vector is a server-, many- or client- file of testdata/free, described in the README there.
type vector struct {
	name     string
	clause   string
	client   string // the destination; "-" for none
	sends    [][]byte
	receives []byte
	end      bool
	timeout  bool
	fail     ptipc.Class
	dial     string   // the last of
	dials    []string // what many- files have
	broken   bool
	wire     []byte
	result   string
}

func (v *vector) sent() []byte { return bytes.Join(v.sends, nil) }

func readVectors(t testing.TB, kind string) []*vector {
	t.Helper()
	var vectors []*vector
	testvector.Files(t, filepath.Join(vectorDir, kind+"-*.txt"), func(name string) func(string) error {
		v := &vector{name: name}
		vectors = append(vectors, v)
		return v.parse
	})
	return vectors
}

func (v *vector) parse(line string) (err error) {
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "#", "server", "many":
	case "clause":
		v.clause = rest
	case "client":
		v.client = rest
	case ">":
		var b []byte
		b, err = testvector.Bytes(rest)
		v.sends = append(v.sends, b)
	case "<":
		var b []byte
		b, err = testvector.Bytes(rest)
		v.receives = append(v.receives, b...)
	case "end":
		v.end = true
	case "timeout":
		v.timeout = true
	case "fail":
		v.fail, err = parseClass(rest)
	case "dial":
		v.dial, v.dials = rest, append(v.dials, rest)
	case "broken":
		v.broken = true
	case "wire":
		v.wire, err = testvector.Bytes(rest)
	case "result":
		v.result = rest
	default:
		err = fmt.Errorf("unknown line %q", line)
	}
	return err
}

func parseClass(text string) (ptipc.Class, error) {
	class, err := strconv.ParseUint(text, 16, 8)
	return ptipc.Class(class), err
}

// FREE-1 to FREE-11: every vector comes in its pieces, in one segment, byte by
// byte, and with data behind it.
func TestServerVectors(t *testing.T) {
	for _, v := range readVectors(t, "server") {
		whole := [][]byte{v.sent()}
		single := make([][]byte, 0, len(whole[0]))
		for i := range whole[0] {
			single = append(single, whole[0][i:i+1])
		}
		for _, network := range []string{"tcp", "pipe"} {
			if v.timeout && network != "pipe" || v.end && network == "pipe" {
				continue // time passes in a bubble, where there are no sockets; a pipe has no half-close
			}
			run := func(name string, sends [][]byte, behind string) {
				t.Run(v.name+"/"+network+"/"+name, func(t *testing.T) {
					if network == "pipe" {
						synctest.Test(t, func(t *testing.T) { runServerVector(t, v, network, sends, behind) })
					} else {
						runServerVector(t, v, network, sends, behind)
					}
				})
			}
			run("pieces", v.sends, "")
			run("whole", whole, "")
			run("bytes", single, "")
			if v.dial != "" && v.fail == 0 && !v.end {
				run("behind", [][]byte{append(whole[0], "behind"...)}, "behind")
			}
		}
	}
}

func runServerVector(t *testing.T, v *vector, network string, sends [][]byte, behind string) {
	type dialled struct {
		dest string
		far  net.Conn
	}
	dials := make(chan dialled, 1)
	s, open := startServer(t, network, drainTimeout, func(_ context.Context, _, dest string) (net.Conn, error) {
		if v.fail != 0 {
			dials <- dialled{dest, nil}
			return nil, ptipc.WithClass(v.fail, errors.New("as the vector says"))
		}
		near, far := connected(t, network)
		dials <- dialled{dest, far}
		return near, nil
	})
	client := open()
	defer client.Close()

	written := make(chan struct{})
	go func() {
		defer close(written)
		for _, b := range sends {
			if _, err := client.Write(b); err != nil {
				return // refused before everything was sent
			}
		}
		if v.end {
			_ = client.(*net.TCPConn).CloseWrite()
		}
	}()
	if v.dial == "" || v.fail != 0 {
		got, err := io.ReadAll(client)
		// A client that has sent more than the server wanted can see a reset behind the answer.
		if !bytes.Equal(got, v.receives) {
			t.Errorf("%s: the server sent % x, then %v; want % x", v.clause, got, err, v.receives)
		}
	} else if got := readExactly(t, client, len(v.receives)); !bytes.Equal(got, v.receives) {
		t.Errorf("%s: the server sent % x; want % x", v.clause, got, v.receives)
	}
	if v.dial == "" || v.fail != 0 {
		_ = client.SetWriteDeadline(past) // whatever is still being sent
		<-written
	}
	if v.dial == "" {
		client.Close()
		_ = s.Close() // no more dials after this
		if len(dials) > 0 {
			t.Errorf("%s: the server dialled %q", v.clause, (<-dials).dest)
		}
		if failed := s.Stats().Failed; failed != 1+7 {
			t.Errorf("%d streams have failed, want 1 and the carrier's 7", failed)
		}
		return
	}
	d := <-dials
	if d.dest != v.dial {
		t.Errorf("%s: the server dialled %q, want %q", v.clause, d.dest, v.dial)
	}
	if d.far == nil {
		return
	}
	first := string(v.wire) + behind
	if !v.end {
		first += "later"
		go func() {
			<-written // the vector's own bytes come first, in small pieces some of them
			_, _ = client.Write([]byte("later"))
		}()
	}
	if got := string(readExactly(t, d.far, len(first))); got != first {
		t.Errorf("%s: the wire got %q, want %q", v.clause, got, first)
	}
	<-written
	if v.end {
		mustEnd(t, d.far)
	}
	go func() { _, _ = d.far.Write([]byte("back")) }()
	if got := string(readExactly(t, client, 4)); got != "back" {
		t.Errorf("%s: the client got %q", v.clause, got)
	}
	d.far.Close()
	client.Close()
	_ = s.Close()
	want := ptipc.TransportStats{Opened: 1, Failed: 7, Received: uint64(len(first)), Sent: 4}
	if got := s.Stats(); got != want {
		t.Errorf("%s: %+v, want %+v", v.clause, got, want)
	}
}

// FREE-5 to FREE-9.
func TestClientVectors(t *testing.T) {
	for _, v := range readVectors(t, "client") {
		for _, network := range []string{"tcp", "pipe"} {
			for _, piece := range []int{1, 16} {
				t.Run(fmt.Sprintf("%s/%s/%d", v.name, network, piece), func(t *testing.T) {
					runClientVector(t, v, network, piece)
				})
			}
		}
	}
}

func runClientVector(t *testing.T, v *vector, network string, piece int) {
	near, far := connected(t, network)
	opened := false
	meter := new(relay.Meter)
	inner := meter.Transport(map[string]ptipc.ConnectionFactory{
		"plain": meter.Factory(true, func(context.Context, ptipc.Opaque, string) (net.Conn, error) {
			opened = true
			return near, nil
		}),
	}, nil)
	transport, err := Client(func(context.Context, ptipc.Opaque, ptipc.Env) (*ptipc.Transport, error) { return inner, nil })(t.Context(), nil, ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	defer transport.Close()

	got := make(chan []byte, 1)
	go func() {
		b := make([]byte, len(v.sent()))
		n, _ := io.ReadFull(far, b)
		answer := v.receives
		if v.result == "ok" {
			answer = append(bytes.Clone(answer), "next"...)
		}
		for len(answer) > 0 {
			m, err := far.Write(answer[:min(piece, len(answer))])
			if err != nil {
				break // the client has seen enough
			}
			answer = answer[m:]
		}
		if v.result != "ok" {
			far.Close()
		}
		got <- b[:n]
	}()
	conn, err := transport.Connections["plain"].Dial(t.Context(), nil, strings.TrimPrefix(v.client, "-"))
	if v.result == "ok" {
		if err != nil {
			t.Fatalf("%s: %v", v.clause, err)
		}
		if next := string(readExactly(t, conn, 4)); next != "next" {
			t.Errorf("%s: behind the answer there was %q", v.clause, next)
		}
		if s := conn.Stats(); s.Received != 4 || s.Sent != 0 {
			t.Errorf("the statistics count more than the stream: %+v", s)
		}
		conn.Close()
	} else {
		class, perr := parseClass(v.result)
		if perr != nil {
			t.Fatal(perr)
		}
		if !errors.Is(err, class) {
			t.Errorf("%s: %v is of class %v, want %v", v.clause, err, ptipc.ClassOf(err), class)
		}
		if opened != (len(v.sends) > 0) {
			t.Errorf("%s: a carrier was opened: %v", v.clause, opened)
		}
		if opened && near.SetDeadline(past) == nil {
			t.Errorf("%s: the carrier was left open", v.clause)
		}
		if n := must(transport.Stats(t.Context())).Failed; n != 1 {
			t.Errorf("%d dials have failed, want 1", n)
		}
	}
	near.Close()
	if b := <-got; !bytes.Equal(b, v.sent()) {
		t.Errorf("%s: the client sent % x, want % x", v.clause, b, v.sent())
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
