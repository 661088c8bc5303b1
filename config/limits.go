package config

import (
	"math"
	"strconv"
	"strings"
)

// Limits bound what a VM's processes take of the host: the VMM, and the servers of its shares. The guest's own size is
// VM.VCPUs and VM.Memory.
type Limits struct {
	CPUs           int  // processor time, in percent of one processor; 0: as much as there is
	CPUWeight      int  // its share of processor time when there is too little, against other VMs' weights
	Tasks          int  // processes and threads
	MemoryOverhead Size // memory over the guest's own; 0: chosen for the VM
	Swap           Size // how much of its memory the host may put on a disk
}

func (d *decoder) limits(n *node, path string, l *Limits) {
	d.fields(n, path,
		field{"cpus", func(n *node, p string) {
			if percent := d.cpus(n, p); percent > 0 {
				l.CPUs = percent
			}
		}},
		field{"cpuWeight", func(n *node, p string) {
			if i, ok := d.integer(n, p, 1, maxCPUWeight); ok {
				l.CPUWeight = int(i)
			}
		}},
		field{"tasks", func(n *node, p string) {
			if i, ok := d.integer(n, p, minTasks, maxTasks); ok {
				l.Tasks = int(i)
			}
		}},
		field{"memoryOverhead", func(n *node, p string) {
			if s := d.size(n, p, minOverhead, maxMemory, mebibyte, "the VMM and the servers of the shares need more"); s > 0 {
				l.MemoryOverhead = s
			}
		}},
		field{"swap", func(n *node, p string) { l.Swap = d.size(n, p, 0, maxMemory, mebibyte, "") }},
	)
}

// cpus reads an amount of processors, as a number or in percent of one, and gives it in percent.
func (d *decoder) cpus(n *node, path string) int {
	const want = "a number of processors from 0.01 to 256, such as 1.5 or 150%"
	if n.kind != integer && n.kind != float && n.kind != text {
		d.fail(n.place, path, n.describe(), want)
		return 0
	}
	number, inPercent := strings.CutSuffix(n.text, "%")
	value, err := strconv.ParseFloat(number, 64)
	if !inPercent {
		value *= 100
	}
	whole := math.Round(value)
	switch {
	case err != nil || strings.Trim(number, "0123456789.") != "": // no exponents, no hexadecimal, no nan
		d.fail(n.place, path, quoted(n.text)+" is no number of processors", want)
	case value < 1 || value > maxCPUs*100:
		d.fail(n.place, path, "is "+n.text, want)
	case math.Abs(value-whole) > 1e-6:
		d.fail(n.place, path, n.text+" is finer than a hundredth of a processor", "whole percents, such as 1.25 or 125%")
	default:
		return int(whole)
	}
	return 0
}

// processors is CPUs as the declaration has it: 1.5 for 150; nil where there is no limit.
func (l Limits) processors() any {
	switch {
	case l.CPUs == 0:
		return nil
	case l.CPUs%100 == 0:
		return l.CPUs / 100
	}
	return float64(l.CPUs) / 100
}

func (l Limits) show() []pair {
	all := []pair{{"cpus", l.processors()}, {"cpuWeight", l.CPUWeight}, {"tasks", l.Tasks}, {"memoryOverhead", nil}, {"swap", 0}}
	if l.MemoryOverhead > 0 {
		all[3].value = l.MemoryOverhead.String()
	}
	if l.Swap > 0 {
		all[4].value = l.Swap.String()
	}
	return all
}
