package turn

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"pthost/ptipc/testpeer"
)

// TURN-5 to TURN-8: coturn's client finds everything it looks for.
func TestCoturnClient(t *testing.T) {
	program := testpeer.Need(t, "turnutils_uclient")
	s := &Server{Credentials: roleCredentials}
	addr := startServer(t, s)
	peer := listenUDP(t, "127.0.0.1")
	done := make(chan struct{})
	go func() { defer close(done); echo(newSocket(peer, false)) }()
	t.Cleanup(func() { _ = peer.Close(); <-done })
	const messages, clients = 20, 2
	for _, test := range []struct {
		name string
		args []string
		fail string
	}{
		{name: "channels"},
		{name: "padded channels", args: []string{"-D"}},
		{name: "indications", args: []string{"-s"}},
		{name: "large", args: []string{"-l", "1400"}},
		{name: "extra requests", args: []string{"-G"}},
		{name: "IPv4 asked for", args: []string{"-X"}},
		{name: "between two clients", args: []string{"-y"}},
		// coturn's own server ends it in the same way.
		{name: "wrong requests", args: []string{"-N"}, fail: "channel bind: error 400"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel() // most of the time it sleeps
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			args := append([]string{
				"-c", "-n", strconv.Itoa(messages), "-m", strconv.Itoa(clients), "-z", "2", "-u", roleCredentials.Username, "-w", roleCredentials.Password,
				"-e", "127.0.0.1", "-r", strconv.Itoa(peer.LocalAddr().(*net.UDPAddr).Port), "-p", strconv.Itoa(int(addr.Port())),
			}, test.args...)
			out, err := exec.CommandContext(ctx, program, append(args, "127.0.0.1")...).CombinedOutput()
			if test.fail != "" {
				if !bytes.Contains(out, []byte(test.fail)) {
					t.Errorf("%s", out)
				}
				return
			}
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			want := fmt.Sprintf("tot_send_msgs=%d, tot_recv_msgs=%d", messages*clients, messages*clients)
			if !bytes.Contains(out, []byte(want)) || !bytes.Contains(out, []byte("Total lost packets 0 (")) {
				t.Errorf("%s", out)
			}
		})
	}
}

// quicCertificate is a certificate for nobody else.
func quicCertificate(t testing.TB) (*tls.Config, *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"peer"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: pool, ServerName: "peer"}
}

// download gets so many bytes by HTTP/3 through a Conn, and compares checksums.
func download(t *testing.T, conn net.PacketConn, size int64) {
	t.Helper()
	serverTLS, clientTLS := quicCertificate(t)
	peer := listenUDP(t, "127.0.0.1")
	body := func() io.Reader { return io.LimitReader(mathrand.NewChaCha8([32]byte{7}), size) }
	sum := sha256.New()
	if _, err := io.Copy(sum, body()); err != nil {
		t.Fatal(err)
	}
	server := &http3.Server{
		TLSConfig: http3.ConfigureTLSConfig(serverTLS),
		Handler:   http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.Copy(w, body()) }),
	}
	served := make(chan struct{})
	go func() { defer close(served); _ = server.Serve(peer) }()
	t.Setenv("QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING", "true")
	transport := &quic.Transport{Conn: conn}
	client := &http3.Transport{
		TLSClientConfig: clientTLS,
		QUICConfig:      &quic.Config{MaxIdleTimeout: time.Minute, HandshakeIdleTimeout: 30 * time.Second},
		Dial: func(ctx context.Context, _ string, tlsConfig *tls.Config, config *quic.Config) (*quic.Conn, error) {
			return transport.DialEarly(ctx, peer.LocalAddr(), tlsConfig, config)
		},
	}
	defer func() {
		_ = client.Close()
		_ = transport.Close()
		_ = server.Close()
		_ = peer.Close()
		<-served
	}()
	began := time.Now()
	response, err := (&http.Client{Transport: client}).Get("https://peer/")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	got := sha256.New()
	n, err := io.Copy(got, response.Body)
	if err != nil || n != size || !bytes.Equal(got.Sum(nil), sum.Sum(nil)) {
		t.Errorf("%d of %d bytes, checksum %x: %v", n, size, got.Sum(nil), err)
	}
	t.Logf("%.0f MB/s", float64(n)/1e6/time.Since(began).Seconds())
}

// TURN-12: QUIC goes through a Conn, byte for byte.
func TestDownload(t *testing.T) {
	size := int64(100e6)
	if testing.Short() {
		size = 5e6
	}
	s := &Server{}
	conn := mustDial(t, startServer(t, s), s.Credentials)
	download(t, conn, size)
	if d := s.Stats().Dropped; d.Total() != d.Full+d.Unexpected {
		t.Errorf("%+v", d)
	}
}

// TURN-15: a fifth of all datagrams lost each way, others doubled and late: QUIC gets
// everything all the same.
func TestDownloadWithAccidents(t *testing.T) {
	fate := accidents(20, 5, 10, 2*time.Millisecond)
	s := &Server{}
	addr := startServer(t, s, &accidentConn{listenUDP(t, "127.0.0.1"), fate})
	open := func(ctx context.Context, server netip.AddrPort) (socket, *endpoint, error) {
		c, err := directPackets(ctx)
		if err != nil {
			return nil, nil, err
		}
		return newSocket(&accidentConn{c, fate}, false), newEndpoint(server), nil
	}
	conn, err := dial(t.Context(), addr, s.Credentials, open)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	download(t, conn, 1e6)
}

// An accidentConn loses, doubles and delays what is written to it.
type accidentConn struct {
	net.PacketConn
	fate func(from, to netip.AddrPort) []time.Duration
}

func (c *accidentConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	for _, wait := range c.fate(netip.AddrPort{}, netip.AddrPort{}) {
		if wait == 0 {
			if _, err := c.PacketConn.WriteTo(b, addr); err != nil {
				return 0, err
			}
			continue
		}
		late := bytes.Clone(b)
		time.AfterFunc(wait, func() { _, _ = c.PacketConn.WriteTo(late, addr) })
	}
	return len(b), nil
}
