package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/host"
	"github.com/clawvm/clawvm/storage"
	"github.com/clawvm/clawvm/storage/recipe"
)

func imageCommand() *cli.Command {
	return &cli.Command{
		Name: "image", Usage: "build, import, list and remove images",
		Subcommands: []*cli.Command{imageBuildCommand(), imageImportCommand(), imageLsCommand(), imageVerifyCommand(), imageRmCommand()},
	}
}

func imageBuildCommand() *cli.Command {
	return &cli.Command{
		Name: "build", Usage: "build an image from a recipe", ArgsUsage: "RECIPE",
		Description: "RECIPE is a bundled one (" + strings.Join(recipe.Names(), ", ") + ") or a file.\n" +
			"Packages are downloaded by apt and npm, as this machine has them set up. What the store has from the same recipe is not built again.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "force", Usage: "build even what is there, to bring its packages up to date"},
			&cli.BoolFlag{Name: "verbose", Usage: "print all that the tools say"},
		},
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			if c.NArg() != 1 {
				return usageError{errors.New("clawvm image build wants a recipe: " + strings.Join(recipe.Names(), ", ") + ", or a file")}
			}
			r, err := findRecipe(c.Args().First())
			if err != nil {
				return err
			}
			began := time.Now()
			o := recipe.Options{CacheDir: l.Downloads(), Force: c.Bool("force"), Progress: showBuild(os.Stdout)}
			if c.Bool("verbose") {
				o.Log = os.Stdout
			}
			image, err := recipe.Build(c.Context, l.Images(), r, o)
			if err != nil {
				return err
			}
			fmt.Printf("image %s is there: %s, %s in %d files (%s)\n", r.Name, shortDigest(image.Digest), config.Size(image.Size), image.Files, human(time.Since(began)))
			return nil
		},
	}
}

// findRecipe loads a recipe from a file, where the argument looks like one, or
// takes a bundled one.
func findRecipe(arg string) (*recipe.Recipe, error) {
	if strings.ContainsRune(arg, '/') || filepath.Ext(arg) != "" {
		return recipe.Load(arg)
	}
	return recipe.Builtin(arg)
}

// showBuild prints each step of a build as it begins, and what it says before
// it downloads.
func showBuild(out *os.File) func(recipe.Progress) {
	var step, note string
	return func(p recipe.Progress) {
		if p.Step != step {
			step = p.Step
			fmt.Fprintf(out, "[%d/%d] %s\n", p.Index, p.Steps, p.Step)
		}
		if p.Note != note && p.Note != "" {
			fmt.Fprintf(out, "      %s\n", p.Note)
		}
		note = p.Note
	}
}

func imageImportCommand() *cli.Command {
	return &cli.Command{
		Name: "import", Usage: "make an image of a directory or a tar archive", ArgsUsage: "DIR|FILE|- [NAME]",
		Description: "A tar may be compressed by gzip, zstd or xz. `-` reads one from standard input.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "digest", Usage: "import only if this `DIGEST` comes out"},
		},
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			if c.NArg() < 1 || c.NArg() > 2 {
				return usageError{errors.New("clawvm image import wants a directory or an archive, and perhaps a name")}
			}
			source, name := c.Args().Get(0), c.Args().Get(1)
			if name != "" {
				if err := storage.ValidName(name); err != nil {
					return usageError{err}
				}
			}
			if c.IsSet("digest") {
				if err := storage.ValidDigest(c.String("digest")); err != nil {
					return usageError{fmt.Errorf("--digest: %w", err)}
				}
			}
			o := storage.ImportOptions{Expect: c.String("digest"), Note: func(s string) { fmt.Fprintln(os.Stderr, "note:", s) }}
			image, err := importImage(c, l.Images(), source, name, o)
			if err != nil {
				return err
			}
			fmt.Println(image.Digest)
			return nil
		},
	}
}

func importImage(c *cli.Context, store *storage.Store, source, name string, o storage.ImportOptions) (*storage.Image, error) {
	if source == "-" {
		return store.ImportTar(c.Context, os.Stdin, name, o)
	}
	st, err := os.Stat(source)
	if err != nil {
		return nil, fmt.Errorf("cannot import %s: %w", source, host.Bare(err))
	}
	if st.IsDir() {
		return store.ImportDir(c.Context, source, name, o)
	}
	f, err := os.Open(source)
	if err != nil {
		return nil, fmt.Errorf("cannot import %s: %w", source, host.Bare(err))
	}
	defer f.Close()
	return store.ImportTar(c.Context, f, name, o)
}

func imageLsCommand() *cli.Command {
	return &cli.Command{
		Name: "ls", Usage: "list the images", Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			images, err := l.Images().List()
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return printJSON(images)
			}
			w := tabwriter.NewWriter(os.Stdout, 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tDIGEST\tSIZE\tFILES\tCREATED")
			for _, i := range images {
				fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", dash(strings.Join(i.Names, ", ")), shortDigest(i.Digest), config.Size(i.Size), i.Files, i.Created.Local().Format(time.DateTime))
			}
			return w.Flush()
		},
	}
}

// shortDigest is enough of a digest for people to tell images apart.
func shortDigest(d string) string { return d[:min(len(d), len("sha256:")+12)] }

func imageVerifyCommand() *cli.Command {
	return &cli.Command{
		Name: "verify", Usage: "read an image whole and compare it with its digest", ArgsUsage: "NAME|DIGEST",
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			if c.NArg() != 1 {
				return usageError{errors.New("clawvm image verify wants an image")}
			}
			if err := l.Images().Verify(c.Context, c.Args().First()); err != nil {
				return err
			}
			fmt.Printf("%s is what its digest says\n", c.Args().First())
			return nil
		},
	}
}

func imageRmCommand() *cli.Command {
	return &cli.Command{
		Name: "rm", Usage: "remove images that no VM uses", ArgsUsage: "NAME|DIGEST...",
		Action: func(c *cli.Context) error {
			l, err := privileged(c)
			if err != nil {
				return err
			}
			if !c.Args().Present() {
				return usageError{errors.New("clawvm image rm wants an image")}
			}
			users, err := host.ImageUsers(c.Context, l)
			if err != nil {
				return err
			}
			for _, ref := range c.Args().Slice() {
				if err := l.Images().Remove(ref, users); err != nil {
					return err
				}
				fmt.Printf("%s is removed\n", ref)
			}
			return nil
		},
	}
}
