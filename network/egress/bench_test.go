package egress

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// benchResolver starts a resolver that logs to a file, in front of a name server that answers every A at once.
func benchResolver(b *testing.B) string {
	b.Helper()
	l, err := OpenLog(filepath.Join(b.TempDir(), "net.log"), LogOptions{})
	if err != nil {
		b.Fatal(err)
	}
	r := serve(b, &Resolver{Upstreams: []netip.AddrPort{quickNameServer(b)}, Names: new(Names), Log: l.Write})
	b.Cleanup(func() {
		if n := l.Dropped(); n > 0 {
			b.Errorf("%d events were dropped", n)
		}
	})
	return r.addr
}

// quickNameServer costs as little as it can: it turns the query itself into the answer.
func quickNameServer(b *testing.B) netip.AddrPort {
	b.Helper()
	needLoopback(b)
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	udp := c.(*net.UDPConn)
	b.Cleanup(func() { udp.Close() })
	rdata := []byte{0xc0, 12, 0, 1, 0, 1, 0, 0, 14, 16, 0, 4, 192, 0, 2, 1}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			end, err := skipName(buf[:n], headerSize)
			if err != nil {
				continue
			}
			buf[2], buf[3], buf[7], buf[11] = 0x81, 0x80, 1, 0
			if _, err := udp.WriteToUDPAddrPort(append(buf[:end+4], rdata...), from); err != nil {
				return
			}
		}
	}()
	return udp.LocalAddr().(*net.UDPAddr).AddrPort()
}

func benchQueries(b *testing.B, name func(i int64) string) {
	addr := benchResolver(b)
	var i atomic.Int64
	b.SetParallelism(16)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		c, err := net.Dial("udp", addr)
		if err != nil {
			b.Error(err)
			return
		}
		defer c.Close()
		buf := make([]byte, 4096)
		for pb.Next() {
			wire, err := new(dns.Msg).SetQuestion(name(i.Add(1)), dns.TypeA).Pack()
			if err == nil {
				err = c.SetDeadline(time.Now().Add(patience))
			}
			if err == nil {
				_, err = c.Write(wire)
			}
			if err == nil {
				_, err = c.Read(buf)
			}
			if err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "queries/s")
}

func BenchmarkResolverCached(b *testing.B) {
	benchQueries(b, func(i int64) string { return "n" + strconv.FormatInt(i%100, 10) + ".test." })
}

func BenchmarkResolverUncached(b *testing.B) {
	benchQueries(b, func(i int64) string { return "n" + strconv.FormatInt(i, 10) + ".test." })
}

// BenchmarkHandleCached is the resolver's own work for a cached answer, without sockets.
func BenchmarkHandleCached(b *testing.B) {
	l, err := OpenLog(filepath.Join(b.TempDir(), "net.log"), LogOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	s := newServer(&Resolver{VM: "claw", Names: new(Names), Log: l.Write}, time.Now)
	q := question{name: "api.telegram.org.", qtype: dns.TypeA}
	s.cache.put(q, answerOf(b, q, &dns.Msg{Answer: []dns.RR{record(b, "api.telegram.org. 3600 A 192.0.2.1")}}), time.Now())
	m := new(dns.Msg).SetQuestion(q.name, dns.TypeA)
	b.ReportAllocs()
	for b.Loop() {
		s.end(s.begin(m, netip.Addr{}, true, time.Now()), func([]byte) error { return nil })
	}
}

func BenchmarkLogWrite(b *testing.B) {
	l, err := OpenLog(filepath.Join(b.TempDir(), "net.log"), LogOptions{})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	b.ReportAllocs()
	for b.Loop() {
		l.Write(printed[0])
	}
}

// serveForComparison is the resolver as a process of its own, as in a gate, for the comparison: it serves at an address until its
// input ends.
func serveForComparison(addr, upstream, log string) error {
	l, err := OpenLog(log, LogOptions{})
	if err != nil {
		return err
	}
	udp, err := net.ListenPacket("udp4", addr)
	if err != nil {
		return err
	}
	tcp, err := net.Listen("tcp4", addr)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		// Its end is the sign to stop, whatever it is.
		if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
			cancel()
		}
	}()
	up, err := netip.ParseAddrPort(upstream)
	if err != nil {
		return err
	}
	r := &Resolver{VM: "claw", Upstreams: []netip.AddrPort{up}, Names: new(Names), Log: l.Write}
	err = r.Serve(ctx, udp, tcp)
	if n := l.Dropped(); n > 0 {
		err = errors.Join(err, fmt.Errorf("%d events dropped", n))
	}
	return errors.Join(err, l.Close())
}

const (
	compareRounds  = 3
	compareSeconds = "3"
	compareCached  = 1000    // names asked for again and again
	compareNames   = 400_000 // names asked for once: more than a run can ask
)

var (
	perSecond = regexp.MustCompile(`Queries per second:\s+([0-9.]+)`)
	lost      = regexp.MustCompile(`Queries lost:\s+(\d+)`)
	latency   = regexp.MustCompile(`Average Latency \(s\):\s+([0-9.]+)`)
)

// BenchmarkBesideUnbound measures the resolver beside unbound with log-queries, with dnsperf, one name server, all on this
// machine: the same queries in turns. It reports medians: queries/s, CPU µs a query, mean latency.
func BenchmarkBesideUnbound(b *testing.B) {
	for _, need := range []string{"unbound", "dnsperf"} {
		if _, err := exec.LookPath(need); err != nil {
			b.Skipf("needs %s", need)
		}
	}
	if os.Getenv(namespaceEnv) == "" {
		b.Skip("needs root for a network namespace")
	}
	upstream := quickNameServer(b)
	dir, err := os.MkdirTemp("", "egress-bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			b.Error(err)
		}
	})
	servers := []struct {
		name, addr string
		pid        int
	}{
		{"clawvm", "127.0.0.1:5301", startClawvm(b, dir, "127.0.0.1:5301", upstream)},
		{"unbound", "127.0.0.1:5302", startUnbound(b, dir, 5302, upstream)},
	}
	for _, s := range servers {
		eventually(b, s.name, func() bool {
			c := dns.Client{Timeout: 200 * time.Millisecond}
			_, _, err := c.Exchange(new(dns.Msg).SetQuestion("ready.test.", dns.TypeA), s.addr)
			return err == nil
		})
	}
	results := map[string][]float64{}
	for range b.N {
		for round := range compareRounds {
			for _, kind := range []string{"cached", "uncached"} {
				names := filepath.Join(dir, "names")
				writeNames(b, names, kind, round)
				if kind == "cached" {
					for _, s := range servers {
						dnsperf(b, s.addr, names, "-n", "1")
					}
				}
				for _, s := range servers {
					before := cpuTime(b, s.pid)
					args := []string{"-l", compareSeconds}
					if kind == "uncached" {
						args = append(args, "-n", "1")
					}
					out := dnsperf(b, s.addr, names, args...)
					spent := cpuTime(b, s.pid) - before
					qps, sent := number(b, perSecond, out), number(b, regexp.MustCompile(`Queries completed:\s+(\d+)`), out)
					if n := number(b, lost, out); n > 0 {
						b.Logf("%s %s: %v queries lost", s.name, kind, n)
					}
					key := s.name + "-" + kind
					results[key+"-queries/s"] = append(results[key+"-queries/s"], qps)
					results[key+"-cpu-us/query"] = append(results[key+"-cpu-us/query"], spent.Seconds()*1e6/sent)
					results[key+"-ms"] = append(results[key+"-ms"], 1000*number(b, latency, out))
				}
			}
		}
	}
	for unit, values := range results {
		b.Logf("%s: %.2f", unit, values)
		slices.Sort(values)
		b.ReportMetric(values[len(values)/2], unit)
	}
	b.ReportMetric(0, "ns/op") // of no meaning here
}

// writeNames writes queries for dnsperf; uncached ones were never asked before. (Names under test. unbound answers by itself.)
func writeNames(b *testing.B, path, kind string, round int) {
	b.Helper()
	n, prefix := compareCached, "c"
	if kind == "uncached" {
		n, prefix = compareNames, fmt.Sprintf("u%x-%d-", rand.Uint32(), round)
	}
	var text bytes.Buffer
	for i := range n {
		fmt.Fprintf(&text, "%s%d.bench.net A\n", prefix, i)
	}
	if err := os.WriteFile(path, text.Bytes(), 0o600); err != nil {
		b.Fatal(err)
	}
}

func dnsperf(b *testing.B, addr, names string, args ...string) string {
	b.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		b.Fatal(err)
	}
	out, err := exec.Command("dnsperf", append([]string{"-f", "inet", "-s", host, "-p", port, "-d", names, "-c", "8", "-q", "100"}, args...)...).CombinedOutput()
	if err != nil {
		b.Fatalf("dnsperf: %v: %s", err, out)
	}
	return string(out)
}

func number(b *testing.B, pattern *regexp.Regexp, out string) float64 {
	b.Helper()
	m := pattern.FindStringSubmatch(out)
	if m == nil {
		b.Fatalf("dnsperf says no %s: %s", pattern, out)
	}
	f, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		b.Fatal(err)
	}
	return f
}

// cpuTime is what a process has used, in user and kernel mode.
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+2:]))
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond // USER_HZ is 100 everywhere
}

func startClawvm(b *testing.B, dir, addr string, upstream netip.AddrPort) int {
	b.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), comparisonEnv+"="+strings.Join([]string{addr, upstream.String(), filepath.Join(dir, "net.log")}, " "))
	cmd.Stderr = os.Stderr
	input, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		if err == nil {
			b.Logf("clawvm %s", regexp.MustCompile(`RssAnon:.*`).Find(status))
		}
		if err := errors.Join(err, input.Close(), cmd.Wait()); err != nil {
			b.Error(err)
		}
	})
	return cmd.Process.Pid
}

func startUnbound(b *testing.B, dir string, port int, upstream netip.AddrPort) int {
	b.Helper()
	conf := fmt.Sprintf(`server:
	interface: 127.0.0.1
	port: %d
	do-daemonize: no
	username: ""
	chroot: ""
	directory: "%s"
	pidfile: ""
	use-syslog: no
	logfile: "%[2]s/unbound.log"
	log-queries: yes
	do-not-query-localhost: no
	module-config: "iterator"
	num-threads: 1
	access-control: 127.0.0.0/8 allow
remote-control:
	control-enable: no
forward-zone:
	name: "."
	forward-addr: %s@%d
`, port, dir, upstream.Addr(), upstream.Port())
	path := filepath.Join(dir, "unbound.conf")
	if err := os.WriteFile(path, []byte(conf), 0o600); err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command("unbound", "-d", "-c", path)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		err := cmd.Process.Signal(os.Interrupt)
		if err := errors.Join(err, cmd.Wait()); err != nil {
			b.Error(err)
		}
	})
	return cmd.Process.Pid
}
