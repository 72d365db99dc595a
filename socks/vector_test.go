package socks

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pthost/ptipc"
)

const vectorDir = "../testdata/socks"

// A vector is one file of testdata/socks, described in the README there.
type vector struct {
	name     string
	clause   string
	server   string // "" if a client is tested
	client   string // the destination; "-" for a bound one
	sends    [][]byte
	receives []byte
	end      bool
	timeout  bool
	fail     ptipc.Class
	dials    bool
	dial     string
	settings ptipc.Opaque
	result   string
}

func (v *vector) sent() []byte { return bytes.Join(v.sends, nil) }

func readVectors(t testing.TB) []*vector {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(vectorDir, "*.txt"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no vectors in %s: %v", vectorDir, err)
	}
	vectors := make([]*vector, 0, len(names))
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		v := &vector{name: strings.TrimSuffix(filepath.Base(name), ".txt")}
		for i, line := range strings.Split(strings.TrimSuffix(string(text), "\n"), "\n") {
			if err := v.parse(line); err != nil {
				t.Fatalf("%s:%d: %v", name, i+1, err)
			}
		}
		if v.clause == "" || (v.server == "") == (v.client == "") {
			t.Fatalf("%s: needs a clause, and a server or a client", name)
		}
		vectors = append(vectors, v)
	}
	return vectors
}

func (v *vector) parse(line string) (err error) {
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "#":
	case "clause":
		v.clause = rest
	case "server":
		v.server = rest
	case "client":
		v.client = rest
	case ">":
		var b []byte
		b, err = parseBytes(rest)
		v.sends = append(v.sends, b)
	case "<":
		var b []byte
		b, err = parseBytes(rest)
		v.receives = append(v.receives, b...)
	case "end":
		v.end = true
	case "timeout":
		v.timeout = true
	case "fail":
		var class uint64
		class, err = strconv.ParseUint(rest, 16, 8)
		v.fail = ptipc.Class(class)
	case "dial":
		v.dials = true
		v.dial = strings.TrimPrefix(rest, "-")
	case "settings":
		v.settings, err = parseBytes(rest)
	case "result":
		v.result = rest
	default:
		err = fmt.Errorf("unknown line %q", line)
	}
	return err
}

func parseBytes(text string) ([]byte, error) {
	var out []byte
	for text != "" {
		if quoted, ok := strings.CutPrefix(text, "'"); ok {
			s, rest, ok := strings.Cut(quoted, "'")
			if !ok {
				return nil, fmt.Errorf("no end of %q", text)
			}
			out = append(out, s...)
			text = strings.TrimPrefix(rest, " ")
			continue
		}
		word, rest, _ := strings.Cut(text, " ")
		text = rest
		digits, count, repeated := strings.Cut(word, "*")
		b, err := hex.DecodeString(digits)
		if err != nil || len(b) != 1 {
			return nil, fmt.Errorf("%q is not a byte", word)
		}
		n := 1
		if repeated {
			if n, err = strconv.Atoi(count); err != nil {
				return nil, err
			}
		}
		out = append(out, bytes.Repeat(b, n)...)
	}
	return out, nil
}

// SOCKS-5: every vector is run in one segment, byte by byte, and in one
// segment with early data behind it.
func TestServerVectors(t *testing.T) {
	for _, v := range readVectors(t) {
		if v.server == "" {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			whole := [][]byte{v.sent()}
			single := make([][]byte, 0, len(whole[0]))
			for i := range whole[0] {
				single = append(single, whole[0][i:i+1])
			}
			for _, network := range []string{"tcp", "unix", "pipe"} {
				if v.timeout && network != "pipe" || v.end && network == "pipe" {
					continue // time passes in a bubble, where there are no sockets; a pipe has no half-close
				}
				run := func(name string, sends [][]byte, early string) {
					t.Run(network+"/"+name, func(t *testing.T) {
						if network == "pipe" {
							synctest.Test(t, func(t *testing.T) { runServerVector(t, v, network, sends, early) })
						} else {
							runServerVector(t, v, network, sends, early)
						}
					})
				}
				run("pieces", v.sends, "")
				run("whole", whole, "")
				run("bytes", single, "")
				if !v.end && !v.timeout {
					run("early", [][]byte{append(bytes.Clone(whole[0]), "early"...)}, "early")
				}
			}
		})
	}
}

// login makes settings of username and password, for the vectors of "server login".
func login(username, password string) (ptipc.Opaque, error) {
	if username == "refused" {
		return nil, errors.New("as the vector says")
	}
	return json.Marshal(map[string]string{"username": username, "password": password})
}

func runServerVector(t *testing.T, v *vector, network string, sends [][]byte, early string) {
	type dialed struct {
		dest     string
		settings ptipc.Opaque
		far      net.Conn
	}
	dials := make(chan dialed, 1)
	s := &Server{Bound: v.server == "bound", Plain: v.server == "plain"}
	if v.server == "login" {
		s.Login = login
	}
	s.Dial = func(_ context.Context, r *Request) (net.Conn, error) {
		if v.fail != 0 {
			dials <- dialed{r.Dest, r.Settings, nil}
			return nil, ptipc.WithClass(v.fail, errors.New("as the vector says"))
		}
		near, far := connected(t, network)
		dials <- dialed{r.Dest, r.Settings, far}
		return near, nil
	}
	l, dial := listen(t, network)
	start(t, s, l)
	client := dial()
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
			_ = client.(interface{ CloseWrite() error }).CloseWrite()
		}
	}()
	if !v.dials || v.fail != 0 {
		got, err := io.ReadAll(client)
		// A client that has sent more than the server wanted can see a reset behind the answer.
		if !bytes.Equal(got, v.receives) {
			t.Errorf("%s: the server sent % x, then %v; want % x", v.clause, got, err, v.receives)
		}
	} else if got := readExactly(t, client, len(v.receives)); !bytes.Equal(got, v.receives) {
		t.Errorf("%s: the server sent % x; want % x", v.clause, got, v.receives)
	}
	_ = client.SetWriteDeadline(time.Unix(1, 0)) // whatever is still being sent
	<-written
	_ = client.SetWriteDeadline(time.Time{})

	if !v.dials {
		client.Close()
		if len(dials) > 0 {
			d := <-dials
			t.Errorf("%s: the server dialled %q with settings %q", v.clause, d.dest, d.settings)
		}
		return
	}
	d := <-dials
	if d.dest != v.dial || string(d.settings) != string(v.settings) {
		t.Errorf("%s: the server dialled %q with settings %q, want %q and %q", v.clause, d.dest, d.settings, v.dial, v.settings)
	}
	if d.far == nil {
		return
	}
	go func() { _, _ = client.Write([]byte("later")) }()
	if got := string(readExactly(t, d.far, len(early)+5)); got != early+"later" {
		t.Errorf("%s: the wire got %q", v.clause, got)
	}
	go func() { _, _ = d.far.Write([]byte("back")) }()
	if got := string(readExactly(t, client, 4)); got != "back" {
		t.Errorf("%s: the client got %q", v.clause, got)
	}
	d.far.Close()
	client.Close()
}

func TestClientVectors(t *testing.T) {
	for _, v := range readVectors(t) {
		if v.server != "" {
			continue
		}
		for _, network := range []string{"tcp", "unix", "pipe"} {
			for _, piece := range []int{1, len(v.receives)} {
				t.Run(fmt.Sprintf("%s/%s/%d", v.name, network, piece), func(t *testing.T) {
					runClientVector(t, v, network, piece)
				})
			}
		}
	}
}

func runClientVector(t *testing.T, v *vector, network string, piece int) {
	near, far := connected(t, network)
	got := make(chan []byte)
	go func() {
		b := make([]byte, len(v.sent()))
		n, _ := io.ReadFull(far, b)
		reply := v.receives
		if v.result == "ok" {
			reply = append(bytes.Clone(reply), "next"...)
		}
		for len(reply) > 0 {
			m, err := far.Write(reply[:min(max(piece, 1), len(reply))])
			if err != nil {
				break // the client has seen enough
			}
			reply = reply[m:]
		}
		if v.result != "ok" {
			far.Close()
		}
		got <- b[:n]
	}()
	err := Connect(t.Context(), near, v.settings, strings.TrimPrefix(v.client, "-"))
	if v.result == "ok" {
		if err != nil {
			t.Errorf("%s: %v", v.clause, err)
		} else if next := string(readExactly(t, near, 4)); next != "next" {
			t.Errorf("%s: behind the reply there was %q", v.clause, next)
		}
	} else {
		class, perr := strconv.ParseUint(v.result, 16, 8)
		if perr != nil {
			t.Fatal(perr)
		}
		if !errors.Is(err, ptipc.Class(class)) {
			t.Errorf("%s: %v is of class %v, want %v", v.clause, err, ptipc.ClassOf(err), ptipc.Class(class))
		}
	}
	near.Close()
	if b := <-got; !bytes.Equal(b, v.sent()) {
		t.Errorf("%s: the client sent % x, want % x", v.clause, b, v.sent())
	}
}
