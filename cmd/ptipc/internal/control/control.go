// Package control lets the operator look at a host that runs, hand it signals and
// stop it: HTTP with JSON over a unix socket that only the operator's own processes
// reach.
//
// The host:
//
//	listener, err := control.Listen(path, log)
//	if err != nil {
//		return err
//	}
//	server := control.Serve(listener, control.Handler(host), log)
//	defer server.Close()
//
// The operator:
//
//	status, err := control.NewClient(path).Status(ctx)
//	if err != nil {
//		return err
//	}
//	for _, t := range status.Transports {
//		fmt.Println(t.Name, t.State)
//	}
//
// Any HTTP client does as well:
//
//	curl --unix-socket PATH http://ptipc/v1/status
//
// # Requests
//
//	GET  /v1/status             the host as a [Status]
//	POST /v1/stop               ends the host in order; the answer, 202, comes first
//	GET  /v1/signals            outgoing messages, as a list of [Signal]
//	GET  /v1/signals/TRANSPORT  those of one transport
//	POST /v1/signals/TRANSPORT  hands in a message, {"body":{…},"peer":"…"}
//
// What fails answers {"error":"…","code":N}, where N is the exit code for it.
package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/net/netutil"

	"pthost/ptipc"
	"pthost/ptipc/front"
	"pthost/ptipc/localnet"
)

// socketName is the socket in the private directory of the default path.
const socketName = "control.sock"

// Bounds of what a server takes. Operators and scrapers need few connections.
const (
	maxConns      = 32
	maxHeader     = 16 << 10
	headerTimeout = 5 * time.Second
	readTimeout   = 10 * time.Second
	writeTimeout  = 30 * time.Second
	idleTimeout   = 30 * time.Second
	closeTimeout  = time.Second
)

// DefaultPath is where the control socket is when nobody says otherwise:
// control.sock in $XDG_RUNTIME_DIR/ptipc, else in /run/user/UID/ptipc, else in
// ptipc-UID in the directory for temporary files.
func DefaultPath() string {
	uid := strconv.Itoa(os.Geteuid())
	if runtimeDir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(runtimeDir) {
		return filepath.Join(runtimeDir, "ptipc", socketName)
	}
	runtimeDir := "/run/user/" + uid
	if info, err := os.Stat(runtimeDir); err == nil && info.IsDir() {
		return filepath.Join(runtimeDir, "ptipc", socketName)
	}
	return filepath.Join(os.TempDir(), "ptipc-"+uid, socketName)
}

// ListenDefault is Listen on the default path, whose directory it makes. The error is
// [syscall.EADDRINUSE] when another host has it.
func ListenDefault(log *slog.Logger) (net.Listener, string, error) {
	path := DefaultPath()
	dir := filepath.Dir(path)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, path, fmt.Errorf("the directory of the control socket: %w", err)
	}
	// In a directory where everybody writes, somebody else may have put a link there.
	if info, err := os.Lstat(dir); err != nil || !info.IsDir() {
		return nil, path, fmt.Errorf("%s, for the control socket, is not a directory: remove it, or name another path: %w", dir, errors.Join(err, os.ErrExist))
	}
	l, err := Listen(path, log)
	return l, path, err
}

// Listen makes the socket at path, mode 0600, in a directory that must belong to the
// effective user alone. No other user gets in, not even root.
func Listen(path string, log *slog.Logger) (net.Listener, error) {
	if !localnet.Supported("unix") {
		return nil, fmt.Errorf("the control socket %s: %w", path, localnet.ErrUnsupported)
	}
	return front.Listen("unix://"+path, log)
}

// A Server serves HTTP within bounds on time, size and connections.
type Server struct {
	http *http.Server
	done chan struct{} // closed when Serve has returned
}

// Serve serves h on l, which it closes in the end.
func Serve(l net.Listener, h http.Handler, log *slog.Logger) *Server {
	s := &Server{
		http: &http.Server{
			Handler:           h,
			ReadHeaderTimeout: headerTimeout,
			ReadTimeout:       readTimeout,
			WriteTimeout:      writeTimeout,
			IdleTimeout:       idleTimeout,
			MaxHeaderBytes:    maxHeader,
			ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		},
		done: make(chan struct{}),
	}
	limited := netutil.LimitListener(l, maxConns)
	go func() {
		err := s.http.Serve(limited)
		if !errors.Is(err, http.ErrServerClosed) {
			log.Error("an HTTP server of the host has ended", "addr", l.Addr().String(), "err", err)
		}
		close(s.done)
	}()
	return s
}

// Close ends the server: requests may take a second longer and are then cut.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.http.Close()
	}
	<-s.done
	return err
}

// A Host is what is controlled. Its methods may be called from several goroutines.
// The [ptipc.ExitCode] in an error decides what the client is told.
type Host interface {
	// Status is the state now. ctx bounds what has to be asked for.
	Status(ctx context.Context) Status
	// Stop begins to end the host in order and does not wait for it.
	Stop()
	// Signals lists the outgoing messages of one transport, of all if it is "".
	Signals(transport string) ([]Signal, error)
	// AddSignal takes in a message for a transport.
	AddSignal(transport string, m ptipc.Message) error
}

// readBody reads a bounded body.
func readBody(w http.ResponseWriter, r *http.Request, most int64) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	var large *http.MaxBytesError
	if errors.As(err, &large) {
		return nil, fmt.Errorf("the message is longer than %d bytes (SIG-4): %w", most, ptipc.ExitDataErr)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the request: %w: %w", err, ptipc.ExitIOErr)
	}
	return body, nil
}
