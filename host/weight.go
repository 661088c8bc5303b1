package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/internal/durable"
)

// weightProperty is a unit's weight against its neighbours (systemd.resource-control(5)).
const weightProperty = "CPUWeight"

// weightWait bounds systemd's answer when the weight is given back.
const weightWait = 10 * time.Second

// setWeight sets the weight on the VM's own cgroup, which is its unit's where it
// has one: then only systemd may, and the unit's own setting stays unless the
// declaration has another than the default.
func (l *life) setWeight(ctx context.Context, weight int) error {
	unit := l.cgroups.unit
	if unit == "" {
		return l.cgroups.base.set([]cgroupValue{{"cpu.weight", strconv.Itoa(weight)}})
	}
	was, kept, err := readWeight(l.paths.UnitWeight())
	if err != nil {
		return err
	}
	if weight == config.DefaultCPUWeight && !kept {
		return nil
	}
	conn, err := systemd.NewWithContext(ctx)
	if err != nil {
		return cannotWeigh(err)
	}
	defer conn.Close()
	if strings.HasSuffix(unit, scopeSuffix) { // it goes with the VM
		return weigh(ctx, conn, unit, uint64(weight))
	}
	// systemd keeps what a unit is given until the host's next boot.
	if !kept {
		if was, err = weightOf(ctx, conn, unit); err != nil {
			return err
		}
		if err := durable.WriteFile(l.paths.UnitWeight(), []byte(strconv.FormatUint(was, 10)), 0o600); err != nil {
			return fmt.Errorf("cannot keep the weight that %s had: %w", unit, err)
		}
	}
	if weight == config.DefaultCPUWeight {
		return l.giveWeightBack(ctx, conn, unit, was)
	}
	l.undo.push("the unit's weight", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), weightWait)
		defer cancel()
		conn, err := systemd.NewWithContext(ctx)
		if err != nil {
			return cannotWeigh(err)
		}
		defer conn.Close()
		return l.giveWeightBack(ctx, conn, unit, was)
	})
	return weigh(ctx, conn, unit, uint64(weight))
}

func (l *life) giveWeightBack(ctx context.Context, conn *systemd.Conn, unit string, was uint64) error {
	if err := weigh(ctx, conn, unit, was); err != nil {
		return err
	}
	return os.Remove(l.paths.UnitWeight())
}

func weigh(ctx context.Context, conn *systemd.Conn, unit string, weight uint64) error {
	if err := conn.SetUnitPropertiesContext(ctx, unit, true, systemd.Property{Name: weightProperty, Value: dbus.MakeVariant(weight)}); err != nil {
		return cannotWeigh(err)
	}
	return nil
}

func weightOf(ctx context.Context, conn *systemd.Conn, unit string) (uint64, error) {
	p, err := conn.GetUnitTypePropertyContext(ctx, unit, "Service", weightProperty)
	if err != nil {
		return 0, cannotWeigh(err)
	}
	weight, ok := p.Value.Value().(uint64)
	if !ok {
		return 0, cannotWeigh(fmt.Errorf("the weight of %s is %s", unit, p.Value))
	}
	return weight, nil
}

func cannotWeigh(err error) error {
	return fmt.Errorf("cannot set limits.cpuWeight: systemd: %w", err)
}

// readWeight reads the weight that a unit had before a start that was killed gave it
// the declared one; kept is false where none was.
func readWeight(file string) (weight uint64, kept bool, err error) {
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err == nil {
		weight, err = strconv.ParseUint(string(raw), 10, 64)
	}
	if err != nil {
		return 0, false, fmt.Errorf("cannot read the weight that the unit had: %w", err)
	}
	return weight, true, nil
}
