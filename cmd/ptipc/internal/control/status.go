package control

import (
	"time"

	"pthost/ptipc"
)

// A Status is a running host at one moment.
type Status struct {
	Time       time.Time   `json:"time"`               // of this status
	PID        int         `json:"pid"`                // of the host
	Started    time.Time   `json:"started"`            // when the host was started
	Starting   bool        `json:"starting,omitempty"` // not everything has started yet
	Stopping   bool        `json:"stopping,omitempty"`
	Transports []Transport `json:"transports"` // by name
	Fronts     []Front     `json:"fronts"`     // in the order of the configuration
}

// A State is what a transport can be used for.
type State string

// The states of a transport.
const (
	Starting   State = "starting"   // its first child is not ready yet
	Ready      State = "ready"      // its child serves
	Restarting State = "restarting" // it has no child and will get one
	Ended      State = "ended"      // it has no child and will get none
)

// A Transport is the state of one transport.
type Transport struct {
	Name      string     `json:"name"`
	Exec      string     `json:"exec,omitempty"` // "" for a child that somebody else runs
	Role      string     `json:"role"`           // client or server
	State     State      `json:"state"`
	PID       int        `json:"pid,omitempty"`      // of the child; 0 is none, or not known
	Since     *time.Time `json:"since,omitempty"`    // when the child that serves began to
	Restarts  uint64     `json:"restarts"`           // children after the first
	Progress  string     `json:"progress,omitempty"` // what the child has last told of its bootstrap (LINE-10)
	LastError string     `json:"last_error,omitempty"`
	Address   string     `json:"address,omitempty"` // of a server's wire
	Signals   string     `json:"signals,omitempty"` // how its messages are carried: queue, dir or command
	Pending   int        `json:"pending,omitempty"` // outgoing messages that a queue keeps

	// Stats are the totals since the transport was opened (STAT-2), nil when they
	// could not be had.
	Stats *ptipc.TransportStats `json:"stats,omitempty"`
	// Rate is set by [Status.Since].
	Rate *Rate `json:"rate,omitempty"`
}

// A Rate is application data in bytes per second.
type Rate struct {
	Received float64 `json:"received"`
	Sent     float64 `json:"sent"`
}

// A Front is where ordinary programs connect.
type Front struct {
	Address   string  `json:"address"` // ADDR:PORT, or the path of a unix socket
	Serve     string  `json:"serve"`
	Transport string  `json:"transport"`
	Refused   *uint64 `json:"refused,omitempty"` // connections of other users, where it is counted
}

// Since is s with the rates between an earlier status of the same host and s. A
// transport that was not there then, or has no stats, gets none.
func (s Status) Since(earlier Status) Status {
	elapsed := s.Time.Sub(earlier.Time).Seconds()
	if elapsed <= 0 || !s.same(earlier) {
		return s
	}
	before := map[string]*ptipc.TransportStats{}
	for _, t := range earlier.Transports {
		before[t.Name] = t.Stats
	}
	transports := make([]Transport, len(s.Transports))
	for i, t := range s.Transports {
		if b := before[t.Name]; b != nil && t.Stats != nil && b.Received <= t.Stats.Received && b.Sent <= t.Stats.Sent {
			t.Rate = &Rate{
				Received: float64(t.Stats.Received-b.Received) / elapsed,
				Sent:     float64(t.Stats.Sent-b.Sent) / elapsed,
			}
		}
		transports[i] = t
	}
	s.Transports = transports
	return s
}

// same reports whether both are of one host, and not of one that took its place.
func (s Status) same(other Status) bool {
	return s.PID == other.PID && s.Started.Equal(other.Started)
}

// A Signal is an outgoing message that waits for somebody to carry it.
type Signal struct {
	Transport string        `json:"transport"`
	ID        uint64        `json:"id"` // counts from 1 in its transport
	Time      time.Time     `json:"time"`
	Message   ptipc.Message `json:"message"`
}
