package stdio_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"unicode/utf8"

	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

func Example() {
	var pipe bytes.Buffer

	// The child's side.
	out := stdio.NewWriter(&pipe)
	for _, m := range []stdio.Message{
		stdio.Version{Version: "1"},
		stdio.Log{Level: slog.LevelWarn, Message: "the clock is slow"},
		stdio.CMethod{
			Name: "example", Protocol: stdio.ProtocolSOCKS5, Addr: "unix:example.sock",
			Args: stdio.Args{{Key: stdio.ArgBound, Value: "1"}},
		},
		stdio.CMethodsDone{},
	} {
		if err := out.Send(m); err != nil {
			fmt.Println(err)
		}
	}
	fmt.Print(pipe.String())

	// The host's side.
	in := stdio.NewReader(&pipe)
	for {
		line, err := in.ReadLine()
		if errors.Is(err, stdio.ErrTooLong) {
			continue
		}
		if err != nil {
			break
		}
		m, err := stdio.Parse(line)
		if err != nil {
			continue
		}
		if factory, ok := m.(stdio.CMethod); ok {
			fmt.Println(factory.Name, factory.Addr, factory.Args.Bound())
		}
	}
	// Output:
	// VERSION 1
	// LOG SEVERITY=warning MESSAGE="the clock is slow"
	// CMETHOD example socks5 unix:example.sock ARGS:bound=1
	// CMETHODS DONE
	// example unix:example.sock true
}

// Append refuses what a reader could not take, and leaves dst as it was.
func TestAppendRefuses(t *testing.T) {
	long := strings.Repeat("x", stdio.MaxLine)
	good := func() stdio.CMethod {
		return stdio.CMethod{Name: "e", Protocol: stdio.ProtocolSOCKS5, Addr: "unix:s"}
	}
	with := func(change func(*stdio.CMethod)) stdio.CMethod { m := good(); change(&m); return m }
	for what, m := range map[string]stdio.Message{
		"LF (LINE-1)":                   stdio.EnvError{Text: "a\nCMETHODS DONE"},
		"CR (LINE-1)":                   stdio.EnvError{Text: "a\rb"},
		"NUL (LINE-1)":                  stdio.ProxyError{Text: "a\x00b"},
		"not UTF-8 (LINE-1)":            stdio.VersionError{Text: "a\xff"},
		"too long (LINE-1)":             stdio.EnvError{Text: long},
		"too long by escapes (LINE-1)":  stdio.Log{Message: strings.Repeat("\x00", stdio.MaxLine/4)},
		"space at the end":              stdio.EnvError{Text: "a "},
		"space at the beginning":        stdio.EnvError{Text: " a"},
		"no version (LINE-3)":           stdio.Version{},
		"two words (LINE-3)":            stdio.Version{Version: "1 2"},
		"name (LINE-4)":                 with(func(m *stdio.CMethod) { m.Name = "a b" }),
		"no name (LINE-4)":              with(func(m *stdio.CMethod) { m.Name = "" }),
		"protocol (LINE-4)":             with(func(m *stdio.CMethod) { m.Protocol = "socks4" }),
		"turn on a unix socket (PKT-3)": with(func(m *stdio.CMethod) { m.Protocol = "turn" }),
		"turn without secrets (PKT-3)": with(func(m *stdio.CMethod) {
			m.Protocol, m.Addr, m.Args = "turn", "127.0.0.1:1", stdio.Args{{Key: "username", Value: "u"}, {Key: "realm", Value: "r"}}
		}),
		"address (LINE-5)":               with(func(m *stdio.CMethod) { m.Addr = "0.0.0.0:80" }),
		"empty key (LINE-6)":             with(func(m *stdio.CMethod) { m.Args = stdio.Args{{Value: "1"}} }),
		"space in a value (LINE-6)":      with(func(m *stdio.CMethod) { m.Args = stdio.Args{{Key: "a", Value: "b c"}} }),
		"LF in a value (LINE-6)":         with(func(m *stdio.CMethod) { m.Args = stdio.Args{{Key: "a", Value: "b\nc"}} }),
		"error without a class (LINE-8)": stdio.CMethodError{Name: "e", Message: "m"},
		"error without a message":        stdio.CMethodError{Name: "e", Class: ptipc.ErrGeneral},
		"error without a name (LINE-8)":  stdio.CMethodError{Class: ptipc.ErrGeneral, Message: "m"},
		"server name (SRV-1)":            stdio.SMethod{Name: "a b", Addr: "192.0.2.1:443"},
		"server port 0 (SRV-1)":          stdio.SMethod{Name: "e", Addr: "192.0.2.1:0"},
		"server address (SRV-1)":         stdio.SMethod{Name: "e", Addr: "localhost:443"},
		"server LF (SRV-1)":              stdio.SMethod{Name: "e", Addr: "192.0.2.1:443", Args: stdio.Args{{Key: "a", Value: "b\nc"}}},
		"server error without a message": stdio.SMethodError{Name: "e", Class: ptipc.ErrGeneral},
		"body (SIG-1)":                   stdio.CMessage{Message: ptipc.Message{Body: ptipc.Opaque(`[]`)}},
		"double key in a body (SIG-1)":   stdio.CMessage{Message: ptipc.Message{Body: ptipc.Opaque(`{"a":1,"a":1}`)}},
		"peer (SIG-2)":                   stdio.SMessage{Message: ptipc.Message{Peer: "\xff"}},
		"size of a message (SIG-4)":      stdio.SMessage{Message: ptipc.Message{Peer: strings.Repeat("\x00", stdio.MaxSignal/6)}},
		"empty status (LINE-10)":         stdio.Status{},
		"status name (LINE-10)":          stdio.Status{Transport: "a b"},
		"status key (LINE-10)":           stdio.Status{Attrs: []stdio.KV{{Key: "a b", Value: "1"}}},
		"empty status key (LINE-10)":     stdio.Status{Attrs: []stdio.KV{{Value: "1"}}},
		"TRANSPORT twice (LINE-10)":      stdio.Status{Transport: "e", Attrs: []stdio.KV{{Key: "TRANSPORT", Value: "f"}}},
		"client (STAT-3)":                stdio.StatsRequest{ID: 1, Client: "@a b"},
		"statistics (STAT-3)":            stdio.StatsReply{ID: 1, JSON: json.RawMessage(`{`)},
		"keyword (LINE-1)":               stdio.Unknown{Keyword: "A B"},
		"LF in the rest (LINE-1)":        stdio.Unknown{Keyword: "A", Rest: "b\nc"},
	} {
		t.Run(what, func(t *testing.T) {
			dst, err := stdio.Append([]byte("before"), m)
			if err == nil || string(dst) != "before" {
				t.Fatalf("%q, error %v", dst, err)
			}
			if tooLong := strings.HasPrefix(what, "too long"); errors.Is(err, stdio.ErrTooLong) != tooLong {
				t.Errorf("ErrTooLong or not: %v", err)
			}
		})
	}
	if _, err := stdio.Append(nil, good()); err != nil {
		t.Errorf("the message that the others were made from: %v", err)
	}
}

// The longest line and the longest launch can be written, and read (LINE-1, ARG-4).
func TestLongestLines(t *testing.T) {
	text := strings.Repeat("x", stdio.MaxLine-len("ENV-ERROR \n"))
	line, err := stdio.Append(nil, stdio.EnvError{Text: text})
	if err != nil || len(line) != stdio.MaxLine {
		t.Fatalf("%d bytes, %v", len(line), err)
	}
	if m, err := stdio.Parse(line); err != nil || m != (stdio.EnvError{Text: text}) {
		t.Error(err)
	}
	if _, err := stdio.Append(nil, stdio.EnvError{Text: text + "x"}); !errors.Is(err, stdio.ErrTooLong) {
		t.Error(err)
	}

	around := len(`{"config":{"a":""},"host":{}}` + "\n")
	value := strings.Repeat("x", stdio.MaxLaunch-around)
	line, err = stdio.Launch{Config: ptipc.Opaque(`{"a":"` + value + `"}`)}.Append(nil)
	if err != nil || len(line) != stdio.MaxLaunch {
		t.Fatalf("%d bytes, %v", len(line), err)
	}
	if _, err := stdio.NewReader(bytes.NewReader(line)).ReadLaunch(); err != nil {
		t.Error(err)
	}
	if line, err := (stdio.Launch{Config: ptipc.Opaque(`{"a":"x` + value + `"}`)}).Append(nil); err == nil {
		t.Errorf("wrote %d bytes", len(line))
	}
}

// The value of an ARGS key can be a secret.
func TestAppendDoesNotRepeatArgs(t *testing.T) {
	_, err := stdio.Append(nil, stdio.CMethod{
		Name: "e", Protocol: stdio.ProtocolSOCKS5, Addr: "unix:s",
		Args: stdio.Args{{Key: "password", Value: "my hunter2"}},
	})
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Error(err)
	}
}

// Levels between those of LINE-9 become the one below.
func TestLogLevels(t *testing.T) {
	for level, want := range map[slog.Level]string{
		slog.LevelError + 4: "error", slog.LevelWarn + 1: "warning", slog.LevelInfo + 3: "notice",
		slog.LevelInfo + 1: "info", slog.LevelDebug + 1: "debug", slog.LevelDebug - 4: "debug",
	} {
		line, err := stdio.Append(nil, stdio.Log{Level: level, Message: "m"})
		if got := string(line); err != nil || got != "LOG SEVERITY="+want+" MESSAGE=m\n" {
			t.Errorf("level %d: %q, %v", level, got, err)
		}
	}
}

// JSON that was written for people still goes on one line (STAT-3).
func TestStatsReplyIsCompact(t *testing.T) {
	line, err := stdio.Append(nil, stdio.StatsReply{ID: 7, JSON: json.RawMessage("{\n\t\"active\": 1\n}")})
	if want := "STATS 7 {\"active\":1}\n"; err != nil || string(line) != want {
		t.Errorf("%q, %v", line, err)
	}
}

func TestOneLine(t *testing.T) {
	got := stdio.OneLine(" a\r\nb\x00\xffc\x1b[0m\t")
	if want := "a  b \uFFFDc [0m"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	long := stdio.OneLine(strings.Repeat("é", 40_000))
	if len(long) > 4096 || len(long) < 4000 || !utf8.ValidString(long) {
		t.Errorf("%d bytes, UTF-8 %t", len(long), utf8.ValidString(long))
	}
	if _, err := stdio.Append(nil, stdio.EnvError{Text: long}); err != nil {
		t.Error(err)
	}
}

// An error gives the application the answers that it gives in the child
// (LINE-8, ERR-2, ERR-3).
func TestCMethodErrorCrosses(t *testing.T) {
	config := &ptipc.ConfigError{Pointer: "/server", Value: `"x"`, Problem: "is not host:port", Remedy: `write "host:port"`}
	for what, err := range map[string]error{
		"a class":                 fmt.Errorf("dial: %w", ptipc.ErrRefused),
		"nothing known":           errors.New("it broke\nin two lines"),
		"a configuration error":   fmt.Errorf("open: %w", config),
		"another class for it":    ptipc.WithClass(ptipc.ErrTimedOut, config),
		"more than a line can be": errors.New(strings.Repeat("<&\x01", 100_000)),
	} {
		t.Run(what, func(t *testing.T) {
			line, appendErr := stdio.Append(nil, stdio.NewCMethodError("e", err))
			if appendErr != nil {
				t.Fatal(appendErr)
			}
			m, parseErr := stdio.Parse(line)
			if parseErr != nil {
				t.Fatal(parseErr)
			}
			got := fmt.Errorf("start: %w", m.(stdio.CMethodError))
			if class := ptipc.ClassOf(err); !errors.Is(got, class) || ptipc.ClassOf(got) != class {
				t.Errorf("class %v became %v", class, ptipc.ClassOf(got))
			}
			var before, after *ptipc.ConfigError
			if errors.As(err, &before) != errors.As(got, &after) || before != nil && *before != *after {
				t.Errorf("%+v became %+v", before, after)
			}
			if short := err.Error(); len(short) < 1000 && !strings.HasSuffix(got.Error(), "e: "+short) {
				t.Errorf("%q became %q", err, got)
			}
		})
	}
}

// The same for servers: a line of its own, and the same answers (SRV-1).
func TestSMethodErrorCrosses(t *testing.T) {
	config := &ptipc.ConfigError{Pointer: "/listen", Value: "x", Problem: "is not ip:port", Remedy: "write ip:port"}
	line, err := stdio.Append(nil, stdio.NewSMethodError("e", config))
	if err != nil || !strings.HasPrefix(string(line), "SMETHOD-ERROR e {") {
		t.Fatalf("%q, %v", line, err)
	}
	m, err := stdio.Parse(line)
	if err != nil {
		t.Fatal(err)
	}
	got, ok := m.(error)
	var after *ptipc.ConfigError
	if !ok || !errors.As(got, &after) || *after != *config || !errors.Is(got, ptipc.ErrSettingsRefused) || !strings.HasPrefix(got.Error(), "e: ") {
		t.Errorf("%v", got)
	}
}

// A message of the greatest size goes through whole, whatever it is made of (SIG-4).
func TestLargestSignal(t *testing.T) {
	for _, filling := range []string{"x", "<", "&"} {
		around := len(`{"peer":"p","body":{"a":""}}`)
		text := strings.Repeat(filling, stdio.MaxSignal-around)
		m := ptipc.Message{Peer: "p", Body: ptipc.Opaque(`{"a":"` + text + `"}`)}
		line, err := stdio.Append(nil, stdio.SMessage{Message: m})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := stdio.Parse(line); err != nil || !reflect.DeepEqual(got, stdio.SMessage{Message: m}) {
			t.Error(err)
		}
		m.Peer = "pp"
		if dst, err := stdio.AppendSignal([]byte("before"), m); err == nil || string(dst) != "before" || !strings.Contains(err.Error(), "SIG-4") {
			t.Errorf("%.20q, %v", dst, err)
		}
	}
}

// A message without a body has the empty one.
func TestSignalWithoutBody(t *testing.T) {
	text, err := stdio.AppendSignal([]byte("before "), ptipc.Message{})
	if err != nil || string(text) != `before {"body":{}}` {
		t.Errorf("%q, %v", text, err)
	}
}

// Nothing of a body gets into an error, by which it would get into a log.
func TestSignalErrorsHideTheBody(t *testing.T) {
	for _, text := range []string{
		`{"body":{"hunter2":1,"hunter2":1}}`,
		`{"body":"hunter2"}`,
		`{"body":{},"hunter2":{}}`,
		`{"body":{},"peer":{"hunter2":1}}`,
		`{"body":{"a":hunter2}}`,
		`hunter2`,
	} {
		_, err := stdio.ParseSignal([]byte(text))
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v", text, err)
		}
		for _, parse := range []func([]byte) (stdio.Message, error){stdio.Parse, stdio.ParseHost} {
			if _, err := parse([]byte("CMESSAGE " + text)); err == nil || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s: %v", text, err)
			}
		}
	}
}

// What cannot be used on the other side is not written, and nothing that was
// generated is shown (SRV-6).
func TestGeneratedRefuses(t *testing.T) {
	good := ptipc.Opaque(`{"secret":"hunter2","server":"192.0.2.1:443"}`)
	for what, bad := range map[string]ptipc.Opaque{
		"JSON object":  ptipc.Opaque(`["hunter2"]`),
		"UTF-8":        ptipc.Opaque("{\"a\":\"hunter2\xff\"}"),
		"/a~1b/1/port": ptipc.Opaque(`{"a/b":[1,{"port":0,"secret":"hunter2"}]}`),
		"/server":      ptipc.Opaque(`{"server":"hunter2:0"}`),
		"1048576":      ptipc.Opaque(`{"a":"hunter2` + strings.Repeat("x", stdio.MaxGenerated) + `"}`),
	} {
		for _, g := range []stdio.Generated{{Client: good, Server: bad}, {Client: bad, Server: good}} {
			dst, err := g.Append([]byte("before"))
			if err == nil || string(dst) != "before" {
				t.Fatalf("%s: %.20q, error %v", what, dst, err)
			}
			if !strings.Contains(err.Error(), what) || strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	line, err := stdio.Generated{Client: ptipc.Opaque("{\n \"port\": 10\n}")}.Append(nil)
	if want := `{"client":{"port":10},"server":{}}` + "\n"; err != nil || string(line) != want {
		t.Errorf("%q, %v", line, err)
	}
	shown := fmt.Sprintf("%v %+v %s", stdio.Generated{Client: good}, stdio.Generated{Client: good}, stdio.Generated{Client: good}.LogValue())
	if strings.Contains(shown, "hunter2") {
		t.Error(shown)
	}
}

// A message that does not say what is wrong with the configuration is completed, since it
// is all that many people see (ERR-3).
func TestCMethodErrorTellsOfTheConfiguration(t *testing.T) {
	config := &ptipc.ConfigError{Pointer: "/port", Value: "0", Problem: "is no port", Remedy: "write 443"}
	for _, message := range []string{"it did not start", "it did not start: " + config.Error()} {
		got := stdio.CMethodError{Name: "e", Class: ptipc.ClassOf(config), Message: message, Config: config}.Error()
		if want := "e: it did not start: " + config.Error(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// A CMethodError without a message still says something.
func TestCMethodErrorText(t *testing.T) {
	config := &ptipc.ConfigError{Pointer: "/a", Problem: "is empty"}
	if got := (stdio.CMethodError{Name: "e", Class: ptipc.ErrRefused}).Error(); got != "e: connection refused" {
		t.Error(got)
	}
	if got := (stdio.CMethodError{Name: "e", Class: ptipc.ErrRefused, Config: config}).Error(); got != "e: /a: is empty" {
		t.Error(got)
	}
}

// A line that is not understood is shown, but not its secrets, however long it is.
func TestParseErrorIsMaskedAndShort(t *testing.T) {
	pad := strings.Repeat("x", 1000)
	for _, line := range []string{
		"CMETHOD e ARGS:password=hunter2",
		"LOG MESSAGE=\"socks5://user:hunter2@h",
		"{\"host\":{\"proxy\":\"socks5://u:hunter2@h\"}}",
		"LOG SEVERITY=info socks5://user:hunter2" + pad + "@h",
	} {
		_, err := stdio.Parse([]byte(line))
		var parseErr *stdio.ParseError
		if !errors.As(err, &parseErr) {
			t.Fatalf("%q: %v", line, err)
		}
		for _, shown := range []string{err.Error(), fmt.Sprintf("%+v", err)} {
			if strings.Contains(shown, "hunter2") || len(shown) > 1000 {
				t.Errorf("%q shows as %q", line, shown)
			}
		}
	}
	_, err := stdio.Parse([]byte("CMETHOD " + pad))
	if err == nil || len(err.Error()) > 2000 || !strings.Contains(err.Error(), "LINE-4") {
		t.Errorf("%d bytes: %.100s", len(err.Error()), err)
	}
}

// ReadLine gives every line before it reads on: a host acts on what has come.
func TestReaderDoesNotWaitForMore(t *testing.T) {
	pr, pw := io.Pipe()
	reader := stdio.NewReader(pr)
	for range 3 {
		go func() { _, _ = io.WriteString(pw, "CMETHODS DONE\n") }()
		if line, err := reader.ReadLine(); err != nil || string(line) != "CMETHODS DONE" {
			t.Fatalf("%q, %v", line, err)
		}
	}
	_ = pw.Close()
	for range 2 {
		if _, err := reader.ReadLine(); !errors.Is(err, io.EOF) {
			t.Error(err)
		}
	}
}

// An error of the stream ends it, also in the middle of an over-long line.
func TestReaderKeepsErrors(t *testing.T) {
	broken := errors.New("broken")
	for _, text := range []string{"A\n", "A\npart", "A\n" + strings.Repeat("x", 2*stdio.MaxLine)} {
		reader := stdio.NewReader(&breaksOnce{strings.NewReader(text), broken})
		if line, err := reader.ReadLine(); err != nil || string(line) != "A" {
			t.Fatalf("%q, %v", line, err)
		}
		_, err := reader.ReadLine()
		if errors.Is(err, stdio.ErrTooLong) {
			_, err = reader.ReadLine()
		}
		if !errors.Is(err, broken) {
			t.Error(err)
		}
		if _, err := reader.ReadLine(); !errors.Is(err, broken) {
			t.Error(err)
		}
	}
}

// breaksOnce gives an error after the text, and lines again after the error.
type breaksOnce struct {
	io.Reader
	err error
}

func (b *breaksOnce) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil {
		err, b.Reader = b.err, strings.NewReader("\nB\n")
	}
	return n, err
}

// pieces keeps what each Write call was given.
type pieces struct {
	mu    sync.Mutex
	calls []string
}

func (p *pieces) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls = append(p.calls, string(b))
	return len(b), nil
}

// Lines of concurrent goroutines never mix: each is one Write call.
func TestWriterWritesWholeLines(t *testing.T) {
	const goroutines, each = 8, 50
	var out pieces
	writer := stdio.NewWriter(&out)
	var wg sync.WaitGroup
	for id := range goroutines {
		wg.Go(func() {
			for range each {
				if err := writer.Send(stdio.StatsReply{ID: uint64(id)}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	count := map[string]int{}
	for _, call := range out.calls {
		count[call]++
	}
	for id := range goroutines {
		if line := fmt.Sprintf("STATS %d null\n", id); count[line] != each {
			t.Errorf("%q came %d times, want %d", line, count[line], each)
		}
	}
	if len(out.calls) != goroutines*each {
		t.Errorf("%d calls", len(out.calls))
	}
}

// A refused message leaves the stream usable; a broken stream does not come back.
func TestWriterErrors(t *testing.T) {
	var out bytes.Buffer
	writer := stdio.NewWriter(&out)
	if err := writer.Send(stdio.EnvError{Text: "a\nb"}); err == nil || out.Len() != 0 {
		t.Errorf("%q, %v", out.String(), err)
	}
	if err := writer.Send(stdio.CMethodsDone{}); err != nil || out.String() != "CMETHODS DONE\n" {
		t.Errorf("%q, %v", out.String(), err)
	}

	out.Reset()
	writer = stdio.NewWriter(&breaking{w: &out, after: 7})
	if err := writer.Send(stdio.CMethodsDone{}); !errors.Is(err, io.ErrShortWrite) {
		t.Error(err)
	}
	if err := writer.Send(stdio.ProxyDone{}); !errors.Is(err, io.ErrShortWrite) || out.String() != "CMETHOD" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

// breaking takes so many bytes of one call, and the whole of later ones.
type breaking struct {
	w     io.Writer
	after int
}

func (b *breaking) Write(p []byte) (int, error) {
	if n := b.after; n > 0 {
		b.after = 0
		_, _ = b.w.Write(p[:n])
		return n, io.ErrShortWrite
	}
	return b.w.Write(p)
}

// A launch line that nobody could read is not written (ARG-3, ARG-4).
func TestLaunchRefuses(t *testing.T) {
	for _, config := range []string{`[]`, `{`, `{} {}`, `null`, "{\"a\":\"\xff\"}", `{"a":"` + strings.Repeat("x", stdio.MaxLaunch) + `"}`} {
		line, err := stdio.Launch{Config: ptipc.Opaque(config)}.Append([]byte("before"))
		if err == nil || string(line) != "before" {
			t.Errorf("%.20q: %.20q, error %v", config, line, err)
		}
	}
	line, err := stdio.Launch{Config: ptipc.Opaque("{\n \"a\" : 1\n}\n")}.Append(nil)
	if want := `{"config":{"a":1},"host":{}}` + "\n"; err != nil || string(line) != want {
		t.Errorf("%q, %v", line, err)
	}
}

// Standard input that ends, or goes on for ever, before the first line (ARG-4).
func TestReadLaunchEnds(t *testing.T) {
	for what, r := range map[string]io.Reader{
		"nothing":    strings.NewReader(""),
		"cut off":    strings.NewReader(`{"config":{},"host":{}}`),
		"for ever":   endless{},
		"broken off": iotest.ErrReader(errors.New("broken")),
	} {
		launch, err := stdio.NewReader(r).ReadLaunch()
		if err == nil {
			t.Errorf("%s: %v", what, launch)
		}
		wantDataErr(t, err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

// Neither the proxy nor the configuration gets into a log (PROXY-3), nor into an
// error about them.
func TestHostHidesSecrets(t *testing.T) {
	launch := stdio.Launch{
		Config: ptipc.Opaque(`{"server":"hunter2"}`),
		Host:   stdio.Host{Version: []int{1}, Proxy: "socks5://u:hunter2@192.0.2.1:1080"},
	}
	var out bytes.Buffer
	for _, log := range []*slog.Logger{
		slog.New(slog.NewTextHandler(&out, nil)),
		slog.New(slog.NewJSONHandler(&out, nil)),
	} {
		log.Info("start", "launch", launch, "host", launch.Host)
	}
	fmt.Fprintf(&out, "%v %+v %s %v %+v", launch, launch, launch, launch.Host, launch.Host)
	var host stdio.Host
	fmt.Fprintln(&out, json.Unmarshal([]byte(`{"proxy":["hunter2"]}`), &host))
	_, err := stdio.NewReader(strings.NewReader(`{"config":"hunter2","host":{"proxy":"hunter2"}}` + "\n")).ReadLaunch()
	fmt.Fprintln(&out, err)
	if strings.Contains(out.String(), "hunter2") || !strings.Contains(out.String(), "***") {
		t.Error(out.String())
	}
}

func TestArgs(t *testing.T) {
	args := stdio.Args{{Key: "a", Value: "1"}, {Key: "a", Value: "2"}, {Key: stdio.ArgStats, Value: "1"}, {Key: stdio.ArgBound, Value: "yes"}}
	if v, ok := args.Get("a"); v != "1" || !ok {
		t.Errorf("the first of two keys: %q, %t", v, ok)
	}
	if v, ok := args.Get("b"); v != "" || ok {
		t.Errorf("a key that is not there: %q, %t", v, ok)
	}
	if server := (stdio.Args{{Key: stdio.ArgProxy, Value: "1"}}); args.Proxy() || !server.Proxy() {
		t.Errorf("who connects the clients (SRV-2): %t, %t", args.Proxy(), server.Proxy())
	}
	if args.Bound() || !args.Stats() {
		t.Errorf("only the value 1 has a meaning (LINE-6): bound %t, stats %t", args.Bound(), args.Stats())
	}
}
