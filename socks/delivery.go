package socks

// Delivery is the settings under which a child hands a connection of its wire over
// to its host (SRV-3).
type Delivery struct {
	Transport string `json:"transport"` // the server, as it was announced
	Remote    string `json:"remote"`    // the client's address as the wire saw it
}
