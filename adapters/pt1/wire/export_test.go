package wire

// The vectors hold proofs for known nonces.
var (
	ServerHash = serverHash
	ClientHash = clientHash
)
