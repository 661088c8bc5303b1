// A program for a guest of the tests that asks its network for all that it can take:
//
//	flood dns SECONDS ADDRESS      queries for names that nobody asked for before
//	flood connect SECONDS ADDRESS  packets that each begin a connection
//
// It waits for no answer, and prints how much it sent.
package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"
)

// sockets is how many it sends from: each has a port of its own.
const sockets = 64

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: flood dns|connect SECONDS ADDRESS")
		os.Exit(2)
	}
	seconds, err := strconv.Atoi(os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	to, err := netip.ParseAddr(os.Args[3])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	var from [sockets]*net.UDPConn
	for i := range from {
		if from[i], err = net.ListenUDP("udp4", nil); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	sent := 0
	for i, end := 0, time.Now().Add(time.Duration(seconds)*time.Second); ; i++ {
		// The clock is looked at now and then: it costs more than a packet.
		if i%256 == 0 && time.Now().After(end) {
			break
		}
		packet, port := []byte("flood"), uint16(1024+rand.IntN(60_000))
		if os.Args[1] == "dns" {
			packet, port = query(i), 53
		}
		if _, err := from[i%sockets].WriteToUDPAddrPort(packet, netip.AddrPortFrom(to, port)); err == nil {
			sent++ // else a queue is full, or what was sent before was refused
		}
	}
	fmt.Println(sent)
}

// query asks for the A record of a name that is new.
func query(i int) []byte {
	q := binary.BigEndian.AppendUint16(nil, uint16(i))
	q = append(q, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	name := "flood-" + strconv.FormatUint(rand.Uint64(), 36)
	q = append(append(q, byte(len(name))), name...)
	return append(q, 4, 't', 'e', 's', 't', 0, 0, 1, 0, 1)
}
