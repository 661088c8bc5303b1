// Command nameserver answers every question with nothing, for the emulated server, which has no network.
package main

import (
	"fmt"
	"os"

	"github.com/miekg/dns"
)

func main() {
	dns.HandleFunc(".", func(w dns.ResponseWriter, q *dns.Msg) {
		if err := w.WriteMsg(new(dns.Msg).SetReply(q)); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	})
	fmt.Fprintln(os.Stderr, dns.ListenAndServe(os.Args[1], "udp", nil))
	os.Exit(1)
}
