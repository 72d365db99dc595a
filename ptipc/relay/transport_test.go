package relay

import (
	"context"
	"errors"
	"net"
	"syscall"
	"testing"

	"pthost/ptipc"
)

// A transport of a meter counts what it dials, classifies what fails, and lets
// nothing out once it is closed: also not a dial that was on its way.
func TestMeterTransport(t *testing.T) {
	var meter Meter
	dialling, goOn := make(chan struct{}, 1), make(chan struct{})
	pipe := func() net.Conn {
		a, b := net.Pipe()
		t.Cleanup(func() { b.Close() })
		return a
	}
	ends := 0
	transport := meter.Transport(map[string]ptipc.ConnectionFactory{
		"good": meter.Factory(false, func(context.Context, ptipc.Opaque, string) (net.Conn, error) { return pipe(), nil }),
		"bad": meter.Factory(true, func(context.Context, ptipc.Opaque, string) (net.Conn, error) {
			return nil, syscall.ECONNREFUSED
		}),
		"slow": meter.Factory(false, func(context.Context, ptipc.Opaque, string) (net.Conn, error) {
			dialling <- struct{}{}
			<-goOn
			return pipe(), nil
		}),
	}, func() error { ends++; return nil })

	conn, err := transport.Connections["good"].Dial(t.Context(), nil, "a:1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := transport.Connections["bad"].Dial(t.Context(), nil, ""); !errors.Is(err, ptipc.ErrRefused) {
		t.Errorf("a refusal: %v", err)
	}
	if s, err := transport.Stats(t.Context()); err != nil || s.Active != 1 || s.Opened != 1 || s.Failed != 1 {
		t.Errorf("%+v %v", s, err)
	}
	late := make(chan error, 1)
	go func() {
		_, err := transport.Connections["slow"].Dial(context.WithoutCancel(t.Context()), nil, "a:1")
		late <- err
	}()
	<-dialling
	for range 2 {
		if err := transport.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := transport.Wait(); err != nil || ends != 1 {
		t.Errorf("%v, ended %d times", err, ends)
	}
	if _, err := conn.Write([]byte("x")); err == nil {
		t.Error("an open connection lives on")
	}
	close(goOn)
	if err := <-late; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a dial that was on its way: %v", err)
	}
	if _, err := transport.Connections["good"].Dial(t.Context(), nil, "a:1"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a dial after Close: %v", err)
	}
	if s := meter.Stats(); s.Active != 0 {
		t.Errorf("%+v", s)
	}
}
