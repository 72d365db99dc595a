package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/ptipc"
	"pthost/ptipc/stdio"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var discard = slog.New(slog.DiscardHandler)

// fake is a host that remembers what it was told.
type fake struct {
	mu      sync.Mutex
	status  Status
	added   []ptipc.Message
	full    bool
	stopped chan struct{}
	once    sync.Once
}

func newFake() *fake {
	return &fake{stopped: make(chan struct{}), status: Status{
		Time: time.Unix(1000, 0), PID: 7, Started: time.Unix(900, 0),
		Transports: []Transport{{Name: "mine", Role: "client", State: Ready, Stats: &ptipc.TransportStats{Active: 2, Received: 1 << 40}}},
		Fronts:     []Front{{Address: "127.0.0.1:1", Serve: "socks5", Transport: "mine"}},
	}}
}

func (f *fake) Status(context.Context) Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

func (f *fake) Stop() { f.once.Do(func() { close(f.stopped) }) }

func (f *fake) Signals(transport string) ([]Signal, error) {
	if transport != "" && transport != "mine" {
		return nil, errors.Join(errors.New("no such transport"), ptipc.ExitUsage)
	}
	return []Signal{{Transport: "mine", ID: 3, Time: time.Unix(950, 0), Message: ptipc.Message{Body: ptipc.Opaque(`{"a":"<&>"}`)}}}, nil
}

func (f *fake) AddSignal(transport string, m ptipc.Message) error {
	if _, err := f.Signals(transport); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.full {
		return errors.Join(errors.New("too many wait"), ptipc.ExitTempFail)
	}
	f.added = append(f.added, m)
	return nil
}

func privateDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func start(t *testing.T, path string, host Host) *Server {
	t.Helper()
	l, err := Listen(path, discard)
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(l, Handler(host), discard)
	t.Cleanup(func() { _ = s.Close() }) // some tests have closed it
	return s
}

func TestStatusAndSignals(t *testing.T) {
	path := filepath.Join(privateDir(t), "c.sock")
	host := newFake()
	start(t, path, host)
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v %v", info.Mode(), err)
	}
	c := NewClient(path)
	got, err := c.Status(t.Context())
	if err != nil || got.PID != 7 || len(got.Transports) != 1 || got.Transports[0].Stats.Received != 1<<40 || got.Fronts[0] != host.status.Fronts[0] {
		t.Errorf("%+v %v", got, err)
	}
	for _, transport := range []string{"", "mine"} {
		signals, err := c.Signals(t.Context(), transport)
		if err != nil || len(signals) != 1 || string(signals[0].Message.Body) != `{"a":"<&>"}` || signals[0].ID != 3 {
			t.Errorf("%+v %v", signals, err)
		}
	}
	largest := ptipc.Message{Peer: "alice", Body: ptipc.Opaque(`{"a":"` + strings.Repeat("<", stdio.MaxSignal-len(`{"peer":"alice","body":{"a":""}}`)) + `"}`)}
	if err := c.AddSignal(t.Context(), "mine", largest); err != nil {
		t.Fatal(err)
	}
	if len(host.added) != 1 || host.added[0].Peer != "alice" || string(host.added[0].Body) != string(largest.Body) {
		t.Errorf("%d messages", len(host.added))
	}
}

// What the host refuses reaches the client with its words and its exit code.
func TestErrors(t *testing.T) {
	path := filepath.Join(privateDir(t), "c.sock")
	host := newFake()
	start(t, path, host)
	c := NewClient(path)
	for _, name := range []string{"other", "a/b", "..", "ü%2f"} {
		if _, err := c.Signals(t.Context(), name); ptipc.ExitCodeOf(err) != ptipc.ExitUsage && ptipc.ExitCodeOf(err) != ptipc.ExitProtocol {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := c.Signals(t.Context(), "other"); err == nil || !strings.Contains(err.Error(), "no such transport") {
		t.Error(err)
	}
	host.full = true
	if err := c.AddSignal(t.Context(), "mine", ptipc.Message{Body: ptipc.Opaque(`{}`)}); ptipc.ExitCodeOf(err) != ptipc.ExitTempFail {
		t.Error(err)
	}
	if err := c.AddSignal(t.Context(), "mine", ptipc.Message{Body: ptipc.Opaque(`{`)}); ptipc.ExitCodeOf(err) != ptipc.ExitDataErr {
		t.Error(err)
	}
}

func TestNobodyThere(t *testing.T) {
	dir := privateDir(t)
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: stale})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{stale, filepath.Join(dir, "none"), filepath.Join(dir, "no", "directory")} {
		c := NewClient(path)
		_, err := c.Status(t.Context())
		if !errors.Is(err, ErrNoHost) || ptipc.ExitCodeOf(err) != ptipc.ExitUnavailable || !strings.Contains(err.Error(), "ptipc run") {
			t.Errorf("%s: %v", path, err)
		}
		if err := c.Stop(t.Context()); !errors.Is(err, ErrNoHost) {
			t.Errorf("%s: %v", path, err)
		}
	}
	// A host that was killed left its socket; the next one takes its place.
	start(t, stale, newFake())
	if _, err := NewClient(stale).Status(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestSecondHost(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	l, path, err := ListenDefault(discard)
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(l, Handler(newFake()), discard)
	defer s.Close()
	if path != DefaultPath() {
		t.Errorf("%s, and %s is looked for", path, DefaultPath())
	}
	if _, _, err := ListenDefault(discard); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("%v", err)
	}
	if got, err := NewClient(path).Status(t.Context()); err != nil || got.PID != 7 {
		t.Errorf("the first host: %+v %v", got, err)
	}
}

// Directories that others can write to, or that only look like one's own, are refused.
func TestUnsafeDirectory(t *testing.T) {
	runtimeDir := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", runtimeDir)
	own := filepath.Join(runtimeDir, "ptipc")
	if err := os.Symlink(privateDir(t), own); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ListenDefault(discard); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a link: %v", err)
	}
	if err := os.Remove(own); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(own, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(own, 0o770); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ListenDefault(discard); !errors.Is(err, os.ErrPermission) {
		t.Errorf("an open directory: %v", err)
	}
	if _, err := NewClient(filepath.Join(own, socketName)).Status(t.Context()); !errors.Is(err, os.ErrPermission) {
		t.Errorf("a client in an open directory: %v", err)
	}
}

func TestDefaultPath(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "relative")
	if got := DefaultPath(); !filepath.IsAbs(got) || strings.Contains(got, "relative") {
		t.Error(got)
	}
	t.Setenv("XDG_RUNTIME_DIR", "/run/x")
	if got := DefaultPath(); got != "/run/x/ptipc/control.sock" {
		t.Error(got)
	}
}

// Stop returns once the host has closed its socket, or another one has taken its place.
func TestStop(t *testing.T) {
	t.Run("gone", func(t *testing.T) {
		path := filepath.Join(privateDir(t), "c.sock")
		host := newFake()
		s := start(t, path, host)
		ended := make(chan error, 1)
		go func() {
			<-host.stopped
			ended <- s.Close()
		}()
		if err := NewClient(path).Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket: %v", err)
		}
	})
	t.Run("replaced", func(t *testing.T) {
		path := filepath.Join(privateDir(t), "c.sock")
		host := newFake()
		start(t, path, host)
		go func() {
			<-host.stopped
			host.mu.Lock()
			defer host.mu.Unlock()
			host.status.PID++
		}()
		if err := NewClient(path).Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
	t.Run("given up", func(t *testing.T) {
		path := filepath.Join(privateDir(t), "c.sock")
		host := newFake()
		start(t, path, host)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-host.stopped
			cancel()
		}()
		if err := NewClient(path).Stop(ctx); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// A client that says nothing does not keep the server from closing.
func TestSilentClient(t *testing.T) {
	path := filepath.Join(privateDir(t), "c.sock")
	s := start(t, path, newFake())
	silent, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if _, err := NewClient(path).Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadAll(silent); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
}

func TestSince(t *testing.T) {
	at := func(second int64, received, sent uint64) Status {
		return Status{PID: 1, Started: time.Unix(1, 0), Time: time.Unix(second, 0), Transports: []Transport{
			{Name: "a", Stats: &ptipc.TransportStats{Received: received, Sent: sent}}, {Name: "b"},
		}}
	}
	got := at(12, 3000, 500).Since(at(10, 1000, 500))
	if r := got.Transports[0].Rate; r == nil || r.Received != 1000 || r.Sent != 0 {
		t.Errorf("%+v", r)
	}
	other := at(10, 1000, 500)
	other.PID = 2
	for name, s := range map[string]Status{
		"no stats":     {Transports: got.Transports[1:]},
		"the same":     at(10, 1, 1).Since(at(10, 0, 0)),
		"another host": at(12, 3000, 500).Since(other),
		"backwards":    at(12, 10, 500).Since(at(10, 1000, 500)),
	} {
		for _, transport := range s.Transports {
			if transport.Rate != nil {
				t.Errorf("%s: %+v", name, transport.Rate)
			}
		}
	}
}

// Whatever stands in a request, what is taken is a message, and what is not gets an
// error that says so and repeats nothing of it.
func FuzzRequest(f *testing.F) {
	f.Add("POST", "/v1/signals/mine", []byte(`{"body":{"a":1},"peer":"p"}`))
	f.Add("POST", "/v1/signals/mine", []byte(`{"body":{"a":1,"a":2}}`))
	f.Add("POST", "/v1/signals/mine", []byte(`{"body":{}} x`))
	f.Add("POST", "/v1/signals/mine", bytes.Repeat([]byte("x"), stdio.MaxSignal+1))
	f.Add("GET", "/v1/signals/other", []byte{})
	f.Add("GET", "/v1/status", []byte{})
	f.Add("POST", "/v1/stop", []byte{})
	f.Add("DELETE", "/v1/status/../stop", []byte{})
	f.Fuzz(func(t *testing.T, method, path string, body []byte) {
		if !strings.HasPrefix(path, "/") {
			return
		}
		request, err := http.NewRequest(method, "http://ptipc"+path, bytes.NewReader(body))
		if err != nil {
			return
		}
		host := newFake()
		w := httptest.NewRecorder()
		Handler(host).ServeHTTP(w, request)
		if len(host.added) == 1 {
			m, err := stdio.ParseSignal(body)
			if err != nil || m.Peer != host.added[0].Peer || string(m.Body) != string(host.added[0].Body) {
				t.Fatalf("taken from %q: %v", body, err)
			}
		} else if method == http.MethodPost && path == "/v1/signals/mine" {
			var said failure
			if err := json.Unmarshal(w.Body.Bytes(), &said); err != nil || w.Code != http.StatusBadRequest || said.Error == "" || said.Code != ptipc.ExitDataErr {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
		}
		select {
		case <-host.stopped:
			if method != http.MethodPost || w.Code != http.StatusAccepted {
				t.Fatalf("stopped by %s %q", method, path)
			}
		default:
		}
	})
}
