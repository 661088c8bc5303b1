// Package recipe builds images for the store from a short file: Debian
// packages, npm packages with their lock file, files, users, commands that run
// once, and what is removed at the end.
//
// # Who runs what
//
// Nothing that was downloaded runs as the host's root, and nothing but the two
// package managers can reach the network:
//
//   - Each step is a process of its own in a new user, mount, PID, IPC and UTS
//     namespace. Its root is an ordinary user of the host: the 65536 ids from
//     Options.UIDBase on are its 0 to 65535. `mmdebstrap --mode=unshare` started by
//     root does not make such a namespace (it takes root as reason enough
//     not to), which is why this package does.
//   - mmdebstrap and tar are the host's own programs; they see the host's files
//     read-only, with their own /tmp and /run.
//   - npm comes from Debian, in a second root that is thrown away afterwards,
//     so that a server doesn't have to install its 300 packages and the image
//     doesn't carry them. It gets the names and hashes from the lock file and
//     runs no script of any package.
//   - The recipe's commands see the image alone, as their whole file system,
//     and have no network but the loopback interface.
//
// The caller's program re-executes itself for each step, so its main function
// must call RunChild first; a test binary does so in TestMain.
//
// # Where from
//
// No registry is named here. Debian packages come from the mirror that the host's own
// apt uses where the host is a Debian machine, else from mmdebstrap's default;
// npm packages come from npm's default or the registry in the caller's .npmrc.
//
// # What is left behind
//
// A build works in a directory of its own below the store's tmp, locked while
// it lives. It is removed at the end, whatever the end was; what a killed
// build left is removed by the next one.
package recipe
