package host

// guarded does one thing of a start or an end: a step, the undo of one, a rung of
// the shutdown ladder. In a program that is built with the tag failpoints, tests
// let it fail before or after its work, or kill the process there; what is shipped
// has no such thing in it.
func guarded(what string, do func() error) error {
	if err := failpoint("before", what); err != nil {
		return err
	}
	if err := do(); err != nil {
		return err
	}
	return failpoint("after", what)
}
