// Package egress is the gate's part of a VM's network: the resolver that answers the guest, the log of its connections,
// and the file that both are written to. Serve and Watch run unprivileged, on sockets that a privileged process opened
// (OpenFlows, OpenConntrack) and handed over; what they parse is written by the guest, or by whom the guest talks to.
package egress

import "time"

// The kinds of events.
const (
	KindQuery   = "query"   // a name was looked up, or would have been
	KindOpen    = "open"    // a connection was begun, or refused
	KindClose   = "close"   // a connection ended
	KindLost    = "lost"    // connections that the kernel could not report; Count of them, where it is known
	KindDropped = "dropped" // events that the log itself could not write; Count of them
	KindRemoved = "removed" // events that were written and are no longer kept; Count of all so far
)

// The verdicts of queries and of opened connections.
const (
	Allowed = "allowed"
	Refused = "refused"
)

// An Event is one line of a VM's network log. Which fields are set depends on its kind; the JSON names are a format that
// other programs read. Name, Type and Answers come from the guest or from strangers' name servers.
type Event struct {
	Time        time.Time `json:"time"` // when it was answered or reported, UTC
	VM          string    `json:"vm"`
	Kind        string    `json:"kind"`
	Name        string    `json:"name,omitempty"`  // the name asked for; of a connection: the name that its address was the answer to
	Type        string    `json:"type,omitempty"`  // of a query: A, MX …; of ICMP: "8/0" (type/code)
	Proto       string    `json:"proto,omitempty"` // udp, tcp, icmp …, or a protocol's number; of a query: how it came
	Source      string    `json:"source,omitempty"`
	Destination string    `json:"destination,omitempty"` // address:port, or an address alone where there are no ports
	Verdict     string    `json:"verdict,omitempty"`
	Reason      string    `json:"reason,omitempty"` // why it was refused, failed or lost
	Rule        string    `json:"rule,omitempty"`   // of egress.allow, that allowed it
	RCode       string    `json:"rcode,omitempty"`
	Answers     []string  `json:"answers,omitempty"`
	Upstream    string    `json:"upstream,omitempty"` // the name server that answered
	Cached      bool      `json:"cached,omitempty"`
	Millis      float64   `json:"ms,omitempty"`      // from the query's arrival to its answer
	Seconds     float64   `json:"seconds,omitempty"` // how long the kernel knew the connection: its last packet plus a time-out
	BytesOut    uint64    `json:"bytesOut,omitempty"`
	BytesIn     uint64    `json:"bytesIn,omitempty"`
	Count       uint64    `json:"count,omitempty"`
}
