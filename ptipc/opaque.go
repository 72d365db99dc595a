package ptipc

// Opaque is what the specification calls opaque: one JSON object whose keys
// only the transport knows. nil means {}.
type Opaque []byte

// MarshalJSON returns the object itself, {} for nil.
func (o Opaque) MarshalJSON() ([]byte, error) {
	if len(o) == 0 {
		return []byte("{}"), nil
	}
	return o, nil
}

// UnmarshalJSON keeps a copy of the bytes.
func (o *Opaque) UnmarshalJSON(b []byte) error {
	*o = append((*o)[:0], b...)
	return nil
}
