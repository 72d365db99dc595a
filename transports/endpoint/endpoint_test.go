package endpoint

import (
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"testing"

	"pthost/ptipc"
)

func TestAddress(t *testing.T) {
	for _, test := range []struct {
		address, ip string
		port        uint16
	}{
		{"192.0.2.1:443", "192.0.2.1", 443},
		{"[2001:db8::1]:8443", "2001:db8::1", 8443},
		{"0.0.0.0:1", "invalid IP", 1},
		{"[::]:65535", "invalid IP", 65535},
		{":0", "invalid IP", 0},
	} {
		a := Address(test.address)
		if err := a.Validate(); err != nil || a.IP().String() != test.ip || a.Port() != test.port {
			t.Errorf("%s: %v, %s, %d", a, err, a.IP(), a.Port())
		}
	}
	for _, bad := range []string{"", "192.0.2.1", "localhost:1", "192.0.2.1:http", "192.0.2.1:65536", "192.0.2.1:-1", "::1:1", "[::1]"} {
		if err := Address(bad).Validate(); err == nil {
			t.Errorf("%q was taken", bad)
		}
		if _, err := Address(bad).Open(t.Context()); err == nil {
			t.Errorf("%q was opened", bad)
		}
	}
}

func TestOpenAndSettle(t *testing.T) {
	settled, err := Address("127.0.0.1:0").Settle(t.Context())
	if err != nil || settled.Port() == 0 || settled.IP().String() != "127.0.0.1" {
		t.Fatalf("settled on %s, %v", settled, err)
	}
	if again, err := settled.Settle(t.Context()); again != settled || err != nil {
		t.Errorf("settled again on %s, %v", again, err)
	}
	l, err := settled.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if l.Addr().String() != string(settled) {
		t.Errorf("listens on %s, not %s", l.Addr(), settled)
	}
	if _, err := settled.Open(t.Context()); err == nil || !strings.Contains(err.Error(), string(settled)) {
		t.Errorf("a port that is in use: %v", err)
	}
}

// handshake connects the two, and returns the client's error.
func handshake(t *testing.T, server, client *tls.Config) error {
	t.Helper()
	l, err := Address("127.0.0.1:0").Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	defer func() { <-done }()
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		_ = tls.Server(c, server).HandshakeContext(t.Context()) // the client's error says more
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return tls.Client(c, client).HandshakeContext(t.Context())
}

func TestSelfSigned(t *testing.T) {
	server, client, err := SelfSigned("name.invalid")
	if err != nil {
		t.Fatal(err)
	}
	_, stranger, err := SelfSigned("name.invalid")
	if err != nil {
		t.Fatal(err)
	}
	own, err := server.TLS("http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		client Client
		host   string
		want   string
	}{
		{"its pin", client, "192.0.2.1", ""},
		{"another pin", stranger, "name.invalid", "not the pinned"},
		{"the system", Client{}, "name.invalid", "unknown authority"},
		{"itself as the authority", Client{CA: server.Certificate}, "name.invalid", ""},
		{"another host", Client{CA: server.Certificate}, "other.invalid", "not other.invalid"},
		{"the server name", Client{CA: server.Certificate, ServerName: "name.invalid"}, "192.0.2.1", ""},
	} {
		config, err := test.client.TLS(test.host, "http/1.1")
		if err != nil {
			t.Fatal(err)
		}
		err = handshake(t, own, config)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}

func TestBadTLS(t *testing.T) {
	good, _, err := SelfSigned("name.invalid")
	if err != nil {
		t.Fatal(err)
	}
	_, certErr := Server{Certificate: "/nonexistent", Key: good.Key}.TLS()
	_, keyErr := Server{Certificate: good.Certificate, Key: "/nonexistent"}.TLS()
	_, pairErr := Server{Certificate: good.Certificate, Key: good.Certificate}.TLS()
	_, pinErr := Client{Pin: "sha256:"}.TLS("h")
	_, caErr := Client{CA: "-----BEGIN "}.TLS("h")
	_, bothErr := Client{CA: good.Certificate, Pin: "sha256:"}.TLS("h")
	for pointer, errs := range map[string][]error{
		"/certificate": {certErr, pairErr}, "/key": {keyErr}, "/pin": {pinErr}, "/ca": {caErr, bothErr},
	} {
		for _, err := range errs {
			var config *ptipc.ConfigError
			if !errors.As(err, &config) || config.Pointer != pointer || config.Remedy == "" {
				t.Errorf("%v, want an error at %s with a remedy", err, pointer)
			}
		}
	}
}
