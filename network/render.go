package network

import (
	"fmt"
	"strings"

	"github.com/google/nftables"
)

var families = map[nftables.TableFamily]string{
	nftables.TableFamilyINet:   "inet",
	nftables.TableFamilyBridge: "bridge",
}

// String shows the table as `nft list table` does.
func (t table) String() string {
	var w strings.Builder
	fmt.Fprintf(&w, "table %s %s {\n", families[t.family], t.name)
	for _, s := range append(append([]set(nil), t.sets...), t.own...) {
		kind, typ := "set", s.key.Name
		if s.isMap {
			kind, typ = "map", s.key.Name+" : "+s.data.Name
		}
		fmt.Fprintf(&w, "\t%s %s {\n", kind, s.name)
		if typ != "" {
			fmt.Fprintf(&w, "\t\ttype %s\n", typ)
		}
		if s.size > 0 {
			fmt.Fprintf(&w, "\t\tsize %d\n", s.size)
		}
		for _, f := range []struct {
			set  bool
			name string
		}{{s.interval, "interval"}, {s.timeout, "timeout"}, {s.dynamic, "dynamic"}} {
			if f.set {
				w.WriteString("\t\tflags " + f.name + "\n")
			}
		}
		if len(s.elements) > 0 {
			texts := make([]string, len(s.elements))
			for i, e := range s.elements {
				texts[i] = e.text
			}
			fmt.Fprintf(&w, "\t\telements = { %s }\n", strings.Join(texts, ",\n\t\t\t     "))
		}
		w.WriteString("\t}\n\n")
	}
	for i, c := range t.chains {
		if i > 0 {
			w.WriteString("\n")
		}
		fmt.Fprintf(&w, "\tchain %s {\n", c.name)
		if c.hook != nil {
			fmt.Fprintf(&w, "\t\t%s\n", c.hook.text)
		}
		for _, r := range c.rules {
			w.WriteString("\t\t" + r.text)
			if r.comment != "" {
				fmt.Fprintf(&w, " comment %q", r.comment)
			}
			w.WriteString("\n")
		}
		w.WriteString("\t}\n")
	}
	w.WriteString("}\n")
	return w.String()
}

// merged puts VMs' parts into the shared tables, for a look at the whole.
func merged(shared []table, parts ...[]table) []table {
	whole := make([]table, len(shared))
	for i, t := range shared {
		whole[i] = t
		whole[i].sets = append([]set(nil), t.sets...)
		whole[i].own = append([]set(nil), t.own...)
		whole[i].chains = append([]chain(nil), t.chains...)
		for _, p := range parts {
			for j, s := range p[i].sets {
				whole[i].sets[j].elements = append(whole[i].sets[j].elements, s.elements...)
			}
			whole[i].own = append(whole[i].own, p[i].own...)
			whole[i].chains = append(whole[i].chains, p[i].chains...)
		}
	}
	return whole
}
