package host

import (
	"context"
	"fmt"
	"net"
)

// Enter returns what connects to the guest of the VM name, through its gate: what
// agent.Exec dials. to is what it is for, as in "cannot TO VM web", and start the
// command that brings the VM up. The error of a VM that is down has the exit
// code code; a VM that isn't declared is a NotDeclaredError.
func (l Layout) Enter(name, to, start string, code int) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", l.VM(name).GateSocket())
		if err != nil {
			if _, lerr := Look(ctx, l, name); lerr != nil {
				return nil, lerr
			}
			return nil, &CodedError{code, fmt.Errorf("cannot %s VM %s: it is not up; `%s up %s` brings it up", to, name, start, name)}
		}
		return conn, nil
	}
}
