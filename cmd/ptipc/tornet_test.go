package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pthost/ptipc/testpeer"
)

// A tornet is a Tor network of its own on the loopback: directory authorities, a
// relay and an exit, and behind the exit a web server. Bridges and their clients
// are added to it. Everything ends with the test.
type tornet struct {
	tor         string
	dir         string
	authorities string // lines of torrc
	curl        string
	site        string // the web server, host:port
	exit        *torProcess

	mu   sync.Mutex
	next int // the port to try next
}

const (
	torAuthorities = 3
	torRelays      = torAuthorities + 2
	// torTimeout bounds each thing that a test waits for.
	torTimeout = 90 * time.Second
)

// A torProcess is one tor.
type torProcess struct {
	name string
	dir  string
	cmd  *exec.Cmd

	mu    sync.Mutex
	lines []string
	more  chan struct{} // closed when there are more lines, or no more to come
	ended bool
}

// newTornet starts a network and waits until it can carry traffic.
func newTornet(t testing.TB, site http.Handler) *tornet {
	t.Helper()
	n := &tornet{tor: testpeer.Need(t, "tor"), curl: testpeer.Need(t, "curl"), dir: t.TempDir(), next: 20000 + os.Getpid()%8000}
	gencert := testpeer.Need(t, "tor-gencert")
	n.site = n.serveSite(t, site)
	// An exit asks a resolver when it starts, and wants one.
	if err := os.WriteFile(filepath.Join(n.dir, "resolv.conf"), []byte("nameserver 127.0.0.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var orPorts, dirPorts [torAuthorities]int
	for i := range torAuthorities {
		orPorts[i], dirPorts[i] = n.port(t), n.port(t)
	}

	// An authority is known by two keys, which have to exist before anybody starts.
	var making sync.WaitGroup
	lines := make([]string, torAuthorities)
	for i := range torAuthorities {
		making.Go(func() {
			line, err := n.makeAuthority(t.Context(), gencert, fmt.Sprint("authority", i), orPorts[i], dirPorts[i])
			if err != nil {
				t.Error(err)
			}
			lines[i] = line
		})
	}
	making.Wait()
	if t.Failed() {
		t.FailNow()
	}
	n.authorities = strings.Join(lines, "")

	// Votes are cast two seconds before each multiple of five of the wall clock. All
	// that start just after one are in the first consensus; the next takes longer.
	const round, start = 5 * time.Second, 3200 * time.Millisecond
	past := time.Duration(time.Now().UnixNano()) % round
	<-time.After((start - past + round) % round)
	var first *torProcess
	for i := range torAuthorities {
		name := fmt.Sprint("authority", i)
		first = n.start(t, name, n.authority(name, orPorts[i], dirPorts[i]))
	}
	// Only authorities are directory caches: a young relay has nothing to give, and
	// who asks it waits for long before asking another.
	n.start(t, "relay", n.relay("relay", n.port(t))+"ExitPolicy reject *:*\nDirCache 0\n")
	n.exit = n.start(t, "exit", n.relay("exit", n.port(t))+"ExitRelay 1\nExitPolicyRejectPrivate 0\nExitPolicy accept *:*\nDirCache 0\n")

	// Whoever asks before there is a consensus waits for long before asking again.
	consensus := fmt.Sprintf("http://127.0.0.1:%d/tor/status-vote/current/consensus-microdesc", dirPorts[torAuthorities-1])
	// tor answers a wish for gzip with something else.
	client := http.Client{Transport: &http.Transport{DisableCompression: true, DisableKeepAlives: true}}
	n.poll(t, first, "a consensus of all relays", func() bool {
		response, err := client.Get(consensus)
		if err != nil {
			return false
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		return err == nil && bytes.Count(text, []byte("\nr ")) == torRelays
	})
	return n
}

func (n *tornet) serveSite(t testing.TB, site http.Handler) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: site}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return l.Addr().String()
}

// port finds a port that nobody listens on, another one each time. It lies below those
// that systems give to clients, so that no connection takes it before tor does.
func (n *tornet) port(t testing.TB) int {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	for ; n.next < 32000; n.next++ {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", n.next))
		if err != nil {
			continue
		}
		_ = l.Close()
		n.next++
		return n.next - 1
	}
	t.Fatal("no port from 20000 to 32000 is free")
	return 0
}

// makeAuthority makes the keys of an authority, and returns the line by which others
// know it.
func (n *tornet) makeAuthority(ctx context.Context, gencert, name string, orPort, dirPort int) (string, error) {
	dir := filepath.Join(n.dir, name)
	keys := filepath.Join(dir, "keys")
	if err := os.MkdirAll(keys, 0o700); err != nil {
		return "", err
	}
	make := exec.CommandContext(ctx, gencert, "--create-identity-key", "--passphrase-fd", "0", "-m", "12",
		"-a", fmt.Sprintf("127.0.0.1:%d", dirPort),
		"-i", "authority_identity_key", "-s", "authority_signing_key", "-c", "authority_certificate")
	make.Dir, make.Stdin = keys, strings.NewReader("test\n")
	if out, err := make.CombinedOutput(); err != nil {
		return "", fmt.Errorf("tor-gencert: %w: %s", err, out)
	}
	certificate, err := os.ReadFile(filepath.Join(keys, "authority_certificate"))
	if err != nil {
		return "", err
	}
	identity := regexp.MustCompile(`(?m)^fingerprint ([0-9A-F]{40})`).FindSubmatch(certificate)
	if identity == nil {
		return "", fmt.Errorf("%s has no fingerprint in its certificate", name)
	}
	// tor wants to know some authority before it tells its own fingerprint.
	other := fmt.Sprintf("DirAuthority other 127.0.0.1:1 %040d\n", 1)
	torrc := filepath.Join(dir, "torrc")
	if err := os.WriteFile(torrc, []byte(n.common(name)+other+n.authority(name, orPort, dirPort)), 0o600); err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, n.tor, "-f", torrc, "--defaults-torrc", os.DevNull, "--list-fingerprint", "--quiet").Output()
	if err != nil {
		return "", fmt.Errorf("tor --list-fingerprint: %w: %s", err, out)
	}
	fingerprint := regexp.MustCompile(`(?m)^\S+ ([0-9A-F ]{49,50})$`).FindSubmatch(out)
	if fingerprint == nil {
		return "", fmt.Errorf("%s has no fingerprint: %s", name, out)
	}
	return fmt.Sprintf("DirAuthority %s orport=%d no-v2 v3ident=%s 127.0.0.1:%d %s\n",
		name, orPort, identity[1], dirPort, strings.ReplaceAll(string(fingerprint[1]), " ", "")), nil
}

// common is what every tor of the network has in its torrc. It ends with this process.
func (n *tornet) common(name string) string {
	return fmt.Sprintf(`TestingTorNetwork 1
DataDirectory %s
Log notice stdout
SafeLogging 0
ShutdownWaitLength 0
__OwningControllerProcess %d
Address 127.0.0.1
AddressDisableIPv6 1
AssumeReachable 1
PathsNeededToBuildCircuits 0.25
V3AuthNIntervalsValid 2
NumCPUs 1
`, filepath.Join(n.dir, name), os.Getpid())
}

func (n *tornet) relay(name string, orPort int) string {
	return fmt.Sprintf(`Nickname %s
SocksPort 0
ORPort 127.0.0.1:%d IPv4Only
ContactInfo nobody@example.invalid
ServerDNSResolvConfFile %s
ServerDNSAllowBrokenConfig 1
ServerDNSDetectHijacking 0
`, name, orPort, filepath.Join(n.dir, "resolv.conf"))
}

func (n *tornet) authority(name string, orPort, dirPort int) string {
	return n.relay(name, orPort) + fmt.Sprintf(`DirPort 127.0.0.1:%d
AuthoritativeDirectory 1
V3AuthoritativeDirectory 1
TestingV3AuthInitialVotingInterval 5
TestingV3AuthInitialVoteDelay 2
TestingV3AuthInitialDistDelay 2
V3AuthVotingInterval 20
V3AuthVoteDelay 2
V3AuthDistDelay 2
TestingAuthDirTimeToLearnReachability 0
TestingDirAuthVoteExit *
TestingDirAuthVoteGuard *
TestingMinExitFlagThreshold 0
TestingMinFastFlagThreshold 0
ExitPolicy reject *:*
`, dirPort)
}

// start runs a tor with these lines in its torrc.
func (n *tornet) start(t testing.TB, name, lines string, environ ...string) *torProcess {
	t.Helper()
	p := &torProcess{name: name, dir: filepath.Join(n.dir, name), more: make(chan struct{})}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	torrc := filepath.Join(p.dir, "torrc")
	if err := os.WriteFile(torrc, []byte(n.common(name)+n.authorities+lines), 0o600); err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.CommandContext(context.Background(), n.tor, "-f", torrc, "--defaults-torrc", os.DevNull)
	p.cmd.Env = append(os.Environ(), environ...)
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for scan := bufio.NewScanner(out); scan.Scan(); {
			p.add(scan.Text(), false)
		}
		_ = p.cmd.Wait() // how it ended, its log says
		p.add("(this tor has ended)", true)
	}()
	t.Cleanup(func() { p.stop(t, read) })
	return p
}

func (p *torProcess) add(line string, ended bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lines = append(p.lines, line)
	p.ended = ended
	close(p.more)
	p.more = make(chan struct{})
}

func (p *torProcess) stop(t testing.TB, read chan struct{}) {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-read:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-read
		t.Errorf("%s had to be killed", p.name)
	}
	if t.Failed() {
		t.Logf("%s:\n%s", p.name, strings.Join(p.lines[max(0, len(p.lines)-40):], "\n"))
	}
}

// await waits for a line of the log, and returns what the expression found in it.
func (p *torProcess) await(t testing.TB, expression string) []string {
	t.Helper()
	timeout := time.After(torTimeout)
	want := regexp.MustCompile(expression)
	for seen := 0; ; {
		p.mu.Lock()
		lines, more, ended := p.lines[seen:], p.more, p.ended
		p.mu.Unlock()
		for _, line := range lines {
			if found := want.FindStringSubmatch(line); found != nil {
				return found
			}
		}
		seen += len(lines)
		if ended {
			t.Fatalf("%s has ended before it said %q", p.name, expression)
		}
		select {
		case <-more:
		case <-timeout:
			t.Fatalf("%s has not said %q in %v", p.name, expression, torTimeout)
		}
	}
}

// poll waits for what no log tells, while the process runs.
func (n *tornet) poll(t testing.TB, p *torProcess, what string, is func() bool) {
	t.Helper()
	timeout := time.After(torTimeout)
	for tick := time.NewTicker(50 * time.Millisecond); ; {
		if is() {
			return
		}
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("there is not %s after %v", what, torTimeout)
		}
		p.mu.Lock()
		ended := p.ended
		p.mu.Unlock()
		if ended {
			t.Fatalf("%s has ended before there was %s", p.name, what)
		}
	}
}

// torSide is what a side of a pair has in its torrc besides the usual.
type torSide struct{ plugin, lines string }

// bridge starts a bridge, with a transport unless that is "". It waits until clients can come.
func (n *tornet) bridge(t testing.TB, name, transport string, side torSide) (p *torProcess, orPort int) {
	t.Helper()
	orPort = n.port(t)
	lines := n.relay(name, orPort) + "BridgeRelay 1\nPublishServerDescriptor 0\nBridgeDistribution none\nExitPolicy reject *:*\n" + side.lines
	if transport != "" {
		lines += fmt.Sprintf("ExtORPort 127.0.0.1:auto\nServerTransportPlugin %s exec %s\nServerTransportListenAddr %s 127.0.0.1:%d\n", transport, side.plugin, transport, n.port(t))
	}
	return n.start(t, name, lines, asTool+"=1"), orPort
}

// bridgeLine is the line that tor writes for the users of its bridge.
func (n *tornet) bridgeLine(t testing.TB, p *torProcess, transport string) string {
	t.Helper()
	var line string
	want := regexp.MustCompile(`(?m)^Bridge (` + transport + ` .*)$`)
	n.poll(t, p, "a bridge line", func() bool {
		text, err := os.ReadFile(filepath.Join(p.dir, "bridgelines"))
		if err != nil {
			return false
		}
		found := want.FindSubmatch(text)
		if found != nil {
			line = string(found[1])
		}
		return found != nil
	})
	return line
}

func (n *tornet) fingerprint(t testing.TB, p *torProcess) string {
	t.Helper()
	return p.await(t, `Your Tor server's identity key fingerprint is '\S+ ([0-9A-F]{40})'`)[1]
}

// client starts a client of a bridge.
func (n *tornet) client(t testing.TB, name, line, transport string, side torSide) (p *torProcess, socks string) {
	t.Helper()
	socks = fmt.Sprintf("127.0.0.1:%d", n.port(t))
	lines := fmt.Sprintf("SocksPort %s\nUseBridges 1\nBridge %s\n%s", socks, line, side.lines)
	if transport != "" {
		lines += fmt.Sprintf("ClientTransportPlugin %s exec %s\n", transport, side.plugin)
	}
	return n.start(t, name, lines, asTool+"=1"), socks
}

// get fetches a page of the site through a client.
func (n *tornet) get(t testing.TB, socks, page string) string {
	t.Helper()
	// Until it has a consensus, an exit takes the relays before it for clients, and refuses.
	n.exit.await(t, "Bootstrapped 75%")
	out, err := exec.CommandContext(t.Context(), n.curl, "-sS", "--fail", "--max-time", "60", "--socks5-hostname", socks, "http://"+n.site+page).CombinedOutput()
	if err != nil {
		t.Fatalf("curl: %v: %s", err, out)
	}
	return string(out)
}
