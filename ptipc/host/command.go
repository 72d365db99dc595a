// Package host runs a transport's executable and gives the application the same
// [ptipc.Transport] that a transport inside its own process would be.
//
//	command := &host.Command{Path: "/usr/lib/pt/pt-example"}
//	transport, err := command.Open(ctx, ptipc.Opaque(`{"server":"192.0.2.1:443"}`), ptipc.Env{})
//	if err != nil {
//		return err
//	}
//	defer transport.Close()
//	conn, err := transport.Connections["example"].Dial(ctx, nil, "example.com:443")
//
// Where the child has packet factories, Packets["example"](ctx) opens a [net.PacketConn],
// whose datagrams travel over TURN (PKT-3). It lives through restarts too (PKT-8).
//
// The child is started with its configuration (ARG-1), watched, restarted when it
// ends (LIFE-6) and stopped with everything that it started (LIFE-4, LIFE-5). The
// Transport lives through restarts: a Dial waits for the child that comes next.
package host

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"time"

	"pthost/ptipc"
	"pthost/ptipc/proc"
)

// A Command is a transport's executable and how to run it. Its Open method is a
// [ptipc.TransportFactory]. A Command must not be changed once it is in use; it
// may be opened several times.
type Command struct {
	// Name is what errors call the transport. "" is the last part of Path.
	Name string
	// Path is the executable: a path, or a name to be looked for in PATH.
	Path string
	// Args are the executable's own arguments, before the role.
	Args []string
	// Environ is the child's environment as "key=value"; nil is this process's own.
	Environ []string

	// Dialect is what the child speaks in place of the protocol of spec/ptipc.md, which
	// is nil. Plain and ConfigArgv have no meaning in a dialect.
	Dialect Dialect
	// Plain says that the child takes neither HOST nor "-" (ARG-6): it is started as
	// EXE [ARGS…] CONFIG, the form of the 2016 document, and every local user can
	// read its configuration.
	Plain bool
	// ConfigArgv hands the configuration over on the command line also to a child
	// that could read it from standard input (ARG-4).
	ConfigArgv bool
	// Bound overrides, by connection factory name, whether the factory is bound.
	Bound map[string]bool
	// Proxy is the URL of an upstream proxy for the child's wire (PROXY-3). With
	// [ptipc.Env.DialOut] set, the host itself is the child's proxy instead.
	Proxy string
	// Credential runs the child as another user; the state directory then belongs
	// to that user (LIFE-8).
	Credential *proc.Credential
	// Launcher is a command that calls [proc.Launch]; see [proc.Spec].
	Launcher []string
	// Sandbox and Limits restrict the child (LIFE-12, LIFE-13); they need Launcher.
	// Every file that exists and is named by an absolute path, in Args or anywhere in
	// the child's configuration, is added to what it may read.
	Sandbox *proc.Sandbox
	Limits  proc.Limits

	// StartTimeout bounds the time until CMETHODS DONE (LIFE-1). 0 is 30 seconds.
	StartTimeout time.Duration
	// StopTimeout is how long a child may finish open connections after its
	// standard input was closed (LIFE-4). 0 is 5 seconds.
	StopTimeout time.Duration
	// Restart says what happens when the child ends by itself.
	Restart Restart

	// Events, if set, is told what happens to the child, one event after the other.
	// The supervision waits for it: it should not take long, and must not dial
	// through the transport, or Close it or Wait for it.
	Events func(Event)
	// Trace, if set, is given every control line of both directions with secrets
	// masked. It may be called from several goroutines.
	Trace func(fromChild bool, line []byte)
}

// Restart is the policy of LIFE-6. The zero value restarts.
type Restart struct {
	// Never ends the transport when its child ends.
	Never bool
	// Min is the wait before the first restart and doubles with each failure up to
	// Max, with jitter. 0 is 250 milliseconds and 30 seconds.
	Min, Max time.Duration
	// GiveUpAfter is how many failures in a row end the transport. 0 is 8. A child
	// that has served for longer than Max begins a new row.
	GiveUpAfter int
}

const (
	defaultStartTimeout = 30 * time.Second
	defaultMin          = 250 * time.Millisecond
	defaultMax          = 30 * time.Second
	defaultGiveUpAfter  = 8
)

func (r Restart) withDefaults() Restart {
	if r.Min == 0 {
		r.Min = defaultMin
	}
	if r.Max == 0 {
		r.Max = max(defaultMax, r.Min)
	}
	if r.GiveUpAfter == 0 {
		r.GiveUpAfter = defaultGiveUpAfter
	}
	return r
}

// backoff is the wait before the next start after so many failures in a row: it
// doubles, and jitter of a half either way keeps children that died together from
// coming back together (LIFE-6).
func (r Restart) backoff(failures int) time.Duration {
	wait := min(r.Min, r.Max)
	for ; failures > 1 && wait < r.Max; failures-- {
		wait = min(2*wait, r.Max)
	}
	return wait/2 + rand.N(wait) //nolint:gosec // jitter needs no secret
}

// final reports whether another start cannot mend the failure (LIFE-6).
func final(err error) bool {
	var code ptipc.ExitCode
	var config *ptipc.ConfigError
	return errors.As(err, &code) && code.Final() || errors.As(err, &config) || errors.Is(err, errAnnounced)
}

func (c *Command) name() string {
	if c.Name != "" {
		return c.Name
	}
	return filepath.Base(c.Path)
}

func (c *Command) check(env ptipc.Env) error {
	usage := func(problem string) error {
		return fmt.Errorf("transport %s: %s: %w", c.name(), problem, ptipc.ExitUsage)
	}
	switch {
	case c.Path == "":
		return usage("Path is empty; name an executable")
	case c.Restart.Min < 0, c.Restart.Max < 0, c.Restart.GiveUpAfter < 0:
		return usage("a wait or a number of Restart is less than 0; 0 takes the default")
	case c.Dialect != nil && (c.Plain || c.ConfigArgv):
		return usage("Plain and ConfigArgv belong to the project's own protocol; a dialect has its own way")
	case c.Proxy == "" && env.DialOut == nil && env.PacketsOut != nil:
		return usage("a child cannot be given Env.PacketsOut; its datagrams would go around it (PROXY-4)")
	case c.Proxy == "" && env.DialOut == nil:
		return nil
	case c.Proxy != "" && env.DialOut != nil:
		return usage("Proxy and Env.DialOut are two ways out; give one")
	case c.Plain:
		return usage("a plain child cannot be given an upstream proxy (ARG-6); its traffic would go around it")
	case c.ConfigArgv && c.Proxy != "":
		return usage("the URL of a proxy does not go on a command line; hand the configuration over by standard input")
	case c.Proxy != "" && !strings.HasPrefix(c.Proxy, "socks5://"):
		return usage("the upstream proxy has to be socks5://[USER:PASSWORD@]HOST:PORT (PROXY-3)")
	}
	return nil
}

// Open starts the child and returns once it is ready. An error of the start holds
// the reason that the child gave, its exit code ([ptipc.ExitCode]), what was wrong
// with the configuration ([*ptipc.ConfigError], ERR-3) and its last words on
// standard error. The first start is not tried again; that is for later ones.
func (c *Command) Open(ctx context.Context, config ptipc.Opaque, env ptipc.Env) (*ptipc.Transport, error) {
	if err := c.check(env); err != nil {
		return nil, err
	}
	s, err := newSupervisor(c, roleClient, config, env)
	if err != nil {
		return nil, fmt.Errorf("transport %s: %w", c.name(), err)
	}
	first, err := s.run(ctx)
	if err != nil {
		return nil, fmt.Errorf("transport %s: %w", c.name(), err)
	}
	return s.transport(first.methods), nil
}

// An EventKind names what happened to a child.
type EventKind string

// What can happen to a child.
const (
	Started    EventKind = "started"    // the process runs
	Ready      EventKind = "ready"      // it has announced its connection factories
	Exited     EventKind = "exited"     // it has ended; Err says how
	Restarting EventKind = "restarting" // it is started again after Delay
	GaveUp     EventKind = "gave up"    // it is not started again; Err says why
)

// An Event is something that happened to a child.
type Event struct {
	Kind  EventKind
	Pid   int           // of the child; 0 when there is none
	Err   error         // for Exited and GaveUp
	Delay time.Duration // for Restarting
}
