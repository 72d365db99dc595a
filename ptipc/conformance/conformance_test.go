package conformance_test

import (
	"context"
	"flag"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pthost/adapters/bound"
	"pthost/adapters/free"
	"pthost/ptipc"
	"pthost/ptipc/child"
	"pthost/ptipc/conformance"
	"pthost/ptipc/testpeer"
	"pthost/transports/direct"
	"pthost/transports/websocket"
)

// The first argument of this binary when it is a child.
const (
	asFaulty = "conformance-faulty-child"
	asFree   = "conformance-free-child"
	asMux    = "conformance-mux-child"
	asBound  = "conformance-bound-child" // and where it leads
	asPT1    = "conformance-managed-child"
	asPT2    = "conformance-dispatcher-child"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == asFaulty {
		faultyMain(os.Args[2], os.Args[3:])
	}
	if len(os.Args) > 2 && (os.Args[1] == asPT1 || os.Args[1] == asPT2) {
		managedMain(os.Args[2], os.Args[1] == asPT2, os.Args[3:])
	}
	if len(os.Args) > 1 {
		server := free.Server(*websocket.Server)
		server.Name = "free"
		switch os.Args[1] {
		case asFree:
			child.MainArgs(os.Args[2:], child.Transport{Client: free.Client(websocket.Open), Server: &server})
		case asMux:
			child.MainArgs(os.Args[2:], child.Transport{Client: free.Mux(websocket.Open), Server: &server})
		case asBound:
			child.MainArgs(os.Args[3:], child.Transport{Client: bound.Client(direct.Open, os.Args[2])})
		}
	}
	// The tests wait most of the time, so that more of them fit side by side than there
	// are processors.
	flag.Parse()
	if err := flag.Set("test.parallel", strconv.Itoa(4*runtime.GOMAXPROCS(0))); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

func faultySubject(t *testing.T, fault string) conformance.Subject {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return conformance.Subject{Path: self, Args: []string{asFaulty, fault}}
}

func run(t *testing.T, s conformance.Subject, o conformance.Options) conformance.Report {
	t.Helper()
	needLinux(t)
	report, err := conformance.Run(t.Context(), s, o)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func needLinux(t *testing.T) {
	t.Helper()
	if runtime.GOOS != "linux" {
		testpeer.Skip(t, "some cases look at sockets in Linux's /proc")
	}
}

// want compares the names of the cases with a verdict with what they should be.
func want(t *testing.T, report conformance.Report, v conformance.Verdict, names ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		names = slices.DeleteFunc(slices.Clone(names), func(name string) bool { return slices.Contains(ofRoot, name) })
		for _, r := range report.Results {
			if v == conformance.NotRun && slices.Contains(ofRoot, r.Name) {
				names = append(names, r.Name)
			}
		}
	}
	got := report.Names(v)
	slices.Sort(names)
	slices.Sort(got)
	if !slices.Equal(got, names) {
		t.Errorf("%s:\n\t%s\nwant\n\t%s\n%s", v, strings.Join(got, "\n\t"), strings.Join(names, "\n\t"), report)
	}
}

// Cases that cannot run with a child, or on a machine, of some kind.
var (
	ofPackets = []string{
		"PKT-2/unasked", "PKT-3/form", "PKT-4/without-credentials", "PKT-4/wrong-password", "PKT-4/fresh", "PKT-5/other-user",
		"PKT-6/whole", "PKT-7/given-back", "PROXY-4/not-around",
	}
	ofRoot = []string{
		"PKT-5/other-user", "SOCKS-17/other-user", "SOCKS-17/other-user-unix", "SOCKS-17/host-user",
		"LIFE-8/watched", "PROXY-1/nothing-around", "PROXY-3/nothing-looked-up",
	}
	withoutKeys    = []string{"CFG-2/twice", "CFG-2/wrong-case"}
	withoutErrors  = []string{"CFG-2/place", "LINE-8/method-error"}
	withoutLogs    = []string{"LINE-9/log", "LINE-10/status"}
	withoutSignals = []string{"SIG-1/form", "SIG-2/no-peer", "SIG-3/unanswered", "SIG-4/size"}
	ofServer       = []string{"SIG-1/form", "SIG-2/repeated", "SIG-3/unanswered", "SIG-4/size"} // without signals
	ofProxying     = []string{"SRV-2/connects", "SRV-2/no-deliver"}
	ofDelivering   = []string{"SRV-3/delivers", "SRV-3/nothing-before-the-reply", "SRV-3/refused", "SRV-3/no-deliver", "SOCKS-20/delivered", "SOCKS-20/broken-wire", "SOCKS-21/broken-host", "SOCKS-24/service", "SOCKS-25/broken-wire"}
	ofBound        = []string{"SOCKS-11/anywhere", "SOCKS-11/elsewhere"}
	ofFree         = []string{
		"SOCKS-12/nowhere", "SOCKS-13/name", "SOCKS-14/hang-up", "SOCKS-14/end-without-early-data", "SOCKS-14/end-after-early-data",
		"SOCKS-15/client-first", "SOCKS-15/far-end-first", "SOCKS-15/broken-far-end", "SOCKS-15/broken-client",
		"SOCKS-20/clean", "SOCKS-20/broken-far-end", "SOCKS-21/broken-client", "SOCKS-24/handed-over", "SOCKS-25/broken",
		"ERR-1/refused", "ERR-1/unknown-name", "ERR-2/same-class", "PROXY-1/failing", "PROXY-3/name",
	}
	// Of these, a bound client that leads to the suite can be asked for more.
	onlyFree = []string{
		"SOCKS-12/nowhere", "SOCKS-13/name", "SOCKS-14/hang-up", "SOCKS-14/end-without-early-data", "SOCKS-14/end-after-early-data",
		"ERR-1/refused", "ERR-1/unknown-name", "ERR-2/same-class", "PROXY-1/failing", "PROXY-3/name",
	}
	ofExtended = []string{
		"ARG-2/client", "ARG-4/standard-input", "ARG-4/no-role", "ARG-4/largest", "ARG-4/too-large", "ARG-4/not-json", "ARG-4/no-line",
		"ARG-5/unknown-keys", "ARG-5/listen-unix", "LINE-3/no-version", "SOCKS-17/other-user-unix", "SOCKS-17/socket-mode",
		"SOCKS-17/host-user", "PROXY-1/done-first", "PROXY-1/not-around", "PROXY-1/failing", "PROXY-1/unreachable", "PROXY-1/unusable",
		"PROXY-3/name", "PROXY-3/password", "PROXY-3/secret", "PROXY-1/nothing-around", "PROXY-3/nothing-looked-up",
		"SOCKS-20/clean", "SOCKS-20/broken-far-end", "SOCKS-21/broken-client", "SOCKS-24/handed-over", "SOCKS-25/broken",
	}
	// For a child of datagrams alone.
	ofStreams = slices.Concat(named(conformance.Client, "^(SOCKS|ERR|STAT)-|^(LIFE-[23]/open|LIFE-3/(second|after)|PROXY-1/(done|not|nothing|failing|unreach)|PROXY-3/(n|password))"), []string{
		"ARG-5/listen-unix", "LINE-1/cr",
	})
	ofStreamingServers = slices.Concat(named(conformance.Server, "^(SOCKS|SRV-3)|^(LIFE-[23]/open|LIFE-3/(second|after))"), []string{"PROXY-1/done-first"})
	ofStats            = []string{
		"STAT-1/connection", "STAT-2/totals", "STAT-3/unknown", "STAT-3/gone", "STAT-3/unix", "STAT-3/id", "LINE-1/cr",
	}
)

// named are the names of a role's cases that a pattern matches.
func named(role, pattern string) []string {
	form := regexp.MustCompile(pattern)
	var names []string
	for _, c := range conformance.Cases(conformance.Seed) {
		if c.Role == role && !c.Slow && form.MatchString(c.Name) {
			names = append(names, c.Name)
		}
	}
	return names
}

func TestWithoutFault(t *testing.T) {
	t.Parallel()
	report := run(t, faultySubject(t, ""), conformance.Options{})
	want(t, report, conformance.FellShort)
	want(t, report, conformance.NotRun, slices.Concat(withoutKeys, withoutLogs, withoutSignals, ofBound, ofPackets)...)
	if !report.OK() {
		t.Error("the report is not OK")
	}
}

// echoServer is the far end of a bound child.
func echoServer(t *testing.T) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-ended })
	return l.Addr().String()
}

func boundSubject(t *testing.T, fault string) conformance.Subject {
	t.Helper()
	s := faultySubject(t, fault)
	s.Config = ptipc.Opaque(`{"server":"` + echoServer(t) + `"}`)
	s.Echoes = true
	return s
}

func TestBoundWithoutFault(t *testing.T) {
	t.Parallel()
	report := run(t, boundSubject(t, ""), conformance.Options{})
	want(t, report, conformance.FellShort)
	want(t, report, conformance.NotRun, slices.Concat(withoutLogs, withoutSignals, ofFree, ofPackets)...)
}

// A fault and the cases that must fall short because of it.
type fault struct {
	name  string
	fells []string
}

var (
	faults = []fault{
		{neverReady, []string{"LIFE-1/ready", "ARG-2/no-role", "ARG-2/client", "ARG-4/standard-input", "ARG-4/no-role", "ARG-4/largest", "ARG-5/unknown-keys", "PROXY-1/unreachable"}},
		{"exits with 1 for bad JSON", []string{"ARG-3/not-an-object", "ARG-4/not-json", "LIFE-9/exit-code", "LIFE-9/standard-error"}},
		{"takes any length of configuration", []string{"ARG-4/too-large"}},
		{"knows all keys of HOST", []string{"ARG-5/unknown-keys"}},
		{"exits with 1 for a bad configuration", []string{"CFG-1/refused", "LIFE-9/exit-code"}},
		{"repeats a secret", []string{"CFG-2/secret"}},
		{"takes every key", []string{"CFG-2/unknown-key"}},
		{"an error without JSON", []string{"CFG-2/place", "LINE-8/method-error"}},

		{"exits with 1 for a bad command line", []string{"ARG-3/shape", "LIFE-9/exit-code"}},
		{"wants a role", []string{"ARG-2/no-role", "ARG-3/not-an-object", "ARG-4/no-role"}},
		{"does not see its configuration", []string{"ARG-4/standard-input", "ARG-4/no-role", "ARG-4/largest", "ARG-5/unknown-keys"}},
		{"takes half a MiB of configuration", []string{"ARG-4/largest"}},
		{"listens on TCP alone", []string{"ARG-5/listen-unix"}},

		{"speaks any version", []string{"LINE-3/no-version"}},
		{"STATUS with an open quote", []string{"LINE-10/status"}},
		{"a banner on stdout", []string{"LINE-1/form"}},
		{"announces after the end", []string{"LINE-7/last"}},
		{"no VERSION", []string{"LINE-3/version-first"}},
		{"VERSION late", []string{"LINE-3/version-first"}},
		{"CMETHOD of another protocol", []string{"LINE-4/form"}},
		{"announces a public address", []string{"LINE-5/address"}},
		{"ARGS with a bad escape", []string{"LINE-6/args"}},
		{"done before it listens", []string{"LINE-7/listening"}},
		{"LOG with a bad escape", []string{"LINE-9/log"}},
		{"stops reading at an over-long line", []string{"LINE-1/skipped"}},
		{"does not drop CR", []string{"LINE-1/cr"}},
		{"dies of an unknown keyword", []string{"LINE-2/unknown-keyword"}},
		{"dies of a bad message", []string{"SIG-1/ignored"}},

		{"ignores the end of stdin", []string{"LIFE-2/idle", "LIFE-2/open-connection", "LIFE-3/after-end"}},
		{"cuts at the end", []string{"LIFE-2/open-connection", "LIFE-3/open-connection"}},
		{"exits with 1 at the end", []string{"LIFE-2/idle", "LIFE-2/open-connection", "LIFE-3/idle", "LIFE-3/open-connection"}},
		{"ignores SIGTERM", []string{"LIFE-3/idle", "LIFE-3/open-connection", "LIFE-3/second"}},
		{"ignores the second SIGTERM", []string{"LIFE-3/second", "LIFE-3/after-end"}},
		{"leaves a file outside", []string{"LIFE-8/files", "LIFE-8/watched"}},
		{"keeps a file elsewhere for a moment", []string{"LIFE-8/watched"}},
		{"listens everywhere", []string{"LIFE-11/loopback", "LIFE-11/watched"}},
		{"listens everywhere in the end", []string{"LIFE-11/watched"}},
		{"listens everywhere for datagrams", []string{"LIFE-11/loopback", "LIFE-11/watched"}},
		{"listens everywhere for datagrams in the end", []string{"LIFE-11/watched"}},

		{"refuses unknown methods", []string{"SOCKS-1/settings-win", "SOCKS-1/unknown-beside"}},
		{"does not know 0x09 alone", []string{
			"SOCKS-1/each-alone", "SOCKS-2/no-reply-between", "SOCKS-3/largest", "SOCKS-3/promised", "SOCKS-19/empty",
			"SOCKS-5/one-segment", "SOCKS-5/byte-by-byte", "SOCKS-5/two-segments", "SOCKS-6/too-large", "SOCKS-6/not-json",
			"SOCKS-6/unknown-key", "ERR-2/same-class",
		}},
		{"takes any depth", []string{"SOCKS-4/too-deep"}},
		{"takes 32 levels", []string{"SOCKS-4/deepest"}},
		{"takes no white space", []string{"SOCKS-4/white-space", "SOCKS-19/empty"}},
		{"takes any length of settings", []string{"SOCKS-3/promised", "SOCKS-6/too-large"}},
		{"takes what is no object", []string{"SOCKS-6/not-json"}},
		{"takes unknown settings for bad ones", []string{"SOCKS-4/end-of-object", "SOCKS-4/deepest", "SOCKS-6/unknown-key"}},
		{"does not tell address types", []string{"SOCKS-7/address-types"}},
		{"takes no names", []string{"SOCKS-12/nowhere", "SOCKS-13/name", "ERR-1/unknown-name", "PROXY-3/name"}},
		{"knows no unknown name", []string{"ERR-1/unknown-name"}},
		{"changes full buffers", []string{"SOCKS-15/bulk"}},
		{"serves a hundred", []string{"SOCKS-10/many"}},
		{"takes any proxy", []string{"PROXY-1/unusable"}},
		{"prefers no settings", []string{"SOCKS-1/settings-win"}},
		{"takes any method", []string{"SOCKS-1/none-known"}},
		{"replies to settings", []string{
			"SOCKS-2/no-reply-between", "SOCKS-3/largest", "SOCKS-4/largest", "SOCKS-4/white-space", "SOCKS-19/empty",
			"SOCKS-5/one-segment", "SOCKS-5/byte-by-byte", "SOCKS-5/two-segments", "ERR-2/same-class",
		}},
		{"takes 4 KiB of settings", []string{"SOCKS-3/largest", "SOCKS-4/largest"}},
		{"counts braces in strings", []string{"SOCKS-4/end-of-object"}},
		{"takes no pipelining", []string{"SOCKS-5/one-segment", "SOCKS-5/two-segments"}},
		{"takes the greeting for one segment", []string{"SOCKS-5/byte-by-byte", "SOCKS-5/two-segments"}},
		{"waits for the request to refuse settings", []string{"SOCKS-3/promised", "SOCKS-4/too-deep", "SOCKS-6/too-large", "SOCKS-6/not-json"}},
		{"takes any command", []string{"SOCKS-7/commands"}},
		{"tells its bound address", []string{"SOCKS-8/bound-address"}},
		{"one handshake at a time", []string{"SOCKS-9/others-go-on"}},
		{"stops accepting without descriptors", []string{"SOCKS-10/out-of-descriptors"}},
		{"leaks descriptors", []string{"SOCKS-22/descriptors"}},
		{"dials nowhere", []string{"SOCKS-12/nowhere"}},
		{"does not see a hang-up", []string{"SOCKS-14/hang-up", "SOCKS-14/end-without-early-data"}},
		{"takes a half-close for a hang-up", []string{"SOCKS-14/end-after-early-data"}},
		{"ends both directions at once", []string{
			"SOCKS-14/end-after-early-data", "SOCKS-15/client-first", "SOCKS-15/far-end-first", "SOCKS-15/bulk", "SOCKS-20/clean", "SOCKS-21/broken-client", "SOCKS-24/handed-over",
		}},
		{"hides a reset", []string{"SOCKS-15/broken-far-end", "SOCKS-15/broken-client", "SOCKS-20/broken-far-end", "SOCKS-21/broken-client", "SOCKS-25/broken"}},
		{"marks nothing", []string{"SOCKS-20/clean"}},
		{"marks what broke", []string{"SOCKS-20/broken-far-end", "SOCKS-25/broken"}},
		{"does not look at marks", []string{"SOCKS-21/broken-client"}},
		{"reads on from the unix socket", []string{"SOCKS-24/handed-over", "SOCKS-25/broken"}},
		{"does not wait for the host", []string{"SOCKS-24/handed-over", "SOCKS-25/broken"}},
		{"never finishes", []string{"SOCKS-24/handed-over"}},
		{"finishes what broke", []string{"SOCKS-25/broken"}},
		{"lets everybody in", []string{"SOCKS-17/other-user"}},
		{"open unix socket", []string{"SOCKS-17/socket-mode"}},
		{"open to everybody", []string{"SOCKS-17/other-user", "SOCKS-17/other-user-unix", "SOCKS-17/socket-mode"}},
		{"does not let the host in", []string{"SOCKS-17/host-user"}},
		{"general failures alone", []string{"ERR-1/refused", "ERR-2/same-class"}},

		{"no PROXY DONE", []string{"PROXY-1/done-first"}},
		{"goes around the proxy", []string{"PROXY-1/not-around", "PROXY-1/failing", "PROXY-1/unreachable", "PROXY-3/name", "PROXY-3/password", "PROXY-1/nothing-around", "PROXY-3/nothing-looked-up"}},
		{"looks names up", []string{"PROXY-3/name", "PROXY-3/nothing-looked-up"}},
		{"looks names up beside", []string{"PROXY-3/nothing-looked-up"}},
		{"tells home", []string{"PROXY-1/nothing-around"}},
		{"keeps the password from the proxy", []string{"PROXY-3/password"}},
		{"tells the password of the proxy", []string{"PROXY-3/secret"}},

		{"counts nothing", []string{"STAT-1/connection", "STAT-2/totals"}},
		{"statistics of what it does not know", []string{"STAT-3/unknown", "STAT-3/gone"}},
		{"never forgets", []string{"STAT-3/gone"}},
		{"numbers STATS by itself", []string{
			"STAT-1/connection", "STAT-2/totals", "STAT-3/unknown", "STAT-3/gone", "STAT-3/unix", "STAT-3/id",
			"LINE-1/cr", "LINE-1/skipped", "LINE-2/unknown-keyword", "SIG-1/ignored",
		}},
	}
	packetFaults = []fault{
		{"turn: no fault", nil},
		{"turn: no realm", []string{"PKT-3/form"}},
		{"turn: needs no credentials", []string{"PKT-4/without-credentials", "PKT-4/wrong-password", "PKT-5/other-user"}},
		{"turn: takes any password", []string{"PKT-4/wrong-password"}},
		{"turn: the same credentials", []string{"PKT-4/fresh"}},
		{"turn: hears everybody", []string{"PKT-5/other-user"}},
		{"turn: cuts datagrams", []string{"PKT-6/whole"}},
		{"turn: takes strangers for peers", []string{"PKT-2/unasked"}},
		{"turn: keeps sockets", []string{"PKT-7/given-back"}},
		{"turn: goes around the proxy", []string{"PROXY-4/not-around"}},
		{"turn: listens everywhere", []string{"LIFE-11/loopback", "LIFE-11/watched"}},
	}
	// Of children that have datagrams alone, in both roles.
	datagramFaults = []fault{
		{"", nil},
		{"does not see its configuration", []string{"ARG-4/standard-input", "ARG-4/no-role", "ARG-4/largest", "ARG-5/unknown-keys"}},
		{"leaves a file outside", []string{"LIFE-8/files", "LIFE-8/watched"}},
		{"listens everywhere for datagrams", []string{"LIFE-11/loopback", "LIFE-11/watched"}},
		{"listens everywhere for datagrams in the end", []string{"LIFE-11/watched"}},
		{"turn: listens everywhere", []string{"LIFE-11/loopback", "LIFE-11/watched"}},
		{"turn: cuts datagrams", []string{"PKT-6/whole"}},
		{"dies of an unknown keyword", []string{"LINE-2/unknown-keyword"}},
	}
	datagramServerFaults = []fault{
		{"", nil},
		{"does not see its configuration", []string{"ARG-4/standard-input", "ARG-4/largest", "ARG-5/unknown-keys"}},
		{"leaves a file outside", []string{"LIFE-8/files", "LIFE-8/watched"}},
		{"listens everywhere for datagrams", []string{"LIFE-11/loopback", "LIFE-11/watched"}},
		{"listens everywhere for datagrams in the end", []string{"LIFE-11/watched"}},
		{"dies of an unknown keyword", []string{"LINE-2/unknown-keyword"}},
		{"server: counts nothing", []string{"STAT-2/totals"}},
		{"server: hears no datagrams", []string{
			"ARG-4/standard-input", "LINE-1/skipped", "LINE-2/unknown-keyword", "LIFE-8/files", "LIFE-8/watched", "LIFE-11/loopback", "LIFE-11/watched",
			"SIG-1/form", "SIG-1/ignored", "SIG-2/repeated", "SIG-4/size", "SRV-1/announced", "SRV-2/connects", "SRV-2/no-deliver", "STAT-2/totals",
		}},
	}
	boundFaults = []fault{
		{"bound to anything", []string{"SOCKS-11/elsewhere"}},
		{"takes every key", []string{"CFG-2/unknown-key", "CFG-2/twice", "CFG-2/wrong-case"}},
	}
	slowFaults = []fault{
		{"", nil},
		{"waits forever", []string{"SOCKS-6/too-late", "SOCKS-9/silence-ends"}},
		{"waits for its configuration", []string{"ARG-4/no-line"}},
	}
)

// impatience is enough for a child of this test to get ready, if the machine is not busy.
const impatience = 1500 * time.Millisecond

// patience is for what has to hold, on a machine that is busy with all of these tests.
const patience = 15 * time.Second

// neverReady is a fault with which no other case than those that it is about can run.
const neverReady = "never ready"

// othersThan are the other cases of a role.
func othersThan(role string, names []string) []string {
	var others []string
	for _, c := range conformance.Cases(conformance.Seed) {
		if c.Role == role && !slices.Contains(names, c.Name) {
			others = append(others, c.Name)
		}
	}
	return others
}

// What a server and generate share with a client, and the faults show there that make
// no other case fall short, is only run to fall short.
var (
	serverFaults = []fault{
		{"server: announces port 0", []string{
			"ARG-4/standard-input", "LINE-1/skipped", "LINE-2/unknown-keyword", "LIFE-8/files", "LIFE-11/loopback", "SIG-1/ignored",
			"LIFE-8/watched", "LIFE-11/watched", "SRV-1/announced", "SRV-3/delivers", "SRV-3/nothing-before-the-reply", "SRV-3/refused", "SRV-3/half-close", "STAT-2/totals",
			"LIFE-2/open-connection", "LIFE-3/open-connection", "LIFE-3/second", "LIFE-3/after-end",
			"SOCKS-20/delivered", "SOCKS-20/broken-wire", "SOCKS-21/broken-host", "SOCKS-24/service", "SOCKS-25/broken-wire",
		}},
		{"server: a name with a digit in front", []string{"SRV-1/announced"}},
		{"server: ARGS with a bad escape", []string{"SRV-2/args"}},
		{"server: hides the client's address", []string{"SRV-3/delivers"}},
		{"server: sends before the reply", []string{"SRV-3/nothing-before-the-reply"}},
		{"server: does not read the reply", []string{"SRV-3/refused"}},
		{"server: needs no deliver", []string{"SRV-3/no-deliver"}},
		{"server: ends both directions at once", []string{"SRV-3/half-close", "SOCKS-21/broken-host", "SOCKS-24/service"}},
		{"server: marks nothing", []string{"SOCKS-20/delivered"}},
		{"server: marks what broke", []string{"SOCKS-20/broken-wire", "SOCKS-25/broken-wire"}},
		{"server: does not look at marks", []string{"SOCKS-21/broken-host"}},
		{"server: counts nothing", []string{"STAT-2/totals"}},
	}
	serverSharedFaults = []fault{
		{"reads on from the unix socket", []string{"SOCKS-24/service", "SOCKS-25/broken-wire"}},
		{"does not wait for the host", []string{"SOCKS-24/service", "SOCKS-25/broken-wire"}},
		{"never finishes", []string{"SOCKS-24/service"}},
		{"finishes what broke", []string{"SOCKS-25/broken-wire"}},
		{"announces after the end", []string{"SRV-1/last"}},
		{"exits with 1 for bad JSON", []string{"ARG-3/not-an-object", "ARG-4/not-json", "LIFE-9/exit-code", "LIFE-9/standard-error"}},
		{"exits with 1 for a bad command line", []string{"ARG-3/shape", "LIFE-9/exit-code"}},
		{"does not see its configuration", []string{"ARG-4/standard-input", "ARG-4/largest", "ARG-5/unknown-keys"}},
		{"takes any length of configuration", []string{"ARG-4/too-large"}},
		{"knows all keys of HOST", []string{"ARG-5/unknown-keys"}},
		{"exits with 1 for a bad configuration", []string{"CFG-1/refused", "LIFE-9/exit-code"}},
		{"repeats a secret", []string{"CFG-2/secret"}},
		{"takes every key", []string{"CFG-2/unknown-key", "CFG-2/twice", "CFG-2/wrong-case"}},
		{"an error without JSON", []string{"CFG-2/place", "LINE-8/method-error"}},
		{"leaves a file outside", []string{"LIFE-8/files", "LIFE-8/watched"}},
		{"keeps a file elsewhere for a moment", []string{"LIFE-8/watched"}},
		{"listens everywhere", []string{"LIFE-11/loopback", "LIFE-11/watched"}},
		{"listens everywhere in the end", []string{"LIFE-11/watched"}},
		{"listens everywhere for datagrams", []string{"LIFE-11/loopback", "LIFE-11/watched"}},
		{"listens everywhere for datagrams in the end", []string{"LIFE-11/watched"}},
		{"no PROXY DONE", []string{"PROXY-1/done-first"}},
		{"takes any proxy", []string{"PROXY-1/unusable"}},
		{"tells the password of the proxy", []string{"PROXY-3/secret"}},
		{"stops reading at an over-long line", []string{"LINE-1/skipped"}},
		{"does not drop CR", []string{"LINE-1/cr"}},
		{"dies of an unknown keyword", []string{"LINE-2/unknown-keyword"}},
		{"VERSION late", []string{"LINE-3/version-first"}},
		{"speaks any version", []string{"LINE-3/no-version"}},
		{"a banner on stdout", []string{"LINE-1/form"}},
		{"LOG with a bad escape", []string{"LINE-9/log"}},
		{"STATUS with an open quote", []string{"LINE-10/status"}},
		{"dies of a bad message", []string{"SIG-1/ignored"}},
		{"exits with 1 at the end", []string{"LIFE-2/idle", "LIFE-2/open-connection", "LIFE-3/idle", "LIFE-3/open-connection"}},
		{"cuts at the end", []string{"LIFE-2/open-connection", "LIFE-3/open-connection"}},
		{"ignores SIGTERM", []string{"LIFE-3/idle", "LIFE-3/open-connection", "LIFE-3/second"}},
		{"ignores the second SIGTERM", []string{"LIFE-3/second", "LIFE-3/after-end"}},
	}
	proxyingFaults = []fault{
		{"server: needs deliver", []string{"SRV-2/no-deliver"}},
		{"server: delivers all the same", []string{"SRV-2/connects"}},
	}
	generateFaults = []fault{
		{"", nil},
		{"generate: a banner", []string{"SRV-6/generate"}},
		{"generate: port 0", []string{"SRV-6/port", "SRV-6/match"}},
		{"generate: no match", []string{"SRV-6/match"}},
		{"exits with 1 for bad JSON", []string{"ARG-3/not-an-object", "ARG-4/not-json", "LIFE-9/exit-code", "LIFE-9/standard-error"}},
		{"exits with 1 for a bad command line", []string{"ARG-3/shape", "LIFE-9/exit-code"}},
		{"does not see its configuration", []string{"ARG-4/standard-input", "ARG-4/largest"}},
		{"takes any length of configuration", []string{"ARG-4/too-large"}},
		{"exits with 1 for a bad configuration", []string{"CFG-1/refused", "LIFE-9/exit-code"}},
		{"repeats a secret", []string{"CFG-2/secret"}},
		{"takes every key", []string{"CFG-2/unknown-key", "CFG-2/twice", "CFG-2/wrong-case"}},
	}
	// With signals, in the role client and, of a generated pair, in the role server.
	signalFaults = []fault{
		{"", nil},
		{"signals: body is no object", []string{"SIG-1/form", "SIG-2/no-peer"}},
		{"signals: with a peer", []string{"SIG-2/no-peer"}},
		{"signals: too long", []string{"SIG-4/size"}},
	}
	serverSignalFaults = []fault{
		{"", nil},
		{"signals: answers with no object", []string{"SIG-1/form", "SIG-2/repeated"}},
		{"signals: forgets the peer", []string{"SIG-2/repeated"}},
		{"signals: too long", []string{"SIG-4/size"}},
	}
	waitsForAnAnswer = fault{"signals: waits for an answer", []string{"SIG-3/unanswered"}}
)

// serverSubject is a server with a key in its configuration.
func serverSubject(t *testing.T, fault string) conformance.Subject {
	t.Helper()
	s := faultySubject(t, fault)
	s.Role, s.Config = conformance.Server, ptipc.Opaque(`{"listen":"127.0.0.1:0"}`)
	return s
}

func TestServerWithoutFault(t *testing.T) {
	t.Parallel()
	report := run(t, serverSubject(t, ""), conformance.Options{Patience: patience})
	want(t, report, conformance.FellShort)
	want(t, report, conformance.NotRun, slices.Concat(withoutLogs, ofServer, ofProxying)...)
}

// A server that connects its clients itself, to an echo server.
func proxyingSubject(t *testing.T, fault string) conformance.Subject {
	t.Helper()
	s := faultySubject(t, fault)
	s.Role, s.Config, s.Echoes = conformance.Server, ptipc.Opaque(`{"to":"`+echoServer(t)+`"}`), true
	return s
}

func TestProxyingServerWithoutFault(t *testing.T) {
	t.Parallel()
	report := run(t, proxyingSubject(t, ""), conformance.Options{Patience: patience})
	want(t, report, conformance.FellShort)
	want(t, report, conformance.NotRun, slices.Concat(withoutLogs, ofServer, ofDelivering)...)
}

// A client of a generated pair leads to the suite, by way of its server.
func TestGeneratedClient(t *testing.T) {
	t.Parallel()
	s := faultySubject(t, "")
	s.Generate = ptipc.Opaque("{}")
	report := run(t, s, conformance.Options{Patience: patience})
	want(t, report, conformance.FellShort)
	want(t, report, conformance.NotRun, slices.Concat(withoutLogs, withoutSignals, onlyFree, ofPackets)...)
}

func TestFaultsOfServer(t *testing.T) {
	t.Parallel()
	for _, f := range serverFaults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			everyCase(t, serverSubject(t, f.name), f)
		})
	}
	for _, f := range proxyingFaults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			everyCase(t, proxyingSubject(t, f.name), f)
		})
	}
	for _, f := range serverSharedFaults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			fallsShort(t, serverSubject(t, f.name), f)
		})
	}
}

func TestFaultsOfGenerate(t *testing.T) {
	t.Parallel()
	for _, f := range generateFaults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			s := faultySubject(t, f.name)
			s.Role, s.Generate = conformance.Generate, ptipc.Opaque(`{"listen":"127.0.0.1:0"}`)
			everyCase(t, s, f)
		})
	}
}

func TestFaultsOfSignals(t *testing.T) {
	t.Parallel()
	for _, f := range append(signalFaults, waitsForAnAnswer) {
		t.Run("client "+f.name, func(t *testing.T) {
			t.Parallel()
			s := faultySubject(t, f.name)
			s.Config = ptipc.Opaque(`{"signals":"yes"}`)
			if f.name == waitsForAnAnswer.name {
				fallsShort(t, s, f) // nothing else can hold
				return
			}
			only(t, s, f, "^SIG-")
		})
	}
	for _, f := range append(serverSignalFaults, waitsForAnAnswer) {
		t.Run("server "+f.name, func(t *testing.T) {
			t.Parallel()
			s := faultySubject(t, f.name)
			s.Role, s.Generate = conformance.Server, ptipc.Opaque(`{"signals":"yes"}`)
			if f.name == waitsForAnAnswer.name {
				fallsShort(t, s, f)
				return
			}
			only(t, s, f, "^SIG-[124]")
		})
	}
}

// fallsShort runs the cases that a fault makes fall short.
func fallsShort(t *testing.T, s conformance.Subject, f fault) {
	t.Helper()
	needLinux(t)
	report, err := impatiently(t.Context(), s, f)
	if err != nil {
		t.Fatal(err)
	}
	want(t, report, conformance.FellShort, f.fells...)
}

// impatiently runs the cases that must fall short with little patience, since most of
// them wait for all of it. A busy machine may need more for what is not the fault's.
func impatiently(ctx context.Context, s conformance.Subject, f fault) (conformance.Report, error) {
	o := conformance.Options{Patience: impatience, Pattern: exactly(f.fells)}
	report, err := conformance.Run(ctx, s, o)
	if err == nil && len(report.Names(conformance.FellShort)) != len(f.fells) {
		o.Patience = patience
		report, err = conformance.Run(ctx, s, o)
	}
	return report, err
}

// only runs some cases, of which the fault makes these alone fall short.
func only(t *testing.T, s conformance.Subject, f fault, pattern string) {
	t.Helper()
	report := run(t, s, conformance.Options{Patience: patience, Pattern: pattern})
	want(t, report, conformance.FellShort, f.fells...)
	want(t, report, conformance.NotRun)
}

// everyCase runs the cases that must fall short, and those that must not.
func everyCase(t *testing.T, s conformance.Subject, f fault) {
	t.Helper()
	if len(f.fells) > 0 {
		fallsShort(t, s, f)
	}
	if !wholeMatrix() && len(f.fells) > 0 {
		return
	}
	report := run(t, s, conformance.Options{Patience: patience, Pattern: exactly(othersThan(s.Role, f.fells))})
	want(t, report, conformance.FellShort)
}

// exactly is a pattern for these cases alone.
func exactly(names []string) string { return "^(" + strings.Join(names, "|") + ")$" }

// wholeMatrix says that each fault is also held against all cases that must not fall
// short. That takes a thousand times the child, which only CI has the time for.
func wholeMatrix() bool { return os.Getenv("PTIPC_NO_SKIP") != "" && !testing.Short() }

// Each fault makes the cases fall short that are about it, and no other.
func TestFaults(t *testing.T) {
	t.Parallel()
	needLinux(t)
	// The runs wait most of the time: more of them fit side by side than there are
	// processors. What has to fall short waits for all of its patience, so that it gets
	// less than what has to hold.
	reports, errs := make([]conformance.Report, len(faults)), make([]error, len(faults))
	free := make(chan struct{}, 4*runtime.GOMAXPROCS(0))
	var runs sync.WaitGroup
	for i, f := range faults {
		s := faultySubject(t, f.name)
		free <- struct{}{}
		runs.Go(func() {
			defer func() { <-free }()
			reports[i], errs[i] = impatiently(t.Context(), s, f)
			if errs[i] != nil || !wholeMatrix() || f.name == neverReady {
				return
			}
			var rest conformance.Report
			rest, errs[i] = conformance.Run(t.Context(), s, conformance.Options{Patience: patience, Pattern: exactly(othersThan(conformance.Client, f.fells))})
			reports[i].Results = append(reports[i].Results, rest.Results...)
		})
	}
	runs.Wait()
	for i, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			if errs[i] != nil {
				t.Fatal(errs[i])
			}
			want(t, reports[i], conformance.FellShort, f.fells...)
		})
	}
}

// A child of datagrams alone, whose server leads to an echo server.
func datagramSubject(t *testing.T, role, fault string) conformance.Subject {
	t.Helper()
	s := faultySubject(t, fault)
	s.Role, s.Generate, s.Echoes = role, ptipc.Opaque(`{"packets":"alone"}`), true
	return s
}

func TestFaultsOfDatagrams(t *testing.T) {
	t.Parallel()
	for role, faults := range map[string][]fault{conformance.Client: datagramFaults, conformance.Server: datagramServerFaults} {
		for _, f := range faults {
			t.Run(role+" "+f.name, func(t *testing.T) {
				t.Parallel()
				everyCase(t, datagramSubject(t, role, f.name), f)
			})
		}
	}
}

// What is the suite's to drive of a child of datagrams, it drives.
func TestDatagramsWithoutFault(t *testing.T) {
	t.Parallel()
	for role, notRun := range map[string][]string{
		conformance.Client:   slices.Concat(withoutLogs, withoutSignals, ofStreams, []string{"PKT-2/unasked"}),
		conformance.Server:   slices.Concat(withoutLogs, ofServer, ofStreamingServers),
		conformance.Generate: nil,
	} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			report := run(t, datagramSubject(t, role, ""), conformance.Options{Patience: patience})
			want(t, report, conformance.FellShort)
			want(t, report, conformance.NotRun, notRun...)
		})
	}
}

func TestFaultsOfPackets(t *testing.T) {
	t.Parallel()
	for _, f := range packetFaults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			names := ofPackets
			switch f.name {
			case "turn: no realm": // there are no credentials to try
				names = f.fells
			case "turn: needs no credentials", "turn: takes any password": // there are no allocations either
				names = []string{"PKT-3/form", "PKT-4/without-credentials", "PKT-4/wrong-password", "PKT-5/other-user"}
			}
			report := run(t, faultySubject(t, f.name), conformance.Options{Pattern: exactly(slices.Concat(names, []string{"LINE-4/form", "LINE-5/address", "LINE-6/args", "LINE-7/listening", "LIFE-11/loopback", "LIFE-11/watched"}))})
			want(t, report, conformance.FellShort, f.fells...)
			want(t, report, conformance.NotRun)
		})
	}
}

func TestFaultsOfBound(t *testing.T) {
	t.Parallel()
	for _, f := range boundFaults {
		report := run(t, boundSubject(t, f.name), conformance.Options{})
		want(t, report, conformance.FellShort, f.fells...)
	}
	// Nothing that connects can hold here: the case that is about it is of interest alone.
	report := run(t, boundSubject(t, "bound to nothing"), conformance.Options{Pattern: "^SOCKS-11/"})
	want(t, report, conformance.FellShort, "SOCKS-11/anywhere")
}

func TestFaultsSlow(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("-short is set, and this waits for limits of ten seconds")
	}
	var names []string
	for _, c := range conformance.Cases(conformance.Seed) {
		if c.Slow && c.Role == conformance.Client {
			names = append(names, c.Name)
		}
	}
	for _, f := range slowFaults {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			report := run(t, faultySubject(t, f.name), conformance.Options{Slow: true, Pattern: exactly(names)})
			want(t, report, conformance.FellShort, f.fells...)
			want(t, report, conformance.NotRun)
		})
	}
	for _, role := range []string{conformance.Server, conformance.Generate} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			s := faultySubject(t, "waits for its configuration")
			s.Role = role
			report := run(t, s, conformance.Options{Slow: true, Pattern: exactly(slowOfAny)})
			want(t, report, conformance.FellShort, slowOfAny...)
		})
	}
}

// slowOfAny are the slow cases of servers and of generate.
var slowOfAny = []string{"ARG-4/no-line"}

// Every case is shown to fall short for some fault: one that cannot would say nothing.
func TestEveryCaseCanFallShort(t *testing.T) {
	fells := map[string]bool{conformance.Client + " SOCKS-11/anywhere": true} // see TestFaultsOfBound
	for role, faults := range map[string][]fault{
		conformance.Client:   slices.Concat(faults, packetFaults, datagramFaults, boundFaults, slowFaults, signalFaults, []fault{waitsForAnAnswer}),
		conformance.Server:   slices.Concat(serverFaults, serverSharedFaults, datagramServerFaults, proxyingFaults, serverSignalFaults, []fault{waitsForAnAnswer, {fells: slowOfAny}}),
		conformance.Generate: append(generateFaults, fault{fells: slowOfAny}),
	} {
		for _, f := range faults {
			for _, name := range f.fells {
				fells[role+" "+name] = true
			}
		}
	}
	cases := map[string]bool{}
	for _, c := range conformance.Cases(conformance.Seed) {
		name := c.Role + " " + c.Name
		if cases[name] {
			t.Errorf("two cases have the name %s", name)
		}
		cases[name] = true
		if !fells[name] {
			t.Errorf("no fault makes %s fall short", name)
		}
		if !strings.HasPrefix(c.Name, c.Clause+"/") {
			t.Errorf("%s is not named by its clause %s", c.Name, c.Clause)
		}
	}
	for name := range fells {
		if !cases[name] {
			t.Errorf("no case has the name %s", name)
		}
	}
}

// What a caller gets wrong is an error of the suite's, and no verdict on a child.
func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		name    string
		subject conformance.Subject
		options conformance.Options
		want    string
	}{
		{"no file", conformance.Subject{Path: "./no-such-child"}, conformance.Options{}, "no-such-child"},
		{"no path", conformance.Subject{}, conformance.Options{}, "Path"},
		{"bad pattern", faultySubject(t, ""), conformance.Options{Pattern: "("}, "pattern"},
		{"no case", faultySubject(t, ""), conformance.Options{Pattern: "^NONE-99"}, "no case matches"},
		{"slow alone", faultySubject(t, ""), conformance.Options{Pattern: "^ARG-4/no-line$"}, "Slow"},
		{"bad role", conformance.Subject{Path: "x", Role: "relay"}, conformance.Options{}, "Role"},
		{"bad destination", conformance.Subject{Path: "sh", Dest: "example.com"}, conformance.Options{}, "Dest"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if report, err := conformance.Run(t.Context(), tt.subject, tt.options); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q; %v", err, tt.want, report)
			}
		})
	}
}

// A report says what was expected, what came, and shows the bytes.
func TestReport(t *testing.T) {
	t.Parallel()
	o := conformance.Options{Pattern: "^(SOCKS-8/|SOCKS-11/|ERR-1/refused)"}
	report, err := conformance.Run(t.Context(), faultySubject(t, "tells its bound address"), o)
	if err != nil {
		t.Fatal(err)
	}
	text := report.String()
	for _, want := range []string{
		"held          MUST   ERR-1/refused\n", "could not run MUST   SOCKS-11/anywhere: the connection factory is free\n",
		"fell short    MUST   SOCKS-8/bound-address\n\texpected: 0.0.0.0:0", "\tclient > 05 01 00 |...|\n", "7f 00 00 01",
		"\tstdout \"CMETHODS DONE\"\n", "MUST   1 held, 1 fell short, 2 could not run\n", "SHOULD 0 held, 0 fell short, 0 could not run\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in the report:\n%s", want, text)
		}
	}
	if report.OK() {
		t.Error("the report is OK although a MUST fell short")
	}
	if (conformance.Report{}).OK() {
		t.Error("a report without a case that held is OK")
	}
}

// A run that is ended says of what is left that it could not run, and leaves nothing.
func TestCancel(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	report, err := conformance.Run(ctx, faultySubject(t, ""), conformance.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Results) == 0 || len(report.Names(conformance.NotRun)) != len(report.Results) {
		t.Errorf("cases were run although the context had ended:\n%s", report)
	}
}

func TestRawChild(t *testing.T) {
	t.Parallel()
	script, err := filepath.Abs("../../testdata/children/rawchild.py")
	if err != nil {
		t.Fatal(err)
	}
	s := conformance.Subject{Path: testpeer.Need(t, "python3"), Args: []string{script}, Plain: true}
	demandAll(t, s, slices.Concat(withoutKeys, withoutErrors, withoutLogs, withoutSignals, ofBound, ofExtended, ofStats, ofPackets))
}

// tool builds the tool, which carries transports.
func tool(t *testing.T) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "ptipc")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", path, "pthost/cmd/ptipc")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return path
}

// The wire of a server is reached through its own client, and what a client leads to
// through its own server.
func TestWebsocket(t *testing.T) {
	t.Parallel()
	path := tool(t)
	for role, notRun := range map[string][]string{
		conformance.Client:   slices.Concat(withoutSignals, onlyFree, ofPackets, []string{"LINE-10/status"}),
		conformance.Server:   slices.Concat(ofServer, ofProxying, []string{"LINE-10/status"}),
		conformance.Generate: nil,
	} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			s := conformance.Subject{
				Path: path, Args: []string{"transport", "websocket"},
				Role: role, Generate: ptipc.Opaque(`{"listen":"127.0.0.1:0"}`),
			}
			demandAll(t, s, notRun)
		})
	}
}

// Datagrams, to an echo server behind the server.
func TestScramble(t *testing.T) {
	t.Parallel()
	path := tool(t)
	options := ptipc.Opaque(`{"listen":"127.0.0.1:0","to":"` + packetEchoServer(t) + `"}`)
	var slowOfStreams []string
	if !testing.Short() {
		slowOfStreams = []string{"SOCKS-6/too-late", "SOCKS-9/silence-ends"}
	}
	for role, notRun := range map[string][]string{
		conformance.Client:   slices.Concat(withoutLogs, withoutSignals, ofStreams, slowOfStreams, []string{"PKT-2/unasked"}),
		conformance.Server:   slices.Concat(withoutLogs, ofServer, ofStreamingServers),
		conformance.Generate: nil,
	} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			s := conformance.Subject{Path: path, Args: []string{"transport", "scramble"}, Role: role, Generate: options, Echoes: true}
			demandAll(t, s, notRun)
		})
	}
}

// packetEchoServer is what the server of a wire of datagrams leads to.
func packetEchoServer(t *testing.T) (addr string) {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 4096)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(buf[:n], from)
		}
	}()
	t.Cleanup(func() { conn.Close(); <-ended })
	return conn.LocalAddr().String()
}

// A free transport made bound.
func TestBound(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := conformance.Subject{Path: self, Args: []string{asBound, echoServer(t)}, Echoes: true}
	demandAll(t, s, slices.Concat(withoutKeys, withoutSignals, ofFree, []string{"LINE-10/status"}))
}

// A server that connects its clients itself, and a free client of what is underneath a
// bound transport, with a carrier for each connection or for many.
func TestFreeOverWebsocket(t *testing.T) { freeOverWebsocket(t, asFree) }
func TestMuxOverWebsocket(t *testing.T)  { freeOverWebsocket(t, asMux) }

func freeOverWebsocket(t *testing.T, as string) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for role, notRun := range map[string][]string{
		conformance.Client:   slices.Concat(withoutSignals, ofBound, ofPackets, []string{"LINE-10/status", "PROXY-3/name"}),
		conformance.Server:   slices.Concat(ofServer, withoutLogs, ofDelivering),
		conformance.Generate: nil,
	} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			s := conformance.Subject{
				Path: self, Args: []string{as}, Role: role,
				Generate: ptipc.Opaque(`{"carrier":{"listen":"127.0.0.1:0"},"egress":{"allow":["127.0.0.0/8:*","localhost:*","*:*"]}}`),
			}
			demandAll(t, s, notRun)
		})
	}
}

func TestDirect(t *testing.T) {
	t.Parallel()
	demandAll(t, conformance.Subject{Path: tool(t), Args: []string{"transport", "direct"}}, slices.Concat(withoutKeys, withoutSignals, ofBound, []string{"LINE-10/status", "SOCKS-24/handed-over", "SOCKS-25/broken"}))
}

// demandAll demands every MUST and SHOULD, and that no other case than these could
// not run.
func demandAll(t *testing.T, s conformance.Subject, notRun []string) {
	t.Helper()
	report := run(t, s, conformance.Options{Slow: !testing.Short(), Strict: true, Patience: patience})
	want(t, report, conformance.FellShort)
	if !report.OK() {
		t.Error("the report is not OK")
	}
	if testing.Short() {
		notRun = slices.DeleteFunc(slices.Clone(notRun), func(name string) bool { return name == "ARG-4/no-line" })
	}
	slices.Sort(notRun)
	want(t, report, conformance.NotRun, slices.Compact(notRun)...)
}

// Test makes a subtest of each case.
func TestTest(t *testing.T) {
	conformance.Test(t, faultySubject(t, ""), conformance.Options{Pattern: "^(SOCKS-5|SOCKS-11)/"})
}
