package ptipc

import "time"

// Stats counts one connection (STAT-1). Received is what came from the wire to
// the application, Sent what went the other way, in bytes of application data.
type Stats struct {
	Opened   time.Time `json:"opened"`
	Received uint64    `json:"received"`
	Sent     uint64    `json:"sent"`
}

// TransportStats totals one transport since it was opened (STAT-2). Bytes of
// connections that are still open are included.
type TransportStats struct {
	Active   uint64 `json:"active"`   // connections open now
	Opened   uint64 `json:"opened"`   // connections ever opened, the open ones included
	Failed   uint64 `json:"failed"`   // dials that failed
	Received uint64 `json:"received"` // bytes from the wire to applications
	Sent     uint64 `json:"sent"`     // bytes from applications to the wire
}
