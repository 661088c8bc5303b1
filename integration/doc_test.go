// Package integration holds the tests that run the built clawvm as a user does,
// on real guests.
//
// The table in life_test.go works on the machine that it is on, inside network
// and mount namespaces of its own. Here that means QEMU's emulation. The tests
// in host_test.go carry the same test program into an emulated Debian server
// with KVM, and run the same table there under QEMU and cloud-hypervisor.
package integration
