// Package host brings a VM up and takes it down.
//
// [Supervise] is the supervisor: the one privileged process of a VM. It runs
// the list of steps in up.go, each of which pushes its undo on one stack, waits
// until the VM ends, and unwinds the stack. It never parses what a guest sends:
// that is the gate's work (package gate), an unprivileged child to which the
// supervisor hands sockets that are already open.
//
// There is no daemon. What runs is derived from the host: a VM is up when a
// process holds the lock in its run directory and answers on its control
// socket; what exists is found by its owner mark (network links and rules), by
// the mark in a process's environment, or by its place in the [Layout].
package host
