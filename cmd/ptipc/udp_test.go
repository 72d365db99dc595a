package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"pthost/ptipc"
	"pthost/ptipc/host"
	"pthost/ptipc/stdio"
	"pthost/ptipc/testpeer"
)

// startDNS runs a server that knows a small answer and a large one.
func startDNS(t *testing.T) string {
	t.Helper()
	dnsmasq := testpeer.Need(t, "dnsmasq")
	addr := freePort(t)
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	args := []string{
		"--keep-in-foreground", "--conf-file=/dev/null", "--port=" + port, "--listen-address=127.0.0.1", "--bind-interfaces",
		"--no-resolv", "--no-hosts", "--no-poll", "--pid-file=", "--edns-packet-max=1400",
		"--address=/example.test/192.0.2.77", "--txt-record=large.test," + strings.TrimSuffix(strings.Repeat(strings.Repeat("x", 250)+",", 5), ","),
	}
	if os.Getuid() == 0 {
		args = append(args, "--user=root")
	}
	startPeer(t, addr, exec.Command(dnsmasq, args...))
	return addr
}

func dig(t *testing.T, front string, args ...string) string {
	t.Helper()
	_, port, err := net.SplitHostPort(front)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(run(t, exec.CommandContext(t.Context(), testpeer.Need(t, "dig"),
		append([]string{"@127.0.0.1", "-p", port, "+short", "+tries=5", "+timeout=2", "+bufsize=1400", "+ignore"}, args...)...)))
}

// dig asks a real DNS server through a front for datagrams: straight through a child,
// and sealed between two hosts whose wire looks like nothing.
func TestDigThroughFront(t *testing.T) {
	testpeer.Need(t, "dig")
	dns := startDNS(t)
	opener := toolCommand(t.Context(), t, "generate", "builtin:scramble", fmt.Sprintf(`{"listen":"127.0.0.1:0","to":%q}`, dns))
	text, err := opener.Output()
	if err != nil {
		t.Fatal(err)
	}
	var generated struct {
		Client map[string]any `json:"client"`
		Server map[string]any `json:"server"`
	}
	if err := json.Unmarshal(text, &generated); err != nil {
		t.Fatal(err)
	}
	startTool(t, writeConfig(t, map[string]any{"transports": map[string]any{
		"far": map[string]any{"exec": "builtin:scramble", "role": "server", "config": generated.Server},
	}}))
	for name, config := range map[string]struct {
		config any
		dest   any
	}{
		"direct":   {map[string]any{}, dns},
		"scramble": {generated.Client, generated.Server["listen"]},
	} {
		t.Run(name, func(t *testing.T) {
			r := startTool(t, writeConfig(t, map[string]any{
				"transports": map[string]any{"a": map[string]any{"exec": "builtin:" + name, "config": config.config}},
				"fronts":     []any{map[string]any{"listen": "udp://127.0.0.1:0", "serve": "forward", "transport": "a", "dest": config.dest, "idle": "30s", "sessions": 8}},
			}))
			for range 20 { // more than there may be sessions
				if got := dig(t, r.front, "www.example.test"); got != "192.0.2.77" {
					t.Errorf("dig: %q", got)
				}
			}
			if got := dig(t, r.front, "TXT", "large.test"); strings.Count(got, "x") != 5*250 {
				t.Errorf("a large answer: %q", got)
			}
		})
	}
}

// iperf3 sends datagrams in both directions through fronts for its streams and its
// datagrams on the same port.
func TestIperfThroughFronts(t *testing.T) {
	iperf := testpeer.Need(t, "iperf3")
	addr, front := freePort(t), freePort(t)
	_, port, _ := net.SplitHostPort(addr)
	_, frontPort, _ := net.SplitHostPort(front)
	startPeer(t, addr, exec.Command(iperf, "-s", "-B", "127.0.0.1", "-p", port))
	startTool(t, writeConfig(t, map[string]any{
		"transports": map[string]any{"a": map[string]any{"exec": "builtin:direct"}},
		"fronts": []any{
			map[string]any{"listen": "tcp://" + front, "serve": "forward", "transport": "a", "dest": addr},
			map[string]any{"listen": "udp://" + front, "serve": "forward", "transport": "a", "dest": addr},
		},
	}))
	for _, direction := range [][]string{nil, {"-R"}} {
		text := run(t, exec.CommandContext(t.Context(), iperf, append([]string{
			"-c", "127.0.0.1", "-p", frontPort, "-u", "-b", "5M", "-l", "1200", "-t", "2", "-J",
		}, direction...)...))
		var report struct {
			End struct {
				Sum struct {
					Packets int `json:"packets"`
					Lost    int `json:"lost_packets"`
				} `json:"sum"`
			} `json:"end"`
		}
		if err := json.Unmarshal([]byte(text), &report); err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		t.Logf("%v: %d packets, %d lost", direction, report.End.Sum.Packets, report.End.Sum.Lost)
		// A machine with other work loses some.
		if s := report.End.Sum; s.Packets < 100 || s.Lost > s.Packets/2 {
			t.Errorf("%v: %d packets, %d lost", direction, s.Packets, s.Lost)
		}
	}
}

// UDP ASSOCIATE on the ordinary SOCKS5 front, through a child.
func TestAssociateThroughChild(t *testing.T) {
	dns := startDNS(t)
	r := startTool(t, writeConfig(t, map[string]any{
		"transports": map[string]any{"a": map[string]any{"exec": "builtin:direct"}},
		"fronts":     []any{map[string]any{"listen": "tcp://127.0.0.1:0", "serve": "socks5", "transport": "a"}},
	}))
	conn, err := net.Dial("tcp", r.front)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Write([]byte{5, 1, 0, 5, 3, 0, 1, 0, 0, 0, 0, 0, 0}); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 12)
	if _, err := io.ReadFull(conn, reply); err != nil || reply[3] != 0 {
		t.Fatalf("% x, %v", reply, err)
	}
	udp, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: reply[6:10], Port: int(reply[10])<<8 | int(reply[11])})
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	_, text, _ := net.SplitHostPort(dns)
	var port int
	if _, err := fmt.Sscan(text, &port); err != nil {
		t.Fatal(err)
	}
	header := []byte{0, 0, 0, 1, 127, 0, 0, 1, byte(port >> 8), byte(port)}
	query := append([]byte{0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 7}, "example\x04test\x00\x00\x01\x00\x01"...)
	buf := make([]byte, 1500)
	for i := range 10 { // the first ones may be lost
		if _, err := udp.Write(append(header, query...)); err != nil {
			t.Fatal(err)
		}
		_ = udp.SetReadDeadline(time.Now().Add(2 * time.Second))
		n, err := udp.Read(buf)
		if err != nil && i < 9 {
			continue
		}
		if err != nil || string(buf[:10]) != string(header) || !strings.HasSuffix(string(buf[:n]), "\xc0\x00\x02\x4d") {
			t.Errorf("% x, %v", buf[:n], err)
		}
		break
	}
}

// startChild runs a builtin transport as a child of no host, and returns what it says of its packet factory.
func startChild(t *testing.T, name, config string) stdio.CMethod {
	t.Helper()
	cmd := toolCommand(context.Background(), t, "transport", name, config)
	cmd.Dir = t.TempDir()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	found := make(chan stdio.CMethod, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if m, ok := parsed(lines.Bytes()).(stdio.CMethod); ok && m.Protocol == stdio.ProtocolTURN {
				found <- m
			}
		}
		_ = cmd.Wait() // its exit code is for those who wait for it
	}()
	t.Cleanup(func() {
		_ = stdin.Close()
		<-ended
	})
	return within(t, "the child announces its packet factory", found)
}

func parsed(line []byte) stdio.Message {
	m, err := stdio.Parse(line)
	if err != nil {
		return nil
	}
	return m
}

// coturn's client uses a child as any TURN server, and what it sends comes back.
func TestCoturnThroughChild(t *testing.T) {
	program := testpeer.Need(t, "turnutils_uclient")
	m := startChild(t, "direct", `{}`)
	username, password, _, ok := m.Args.TURN()
	if !ok {
		t.Fatalf("%s has no credentials", m.Name)
	}
	_, port, err := net.SplitHostPort(m.Addr)
	if err != nil {
		t.Fatal(err)
	}
	peer, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	echoed := make(chan struct{})
	go func() {
		defer close(echoed)
		b := make([]byte, 2048)
		for {
			n, from, err := peer.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = peer.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	t.Cleanup(func() {
		_ = peer.Close()
		<-echoed
	})
	for name, option := range map[string]string{"channels": "-c", "indications": "-s"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // most of the time it sleeps
			out := run(t, exec.CommandContext(t.Context(), program, "-c", option, "-n", "50", "-m", "2", "-z", "2", "-l", "1200",
				"-u", username, "-w", password, "-e", "127.0.0.1", "-r", fmt.Sprint(peer.LocalAddr().(*net.UDPAddr).Port), "-p", port, "127.0.0.1"))
			if !strings.Contains(out, "tot_send_msgs=100, tot_recv_msgs=100") {
				t.Error(out)
			}
		})
	}
}

// Two pages, each in a browser of its own, whose only way to each other is a child as
// their TURN server, talk over a data channel. They signal through the site they come from.
func TestChromiumDataChannel(t *testing.T) {
	testpeer.Need(t, "chromium")
	m := startChild(t, "direct", `{"listen":"127.0.0.1:0"}`)
	username, password, _, ok := m.Args.TURN()
	if !ok {
		t.Fatalf("%s has no credentials", m.Name)
	}
	servers, err := json.Marshal([]map[string]string{{"urls": "turn:" + m.Addr + "?transport=udp", "username": username, "credential": password}})
	if err != nil {
		t.Fatal(err)
	}
	results := map[string]chan string{"a": make(chan string, 10), "b": make(chan string, 10)}
	signals := map[string]chan string{"a": make(chan string, 100), "b": make(chan string, 100)} // for each page
	mux := http.NewServeMux()
	mux.HandleFunc("GET /page/{name}", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `<!DOCTYPE html><title>page</title><script>
const me = %q, first = me == "a";
const pc = new RTCPeerConnection({iceServers: %s, iceTransportPolicy: "relay"});
const post = (path, text) => fetch(path, {method: "POST", body: text});
const tell = (text) => post("/result/" + me, text);
const signal = (message) => post("/signal/" + (first ? "b" : "a"), JSON.stringify(message));
const sent = "x".repeat(1000);
let kinds = new Set(), count = 0;
pc.onicecandidate = (event) => {
	if (event.candidate && event.candidate.candidate) {
		kinds.add(event.candidate.type);
		signal({candidate: event.candidate.toJSON()});
	}
};
function done() {
	const pair = pc.sctp.transport.iceTransport.getSelectedCandidatePair();
	tell(count + " messages over " + pair.local.type + ", candidates " + [...kinds].join());
}
function use(channel) {
	channel.onopen = () => { if (first) for (let i = 0; i < 100; i++) channel.send(i + sent); };
	channel.onmessage = (event) => {
		if (event.data != count + sent) return tell("got something else");
		if (!first) channel.send(event.data);
		if (++count == 100) done();
	};
}
async function describe() {
	await pc.setLocalDescription();
	signal({description: pc.localDescription.toJSON()});
}
async function run() {
	if (first) {
		use(pc.createDataChannel("data"));
		await describe();
	}
	for (let waiting = [];;) {
		const message = await (await fetch("/signal/" + me)).json();
		if (message.description) {
			await pc.setRemoteDescription(message.description);
			if (!first) await describe();
		} else {
			waiting.push(message.candidate);
		}
		if (pc.remoteDescription) for (const c of waiting.splice(0)) await pc.addIceCandidate(c);
	}
}
pc.ondatachannel = (event) => use(event.channel);
pc.onicecandidateerror = (event) => console.log("candidate", event.errorCode, event.errorText, event.url);
run().catch((error) => tell("failed: " + error));
</script>`, r.PathValue("name"), servers)
	})
	mux.HandleFunc("POST /signal/{name}", func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		signals[r.PathValue("name")] <- string(body)
	})
	mux.HandleFunc("GET /signal/{name}", func(w http.ResponseWriter, r *http.Request) {
		select {
		case message := <-signals[r.PathValue("name")]:
			_, _ = io.WriteString(w, message)
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("POST /result/{name}", func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		results[r.PathValue("name")] <- string(body)
	})
	site := httptest.NewServer(mux)
	t.Cleanup(site.Close) // when the browsers, which wait for signals, are gone
	for name := range results {
		startChromium(t, site.URL+"/page/"+name, "--no-proxy-server", "--allow-loopback-in-peer-connection", "--enable-logging=stderr")
	}
	for name, result := range results {
		if got, want := within(t, "page "+name+" tells how it went", result), "100 messages over relay, candidates relay"; got != want {
			t.Errorf("page %s: %s; want %s", name, got, want)
		}
	}
}

// startHTTP3 serves size random bytes, and returns where and their checksum.
func startHTTP3(t *testing.T, size int) (addr *net.UDPAddr, sum string) {
	t.Helper()
	dir := t.TempDir()
	certificate(t, dir)
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "certificate"), filepath.Join(dir, "key"))
	if err != nil {
		t.Fatal(err)
	}
	content := make([]byte, size)
	_, _ = rand.Read(content)
	hash := sha256.Sum256(content)
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	server := &http3.Server{
		TLSConfig: http3.ConfigureTLSConfig(&tls.Config{Certificates: []tls.Certificate{pair}}),
		Handler:   http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(content) }),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(conn) }()
	t.Cleanup(func() {
		_, _ = server.Close(), conn.Close()
		<-served
	})
	return conn.LocalAddr().(*net.UDPAddr), hex.EncodeToString(hash[:])
}

// openBuiltin opens a builtin transport in a child, through the host's library.
func openBuiltin(t *testing.T, name, config string) *ptipc.Transport {
	t.Helper()
	return openBuiltinWith(t, name, config, func(*host.Command) {})
}

func openBuiltinWith(t *testing.T, name, config string, change func(*host.Command)) *ptipc.Transport {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	command := &host.Command{
		Name: name, Path: self, Args: []string{"transport", name},
		Environ: append(os.Environ(), asTool+"=1", "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE")),
	}
	change(command)
	transport, err := command.Open(t.Context(), ptipc.Opaque(config), ptipc.Env{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := transport.Close(); err != nil {
			t.Error(err)
		}
	})
	return transport
}

// download fetches by HTTP/3 over a packet connection and returns the checksum.
func download(t *testing.T, conn net.PacketConn, to *net.UDPAddr) string {
	t.Helper()
	carrier := &quic.Transport{Conn: conn}
	defer carrier.Close()
	client := &http3.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // its certificate was made a moment ago
		// With nothing to say a client would not show a new address to its server.
		QUICConfig: &quic.Config{MaxIdleTimeout: time.Minute, KeepAlivePeriod: 200 * time.Millisecond},
		Dial: func(ctx context.Context, _ string, tlsConfig *tls.Config, config *quic.Config) (*quic.Conn, error) {
			return carrier.DialEarly(ctx, to, tlsConfig, config)
		},
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://127.0.0.1/", nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := client.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	hash := sha256.New()
	n, err := io.Copy(hash, response.Body)
	if err != nil {
		t.Fatalf("after %d bytes: %v", n, err)
	}
	return hex.EncodeToString(hash.Sum(nil))
}

func packetsOf(t *testing.T, transport *ptipc.Transport, name string) net.PacketConn {
	t.Helper()
	conn, err := transport.Packets[name](t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// HTTP/3 through a child: what is fetched is what is served.
func TestHTTP3ThroughChild(t *testing.T) {
	size := bulk
	if testing.Short() {
		size = 10 << 20
	}
	to, sum := startHTTP3(t, size)
	conn := packetsOf(t, openBuiltin(t, "direct", `{}`), "direct")
	defer conn.Close()
	if got := download(t, conn, to); got != sum {
		t.Errorf("the checksum is %s, want %s", got, sum)
	}
}

// The child is killed in the middle of a download, and the connection goes on through
// the next one: to the server the client has another address.
func TestHTTP3SurvivesItsChild(t *testing.T) {
	to, sum := startHTTP3(t, 20<<20)
	pids := make(chan int, 10)
	transport := openBuiltinWith(t, "direct", `{}`, func(c *host.Command) {
		c.Restart.Min = 10 * time.Millisecond
		c.Events = func(e host.Event) {
			if e.Kind == host.Ready {
				pids <- e.Pid
			}
		}
	})
	conn := packetsOf(t, transport, "direct")
	defer conn.Close()
	half := &halfway{PacketConn: conn, at: 5 << 20, then: func() { kill(t, <-pids) }}
	if got := download(t, half, to); got != sum {
		t.Errorf("the checksum is %s, want %s", got, sum)
	}
	within(t, "the next child is ready", pids)
}

// halfway does something once a number of bytes have come.
type halfway struct {
	net.PacketConn
	at   int
	then func()
}

func (h *halfway) ReadFrom(p []byte) (int, net.Addr, error) {
	n, addr, err := h.PacketConn.ReadFrom(p)
	if h.at -= n; h.at <= 0 && h.then != nil {
		h.then()
		h.then = nil
	}
	return n, addr, err
}

// HTTP/3 through two children between which datagrams look like nothing.
func TestHTTP3ThroughScramble(t *testing.T) {
	to, sum := startHTTP3(t, 10<<20)
	const key = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
	listen := freePort(t)
	startTool(t, writeConfig(t, map[string]any{"transports": map[string]any{
		"far": map[string]any{"exec": "builtin:scramble", "role": "server", "config": map[string]any{"key": key, "listen": listen, "to": to.String()}},
	}}))
	far, err := net.ResolveUDPAddr("udp", listen)
	if err != nil {
		t.Fatal(err)
	}
	conn := packetsOf(t, openBuiltin(t, "scramble", fmt.Sprintf(`{"key":%q}`, key)), "scramble")
	defer conn.Close()
	if got := download(t, conn, far); got != sum {
		t.Errorf("the checksum is %s, want %s", got, sum)
	}
}

// lossVar makes the test binary, in a network namespace of its own, lose datagrams.
const lossVar = "PTIPC_TEST_LOSS"

// HTTP/3 through a child when every fifth datagram of the wire is lost.
func TestHTTP3WithLoss(t *testing.T) {
	if os.Getenv(lossVar) == "" {
		unshare, nft := testpeer.Need(t, "unshare"), testpeer.Need(t, "nft")
		ip := testpeer.Need(t, "ip")
		if os.Getuid() != 0 {
			testpeer.Skip(t, "a network namespace needs root")
		}
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), unshare, "--net", self, "-test.run", "^"+t.Name()+"$", "-test.timeout", "100s", "-test.v")
		cmd.Env = append(os.Environ(), lossVar+"="+nft+":"+ip)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	nft, ip, _ := strings.Cut(os.Getenv(lossVar), ":")
	run(t, exec.CommandContext(t.Context(), ip, "link", "set", "lo", "up"))
	to, sum := startHTTP3(t, 1<<20)
	rules := exec.CommandContext(t.Context(), nft, "-f", "-")
	// What is dropped on its way out fails in the program that sends it; a network does not tell.
	rules.Stdin = strings.NewReader(fmt.Sprintf(`table inet loss {
	chain in {
		type filter hook input priority 0;
		udp dport %[1]d numgen random mod 100 < 20 counter drop
		udp sport %[1]d numgen random mod 100 < 20 counter drop
	}
}
`, to.Port))
	run(t, rules)
	conn := packetsOf(t, openBuiltin(t, "direct", `{}`), "direct")
	defer conn.Close()
	if got := download(t, conn, to); got != sum {
		t.Errorf("the checksum is %s, want %s", got, sum)
	}
	if lost := run(t, exec.CommandContext(t.Context(), nft, "list", "table", "inet", "loss")); strings.Contains(lost, "packets 0 ") {
		t.Errorf("nothing was lost:\n%s", lost)
	}
}
