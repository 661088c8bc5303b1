package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/storage/recipe"
)

// completionFlag is what the scripts below end a command line with that is to be completed; the library knows it.
const completionFlag = "--generate-bash-completion"

// The scripts that a shell loads. They ask this program, so that a newer program needs no newer script. The library's own need the
// package bash-completion, and lose words with spaces. A flag is asked for by one dash: `--` alone would end the flags.
var completionScripts = map[string]string{
	"bash": `_clawvm() {
	local cur=${COMP_WORDS[COMP_CWORD]} words=("${COMP_WORDS[@]:0:COMP_CWORD}") i
	for ((i = 1; i < ${#words[@]}; i++)); do
		[[ ${words[i]} == -- ]] && return
	done
	[[ $cur == -* ]] && words+=("${cur/#--/-}")
	local IFS=$'\n'
	COMPREPLY=($(compgen -W "$("${words[@]}" ` + completionFlag + ` 2>/dev/null)" -- "$cur"))
}
complete -o bashdefault -o default -F _clawvm clawvm
`,
	"zsh": `#compdef clawvm
_clawvm() {
	local cur=${words[CURRENT]}
	local -a asked=("${(@)words[1,CURRENT-1]}") found
	(( ${asked[(Ie)--]} )) && return
	[[ $cur == -* ]] && asked+=("${cur/#--/-}")
	found=("${(@f)$("${asked[@]}" ` + completionFlag + ` 2>/dev/null)}")
	if [[ -n ${found[1]} ]]; then
		compadd -- "${found[@]}"
	else
		_files
	fi
}
if [[ $funcstack[1] == _clawvm ]]; then
	_clawvm "$@"
else
	compdef _clawvm clawvm
fi
`,
	"fish": `function __clawvm_complete
	set -l words (commandline -opc)
	contains -- -- $words; and return
	set -l cur (commandline -ct)
	string match -q -- '-*' $cur; and set -a words (string replace -r '^--' '-' -- $cur)
	set -l found ($words ` + completionFlag + ` 2>/dev/null)
	if set -q found[1]
		printf '%s\n' $found
	else
		__fish_complete_path $cur
	end
end
complete -c clawvm -f -a '(__clawvm_complete)'
`,
}

func completionCommand() *cli.Command {
	return &cli.Command{
		Name: "completion", Usage: "print a script by which a shell completes commands, flags, VMs and images", ArgsUsage: "bash|zsh|fish",
		Description: "bash: clawvm completion bash > /etc/bash_completion.d/clawvm\n" +
			"zsh:  clawvm completion zsh > /usr/local/share/zsh/site-functions/_clawvm\n" +
			"fish: clawvm completion fish > /etc/fish/completions/clawvm.fish",
		Action: func(c *cli.Context) error {
			script, ok := completionScripts[c.Args().First()]
			if c.NArg() != 1 || !ok {
				return usageError{errors.New("clawvm completion wants the name of a shell: bash, zsh or fish")}
			}
			_, err := fmt.Fprint(c.App.Writer, script)
			return err
		},
	}
}

// completing says whether a shell asks what may come next. Behind `--` stand the words of another program; nothing is said about
// those, and above all that program isn't run.
func completing(args []string) (asked, foreign bool) {
	if len(args) == 0 || args[len(args)-1] != completionFlag {
		return false, false
	}
	return true, slices.Contains(args, "--")
}

// complete is how a command is completed: by its flags after a dash, by its subcommands, else by what its arguments may be.
func complete(command *cli.Command) cli.BashCompleteFunc {
	group := len(command.Subcommands) > 0 // later each has one for its help
	return func(c *cli.Context) {
		last := ""
		if len(os.Args) > 2 {
			last = os.Args[len(os.Args)-2]
		}
		if strings.HasPrefix(last, "-") || group {
			cli.DefaultCompleteWithFlags(command)(c)
			return
		}
		for _, word := range candidates(c, command.Name, command.ArgsUsage) {
			if !slices.Contains(c.Args().Slice(), word) {
				fmt.Fprintln(c.App.Writer, word)
			}
		}
	}
}

// candidates are the words that an argument of a command may be, by what its usage calls them. What can't be found out is left away.
func candidates(c *cli.Context, command, usage string) []string {
	// What stands before a command isn't read into the app's metadata while it is completed. The outermost context that has a value
	// is the app's: exec has a flag of the same name.
	root := "/"
	for _, outer := range c.Lineage() {
		if value := outer.String("root"); value != "" {
			root = value
		}
	}
	l, err := host.LookLayout(root)
	if err != nil {
		return nil
	}
	switch {
	case command == "completion":
		return strings.Split(usage, "|")
	case strings.HasPrefix(usage, "RECIPE"):
		return recipe.Names()
	case strings.Contains(usage, "NAME|DIGEST"):
		var names []string
		images, err := l.Images().List()
		for _, i := range images {
			names = append(names, i.Names...)
		}
		return sortedOr(names, err)
	case strings.HasPrefix(usage, "VM") && c.NArg() == 1:
		var names []string
		declared, err := host.Secrets(c.Context, l, c.Args().First())
		for _, s := range declared {
			if s.Stdin {
				names = append(names, s.Name)
			}
		}
		return sortedOr(names, err)
	case strings.Contains(usage, "NAME:"):
		var names []string
		declared, err := l.Declared()
		for _, n := range declared {
			names = append(names, n+":")
		}
		return sortedOr(names, err)
	case c.NArg() > 0 && !strings.Contains(usage, "..."), c.NArg() > 0 && command == "exec":
		return nil
	case strings.HasPrefix(usage, "VM"), strings.Contains(usage, "NAME"):
		return sortedOr(l.Declared())
	}
	return nil
}

func sortedOr(names []string, err error) []string {
	if err != nil {
		return nil
	}
	slices.Sort(names)
	return names
}
