package endpoint

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"strings"
	"time"

	"pthost/ptipc"
)

// A Server is what a TLS server shows to its clients. Each value is PEM text, or
// the name of a file with it.
type Server struct {
	Certificate string `json:"certificate"` // with its chain
	Key         string `json:"key"`
}

// TLS makes the configuration of a TLS 1.3 server that offers the protocols
// (ALPN). Errors are [*ptipc.ConfigError] and never repeat a key.
func (s Server) TLS(protocols ...string) (*tls.Config, error) {
	certificate, err := text(s.Certificate)
	if err != nil {
		return nil, &ptipc.ConfigError{Pointer: "/certificate", Problem: "cannot be read: " + err.Error(), Remedy: "give PEM text or the name of a file with it"}
	}
	key, err := text(s.Key)
	if err != nil {
		return nil, &ptipc.ConfigError{Pointer: "/key", Value: "***", Problem: "cannot be read", Remedy: "give PEM text or the name of a file with it"}
	}
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, &ptipc.ConfigError{Pointer: "/certificate", Problem: "does not make a pair with the key: " + err.Error(), Remedy: "give the certificate in PEM, the server's own first, and its key"}
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, NextProtos: protocols}, nil
}

// A Client is how a TLS client knows its server: by its key, by an authority of
// its own, or, when both are empty, by the system's.
type Client struct {
	// Pin is "sha256:" and the SHA-256 of the server's public key (its
	// SubjectPublicKeyInfo) in base64, as openssl and curl print it, with or without
	// the = at its end. The key is all that counts then: names and dates in the
	// certificate do not.
	Pin string `json:"pin,omitempty"`

	// CA is PEM text, or the name of a file with it.
	CA string `json:"ca,omitempty"`

	// ServerName is the name that the client asks for and that the certificate must
	// be for, where that is not the host that it dials.
	ServerName string `json:"server_name,omitempty"`
}

const pinPrefix = "sha256:"

// pinEncoding writes no padding, so that a pin can stand where = has a meaning.
var pinEncoding = base64.RawStdEncoding

// TLS makes the configuration of a TLS 1.3 client for host, a name or an address
// without a port, that offers the protocols (ALPN). Errors are
// [*ptipc.ConfigError].
func (c Client) TLS(host string, protocols ...string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: host, NextProtos: protocols}
	if c.ServerName != "" {
		config.ServerName = c.ServerName
	}
	switch {
	case c.Pin != "" && c.CA != "":
		return nil, &ptipc.ConfigError{Pointer: "/ca", Problem: "stands beside a pin, which leaves nothing for it to decide", Remedy: "remove one of them"}
	case c.Pin != "":
		pin, err := pinEncoding.DecodeString(strings.TrimSuffix(strings.TrimPrefix(c.Pin, pinPrefix), "="))
		if err != nil || len(pin) != sha256.Size || !strings.HasPrefix(c.Pin, pinPrefix) {
			return nil, &ptipc.ConfigError{Pointer: "/pin", Value: fmt.Sprintf("%.64q", c.Pin), Problem: "is not a pin", Remedy: "write sha256: and 32 bytes in base64"}
		}
		config.InsecureSkipVerify = true // VerifyConnection takes its place
		config.VerifyConnection = func(state tls.ConnectionState) error {
			got := sha256.Sum256(state.PeerCertificates[0].RawSubjectPublicKeyInfo)
			if subtle.ConstantTimeCompare(got[:], pin) != 1 {
				return fmt.Errorf("endpoint: the server's key is %s, not the pinned %s: this is another server, or it has a new key", pinOf(got), c.Pin)
			}
			return nil
		}
	case c.CA != "":
		authority, err := text(c.CA)
		if err != nil {
			return nil, &ptipc.ConfigError{Pointer: "/ca", Problem: "cannot be read: " + err.Error(), Remedy: "give PEM text or the name of a file with it"}
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(authority) {
			return nil, &ptipc.ConfigError{Pointer: "/ca", Problem: "holds no certificate", Remedy: "give certificates in PEM"}
		}
	}
	return config, nil
}

func pinOf(sum [sha256.Size]byte) string {
	return pinPrefix + pinEncoding.EncodeToString(sum[:])
}

// text returns PEM text that stands in a configuration, or in a file that it names.
func text(value string) ([]byte, error) {
	if strings.Contains(value, "-----BEGIN ") {
		return []byte(value), nil
	}
	return os.ReadFile(value)
}

// SelfSigned makes a key (ECDSA on P-256), a certificate for host, a name or an
// address or "" for none, that it signs itself and that is good for 20 years, and
// the pin with which a [Client] knows it.
func SelfSigned(host string) (Server, Client, error) {
	fail := func(err error) (Server, Client, error) {
		return Server{}, Client{}, fmt.Errorf("endpoint: cannot make a certificate for %s: %w", host, err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fail(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return fail(err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: host},
		NotBefore:             now.AddDate(0, 0, -1), // clocks differ
		NotAfter:              now.AddDate(20, 0, 0),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else if host != "" {
		template.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fail(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return fail(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fail(err)
	}
	server := Server{
		Certificate: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		Key:         string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})),
	}
	return server, Client{Pin: pinOf(sha256.Sum256(certificate.RawSubjectPublicKeyInfo))}, nil
}
