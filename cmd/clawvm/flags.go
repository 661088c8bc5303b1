package main

import (
	"strings"

	"github.com/urfave/cli/v2"
)

// flagsFirst moves flags in front of the arguments of their command, since people
// type `clawvm logs openclaw -f`, as docker and systemctl let them, and the flag
// package stops at the first argument. What follows `--` stays as it is; so does
// all that follows the VM's name in exec, which is another program's.
func flagsFirst(app *cli.App, args []string) []string {
	if len(args) == 0 {
		return args
	}
	out := []string{args[0]}
	rest := args[1:]
	flags, commands := app.Flags, app.Commands
	var current *cli.Command
	for {
		var positional []string
		done := true
		for len(rest) > 0 {
			word := rest[0]
			if word == "--" {
				return append(append(out, positional...), rest...)
			}
			if len(word) > 1 && word[0] == '-' {
				n := 1
				if takesValue(flags, word) && len(rest) > 1 {
					n = 2
				}
				out, rest = append(out, rest[:n]...), rest[n:]
				continue
			}
			if sub := find(commands, word); sub != nil && len(positional) == 0 {
				out, rest = append(out, word), rest[1:]
				current, flags, commands = sub, sub.Flags, sub.Subcommands
				done = false
				break
			}
			positional, rest = append(positional, word), rest[1:]
			if current != nil && current.Name == "exec" {
				return append(append(out, positional...), rest...)
			}
		}
		if done {
			return append(out, positional...)
		}
	}
}

func find(commands []*cli.Command, name string) *cli.Command {
	for _, c := range commands {
		if c.HasName(name) {
			return c
		}
	}
	return nil
}

// takesValue says whether the flag's value is the next word.
func takesValue(flags []cli.Flag, word string) bool {
	name := strings.TrimLeft(word, "-")
	if strings.Contains(name, "=") {
		return false
	}
	for _, f := range flags {
		for _, n := range f.Names() {
			if n == name {
				_, isBool := f.(*cli.BoolFlag)
				return !isBool
			}
		}
	}
	return false
}
