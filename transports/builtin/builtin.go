// Package builtin is the registry of the transports that the tool carries.
//
//	open, ok := builtin.Clients["direct"]
package builtin

import (
	"pthost/ptipc"
	"pthost/transports/direct"
	"pthost/transports/scramble"
	"pthost/transports/websocket"
)

// Clients holds the client sides by name.
var Clients = map[string]ptipc.TransportFactory{
	"direct":    direct.Open,
	"scramble":  scramble.Open,
	"websocket": websocket.Open,
}

// Servers holds the server sides by name.
var Servers = map[string]*ptipc.ServerFactory{
	"scramble":  scramble.Server,
	"websocket": websocket.Server,
}
