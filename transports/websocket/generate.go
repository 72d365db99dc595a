package websocket

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"net"
	"net/url"
	"strconv"

	"pthost/ptipc"
	"pthost/transports/endpoint"
)

type options struct {
	Listen  endpoint.Address `json:"listen,omitempty"`
	Host    *hostName        `json:"host,omitempty"`
	Backend backendURL       `json:"backend,omitempty"`
}

// Validate implements [ptipc.Validator].
func (o *options) Validate() error {
	if o.Host == nil && !o.Listen.IP().IsValid() {
		return &ptipc.ConfigError{Pointer: "/host", Problem: "is missing", Remedy: `give the name or address by which clients reach the server, or "" if each connection says it in its settings`}
	}
	return nil
}

// generate makes a key, a self-signed certificate with its pin, and a path that
// nobody can guess.
func generate(ctx context.Context, opaque ptipc.Opaque, _ ptipc.Env) (client, server ptipc.Opaque, err error) {
	o := options{Listen: ":443"}
	if err := opaque.Decode(&o); err != nil {
		return nil, nil, err
	}
	host := o.Listen.IP().String()
	if o.Host != nil {
		host = string(*o.Host)
	}
	listen, err := o.Listen.Settle(ctx)
	if err != nil {
		return nil, nil, ptipc.Classify(err)
	}
	own, known, err := endpoint.SelfSigned(host)
	if err != nil {
		return nil, nil, err
	}
	secret := make([]byte, 16)
	_, _ = rand.Read(secret) // never fails
	path := "/" + base64.RawURLEncoding.EncodeToString(secret)
	to := url.URL{Scheme: "wss", Path: path}
	if host != "" {
		to.Host = net.JoinHostPort(host, strconv.Itoa(int(listen.Port())))
	}
	client, err = json.Marshal(map[string]string{"url": to.String(), "pin": known.Pin})
	if err != nil {
		return nil, nil, err
	}
	config := map[string]string{"listen": string(listen), "path": path, "certificate": own.Certificate, "key": own.Key}
	if o.Backend.url != nil {
		config["backend"] = o.Backend.url.String()
	}
	server, err = json.Marshal(config)
	return client, server, err
}
