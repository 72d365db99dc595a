package conformance

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// lifeCases are about the end of a child, and what it leaves.
var lifeCases = []Case{
	must("LIFE-2/idle", func(t *trial) {
		c := t.ready(launch{})
		t.closeStdin(c)
		t.exit(c, "at the end of standard input", 0)
	}),
	must("LIFE-2/open-connection", func(t *trial) {
		t.finishes(t.closeStdin, "at the end of standard input")
	}),
	must("LIFE-3/idle", func(t *trial) {
		c := t.ready(launch{})
		t.terminate(c)
		t.exit(c, "on SIGTERM", 0)
	}),
	must("LIFE-3/open-connection", func(t *trial) {
		t.finishes(t.terminate, "on SIGTERM")
	}),
	must("LIFE-3/second", func(t *trial) {
		t.endsAtOnce(t.terminate, "the first SIGTERM")
	}),
	must("LIFE-3/after-end", func(t *trial) {
		t.endsAtOnce(t.closeStdin, "the end of standard input")
	}),
}

// stateCases are about what any child that stays may leave and open.
var stateCases = []Case{
	must("LIFE-8/files", func(t *trial) {
		c, works := t.working(launch{})
		works()
		if c.role == Client && !c.datagrams() {
			t.ask(c, t.wrongDest()) // whatever it says to that
		}
		t.hangUp()
		t.closeStdin(c)
		t.until(c.ended) // that it does, another case says
		err := filepath.WalkDir(c.base, func(path string, d fs.DirEntry, err error) error {
			name, _ := filepath.Rel(c.base, path)
			switch {
			case err != nil:
				return err
			case name == stateDir:
				return fs.SkipDir
			case name != "." && name != homeDir:
				t.fell("files in the working directory alone", "%s beside it", name)
			}
			return nil
		})
		t.need(err)
	}),
	must("LIFE-11/loopback", func(t *trial) {
		c, works := t.working(launch{})
		_, udp := t.listening(c) // before there are wires
		works()
		tcp, _ := t.listening(c)
		t.reachable(c, "TCP", tcp)
		t.reachable(c, "UDP", udp)
	}),
}

// listening is what the system knows of the child's sockets.
func (t *trial) listening(c *child) (tcp, udp []netip.AddrPort) {
	pids, err := c.proc.Pids()
	t.need(err)
	tcp, udp, err = listening(pids)
	t.need(err)
	return tcp, udp
}

// reachable demands that others reach none of the addresses but a server's wire.
func (t *trial) reachable(c *child, network string, addrs []netip.AddrPort) {
	for _, addr := range addrs {
		isWire := c.role == Server && slices.ContainsFunc(c.methods(), func(m method) bool {
			wire, err := netip.ParseAddrPort(m.addr)
			return err == nil && wire.Port() == addr.Port()
		})
		if !addr.Addr().IsLoopback() && !isWire {
			t.fell("sockets that listen on loopback addresses alone", "one for %s on %s", network, addr)
		}
	}
}

func (t *trial) closeStdin(c *child) {
	t.showText("stdin > end")
	c.proc.CloseStdin()
}

// finishes demands of a child that is asked to stop what LIFE-2 says.
func (t *trial) finishes(ask func(*child), when string) {
	c := t.ready(launch{})
	w := t.open(c, t.dest(c))
	ask(c)
	if !t.stopsAccepting(c) {
		t.fell("no new connections "+when, "they are accepted after %v", t.suite.patience)
	}
	if c.ended() {
		t.fell("an open connection to be finished "+when, "%v", c.proc.Err())
	}
	if t.suite.echoes() || !t.method(c).bound() {
		w.echo("still open")
	}
	w.close()
	t.exit(c, when+", once the open connection has ended", 0)
}

// endsAtOnce demands that a child which finishes an open connection after first does
// not do so after SIGTERM.
func (t *trial) endsAtOnce(first func(*child), what string) {
	c := t.ready(launch{})
	t.open(c, t.dest(c))
	first(c)
	t.stopsAccepting(c) // that it does, another case says
	if c.ended() {
		t.cannot("the child has ended on %s; another case is about that", what)
	}
	t.terminate(c)
	if !t.until(c.ended) {
		t.fell("an exit at once on SIGTERM after "+what, "it still runs after %v", t.suite.patience)
	}
}

// stopsAccepting waits until new connections are not served. One that the system has
// taken in the moment in which the child stops may never get an answer, which does not
// say yet that the next one gets none.
func (t *trial) stopsAccepting(c *child) bool {
	wait := quiet
	return t.until(func() bool {
		n, err := t.greeted(c, wait)
		if errors.Is(err, os.ErrDeadlineExceeded) && 2*wait < t.suite.patience {
			wait *= 2
			return false
		}
		return n == 0 || err != nil
	})
}

// greeted makes a connection and returns how much comes in answer to a greeting.
func (t *trial) greeted(c *child, wait time.Duration) (n int, err error) {
	conn, err := connect(t.ctx, c, t.method(c))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(wait))
	if _, err := conn.Write(greeting(none)); err != nil {
		return 0, err
	}
	return conn.Read(make([]byte, 2))
}
