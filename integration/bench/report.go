package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// spread is the five numbers of a sample: minimum, quartiles, maximum.
type spread struct{ min, q1, median, q3, max float64 }

// spreadOf takes the quartiles by linear interpolation between the nearest
// values (R's type 7).
func spreadOf(sample []float64) spread {
	s := slices.Sorted(slices.Values(sample))
	at := func(p float64) float64 {
		if len(s) == 0 {
			return 0
		}
		x := p * float64(len(s)-1)
		i := int(x)
		if i+1 == len(s) {
			return s[i]
		}
		return s[i] + (x-float64(i))*(s[i+1]-s[i])
	}
	return spread{at(0), at(.25), at(.5), at(.75), at(1)}
}

// row is a table's row of milliseconds.
func row(out io.Writer, name string, s spread) {
	digits := 0
	if s.median < 100 {
		digits = 1
	}
	fmt.Fprintf(out, "| %s |", name)
	for _, v := range []float64{s.median, s.min, s.q1, s.q3, s.max} {
		fmt.Fprintf(out, " %.*f |", digits, v)
	}
	fmt.Fprintln(out)
}

const (
	rowsHead = "| ms | median | min | quartile 1 | quartile 3 | max |\n|---|---:|---:|---:|---:|---:|"
)

func each[T any](list []T, value func(T) float64) spread {
	var sample []float64
	for _, v := range list {
		sample = append(sample, value(v))
	}
	return spreadOf(sample)
}

// print writes the tables, as Markdown.
func (r results) print(out io.Writer) {
	m := r.Machine
	fmt.Fprintf(out, "%s · %d × %s · %s, Linux %s · guests: Linux %s · KVM: %s · load at the beginning: %s\n",
		r.Time.Format("2006-01-02"), m.CPUs, m.CPU, m.System, m.Kernel, m.Guest, m.KVM, m.Load)
	var versions []string
	for _, name := range slices.Sorted(maps.Keys(m.Versions)) {
		versions = append(versions, name+" "+m.Versions[name])
	}
	fmt.Fprintln(out, strings.Join(versions, " · "))
	for _, name := range slices.Sorted(maps.Keys(r.Starts)) {
		r.Starts[name].print(out, name)
	}
	if r.Memory != nil {
		fmt.Fprintf(out, "\n### Memory\n\n| RssAnon, MiB | median | all |\n|---|---:|---|\n")
		var both []int
		for i := range r.Memory.Gate {
			both = append(both, r.Memory.Gate[i]+r.Memory.Supervisor[i])
		}
		for _, of := range []struct {
			name string
			kib  []int
		}{{"supervisor", r.Memory.Supervisor}, {"gate", r.Memory.Gate}, {"both", both}} {
			var all []string
			for _, k := range of.kib {
				all = append(all, fmt.Sprintf("%.1f", float64(k)/1024))
			}
			fmt.Fprintf(out, "| %s | %.1f | %s |\n", of.name, each(of.kib, func(k int) float64 { return float64(k) / 1024 }).median, strings.Join(all, ", "))
		}
	}
	if len(r.Lists) > 0 {
		fmt.Fprintf(out, "\n### clawvm ls\n\n%s\n", rowsHead)
		for _, l := range r.Lists {
			row(out, fmt.Sprintf("%d declared, %d running", l.Declared, l.Running), spreadOf(l.Took))
		}
	}
	if len(r.Resolver) > 0 {
		fmt.Fprintf(out, "\n### Resolver\n\n| | clawvm | unbound |\n|---|---:|---:|\n")
		for _, name := range slices.Sorted(maps.Keys(r.Resolver)) {
			if what, ok := strings.CutPrefix(name, "clawvm-"); ok {
				fmt.Fprintf(out, "| %s | %.4g | %.4g |\n", what, r.Resolver[name], r.Resolver["unbound-"+what])
			}
		}
	}
	for _, what := range slices.Sorted(maps.Keys(r.Skipped)) {
		fmt.Fprintf(out, "\nNot measured: %s: %s\n", what, r.Skipped[what])
	}
}

func (s starts) print(out io.Writer, name string) {
	how := "KVM"
	if s.Emulated {
		how = "emulated"
	}
	fmt.Fprintf(out, "\n### Command to ready, %s (%s), %d pairs\n\n%s\n", name, how, len(s.Pairs), rowsHead)
	for _, of := range []struct {
		name  string
		value func(pair) float64
	}{
		{"`clawvm up`", func(p pair) float64 { return p.Up.Total }},
		{"bare VMM", func(p pair) float64 { return p.Bare }},
		{"difference in a pair", func(p pair) float64 { return p.Up.Total - p.Bare }},
		{"**ours**: before the VMM and after ready", func(p pair) float64 { return p.Up.ours() }},
		{"· command: its checks, starts of the program", func(p pair) float64 { return p.Up.Command }},
		{"· supervisor until it starts the VMM", func(p pair) float64 { return p.Up.Before - p.Up.Command }},
		{"· ready to the command's end", func(p pair) float64 { return p.Up.After }},
		{"VMM until its guest runs", func(p pair) float64 { return p.Up.VMM }},
		{"guest until it is ready", func(p pair) float64 { return p.Up.Guest }},
	} {
		row(out, of.name, each(s.Pairs, of.value))
	}
	fmt.Fprintf(out, "\nThe supervisor's steps (medians, ms):")
	if len(s.Pairs) == 0 {
		return
	}
	for i, st := range s.Pairs[0].Up.Steps {
		took := each(s.Pairs, func(p pair) float64 {
			if i < len(p.Up.Steps) {
				return p.Up.Steps[i].Took
			}
			return 0
		})
		fmt.Fprintf(out, " %s %.1f ·", st.Name, took.median)
	}
	fmt.Fprintln(out)
}
