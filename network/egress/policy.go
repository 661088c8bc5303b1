package egress

// A Policy decides which names a guest may look up. Its methods are called from many goroutines at once.
type Policy interface {
	// Query decides about a question. name is in lower case and ends with a dot. A refusal's reason completes the
	// sentence "VM x may not look up this name: …"; it is logged, and sent to the guest as an extended DNS error.
	Query(name string, qtype uint16) (allowed bool, reason string)
}

// Open allows every name.
type Open struct{}

// Query allows.
func (Open) Query(string, uint16) (bool, string) { return true, "" }

// None refuses every name.
type None struct{}

// Query refuses.
func (None) Query(string, uint16) (bool, string) { return false, "egress mode is none" }
