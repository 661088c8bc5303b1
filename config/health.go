package config

// health reads how it is looked whether the workload still does what it is for;
// nil is `health: false`.
func (d *decoder) health(n *node, path string) *Health {
	h := defaultHealth()
	if b, ok := n.value.(bool); ok && n.kind == boolean {
		if !b {
			return nil
		}
		return h
	}
	if n.kind != mapping {
		d.fail(n.place, path, n.describe(), "a mapping with tcp, http or exec, interval, timeout, retries, restart; or false")
		return h
	}
	check := d.look(n, path, "",
		field{"interval", func(n *node, p string) { h.Interval = d.duration(n, p) }},
		field{"timeout", func(n *node, p string) { h.Timeout = d.duration(n, p) }},
		field{"retries", func(n *node, p string) {
			if i, ok := d.integer(n, p, 1, maxRetries); ok {
				h.Retries = int(i)
			}
		}},
		field{"restart", func(n *node, p string) { h.Restart = d.boolean(n, p) }},
	)
	h.TCP, h.HTTP, h.Exec = check.TCP, check.HTTP, check.Exec
	return h
}

func defaultHealth() *Health {
	return &Health{Interval: DefaultHealthInterval, Timeout: DefaultHealthTimeout, Retries: DefaultHealthRetries}
}

// hasCheck says whether the health names a check of its own.
func (h *Health) hasCheck() bool { return h.TCP != 0 || h.HTTP != nil || len(h.Exec) > 0 }

// fillHealth completes the health with what the workload is: the gateway is
// looked after unless that is declared otherwise, and another workload's check is
// that of its `ready:` where it has none of its own.
func (d *decoder) fillHealth(vm *VM) {
	_, declared := d.places["health"]
	switch {
	case vm.OpenClaw != nil && !declared:
		vm.Health = defaultHealth()
	case vm.Health == nil || vm.OpenClaw != nil:
	case vm.Run == nil:
		d.failAt("health", "is there without run or openclaw", "a workload to look after, or no health")
	case !vm.Health.hasCheck():
		r := vm.Run.Ready
		vm.Health.TCP, vm.Health.HTTP, vm.Health.Exec = r.TCP, r.HTTP, r.Exec
		if !vm.Health.hasCheck() {
			d.failAt("health", "has no check, and run.ready has none to take", "one of tcp, http, exec")
		}
	}
}

func (h *Health) show() []pair {
	all := showCheck(h.TCP, h.HTTP, h.Exec)
	return append(all, pair{"interval", h.Interval.String()}, pair{"timeout", h.Timeout.String()}, pair{"retries", h.Retries}, pair{"restart", h.Restart})
}
