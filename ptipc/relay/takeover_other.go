//go:build !linux

package relay

import "net"

// taker is for Linux alone: elsewhere ends are not marked (SOCKS-20).
type taker struct{ *Conn }

func newTaker(net.Conn) *taker { return nil }

func (t *taker) socket() net.Conn { return t.raw }

func (*taker) finish() {}

func (*taker) release() {}
