package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
)

func gcCommand() *cli.Command {
	return &cli.Command{
		Name: "gc", Usage: "remove what killed VMs left behind",
		Description: "Touches only what carries this root's mark, and nothing of a VM that is up.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "say what would be removed, and remove nothing"},
			&cli.BoolFlag{Name: "overlays", Usage: "also remove the overlays of VMs that nothing declares; volumes are never removed"},
			jsonFlag(),
			&cli.BoolFlag{Name: "all", Usage: "also remove the bridge and the packet filter tables, when no VM is up"},
		},
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			sweep := host.Sweep{All: c.Bool("all"), Overlays: c.Bool("overlays"), DryRun: c.Bool("dry-run")}
			swept, err := host.Collect(c.Context, l, sweep)
			if c.Bool("json") {
				return errors.Join(err, json.NewEncoder(os.Stdout).Encode(swept))
			}
			done := "removed"
			if sweep.DryRun {
				done = "would remove"
			}
			for _, r := range swept.Removed {
				fmt.Printf("%s: %s\n", done, r)
			}
			for _, k := range swept.Kept {
				fmt.Println("kept:", k)
			}
			if err == nil && len(swept.Removed) == 0 {
				fmt.Println("nothing was left behind")
			}
			return err
		},
	}
}
