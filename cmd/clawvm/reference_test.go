package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"
)

var updateReference = flag.Bool("update", false, "write docs/commands.md")

// referenceFile lists the commands; it is made of their definitions.
const referenceFile = "../../docs/commands.md"

// TestReference compares docs/commands.md with the commands.
func TestReference(t *testing.T) {
	got := reference(newApp())
	if *updateReference {
		if err := os.WriteFile(referenceFile, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(referenceFile)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("docs/commands.md is not what the commands are; `go test ./cmd/clawvm -run TestReference -update` writes it (-it +they):\n%s", diff)
	}
}

// reference describes all commands in Markdown.
func reference(app *cli.App) string {
	var b strings.Builder
	b.WriteString("# Commands\n\n<!-- Made of the commands' definitions: go test ./cmd/clawvm -run TestReference -update -->\n\n" +
		"`clawvm [--root DIR] COMMAND [FLAGS] [ARGUMENTS]`; flags may stand before or after the arguments.\n" +
		"[Operations](operations.md) has the exit codes, and the commands by task.\n\n")
	b.WriteString("| flag before the command | |\n|---|---|\n")
	for _, f := range app.Flags {
		b.WriteString(flagRow(f))
	}
	b.WriteString("\n")
	for _, c := range app.Commands {
		describe(&b, c, "clawvm", 2)
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

func describe(b *strings.Builder, c *cli.Command, parent string, level int) {
	if c.Hidden || c.Name == "help" {
		return
	}
	name := parent + " " + c.Name
	fmt.Fprintf(b, "%s %s\n\n", strings.Repeat("#", level), name)
	if len(c.Subcommands) == 0 {
		line := name
		if len(c.Flags) > 0 {
			line += " [FLAGS]"
		}
		if c.ArgsUsage != "" {
			line += " " + c.ArgsUsage
		}
		fmt.Fprintf(b, "    %s\n\n", line)
	}
	fmt.Fprintf(b, "%s%s.", strings.ToUpper(c.Usage[:1]), c.Usage[1:])
	if len(c.Aliases) > 0 {
		fmt.Fprintf(b, " Also: `%s`.", strings.Join(c.Aliases, "`, `"))
	}
	b.WriteString("\n\n")
	if c.Description != "" {
		fmt.Fprintf(b, "%s\n\n", strings.ReplaceAll(escaped(c.Description), "\n", "  \n"))
	}
	if len(c.Flags) > 0 {
		b.WriteString("| flag | |\n|---|---|\n")
		for _, f := range c.Flags {
			b.WriteString(flagRow(f))
		}
		b.WriteString("\n")
	}
	for _, s := range c.Subcommands {
		describe(b, s, name, level+1)
	}
}

// flagRow is a flag as a row: its names with the placeholder of its value, what it does, and its default.
func flagRow(f cli.Flag) string {
	doc, ok := f.(cli.DocGenerationFlag)
	if !ok {
		return ""
	}
	usage, value := doc.GetUsage(), ""
	if before, rest, found := strings.Cut(usage, "`"); found && doc.TakesValue() {
		placeholder, after, _ := strings.Cut(rest, "`")
		usage, value = before+placeholder+after, " "+placeholder
	}
	var names []string
	for _, n := range f.Names() {
		dashes := "--"
		if len(n) == 1 {
			dashes = "-"
		}
		names = append(names, "`"+dashes+n+value+"`")
	}
	if d := doc.GetDefaultText(); doc.TakesValue() && d != "" && d != `""` && d != "0s" && d != "0" && d != "-1" {
		usage += " (default: " + strings.Trim(d, `"`) + ")"
	}
	return fmt.Sprintf("| %s | %s |\n", strings.Join(names, ", "), escaped(usage))
}

// escaped is text that Markdown shows as it is, code in it excepted.
func escaped(s string) string {
	return strings.NewReplacer("<", "&lt;", "|", "\\|", "*", "\\*").Replace(s)
}
