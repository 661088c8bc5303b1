// Package soak kills VMs at random for hours, and loads a host with as many as it
// bears. `make soak` runs it at length; `make test` runs ten rounds.
//
//	CLAWVM_SOAK_SEED     what the rounds are drawn from; printed, and 0 for a new one
//	CLAWVM_SOAK_ROUNDS   how many rounds there are in all
//	CLAWVM_SOAK_STATE    a file that keeps seed and rounds done: run it again to go on
//	CLAWVM_SOAK_VMS      how many VMs are up at once
//	CLAWVM_SOAK_MINUTES  for how long one VM is worked on, to see whether anything grows
//	CLAWVM_SOAK_SERVER   how many rounds there are on the emulated server, under each VMM
//	CLAWVM_SOAK_POWER    how often the emulated server loses its power
//
// The last two are package server's. What its tests share with those here is not
// in test files.
package soak

import (
	"encoding/json"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/clawvm/clawvm/internal/durable"
)

// Number is a whole number of the environment.
func Number(t testing.TB, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 {
		t.Fatalf("%s: want a whole number, not %q", name, text)
	}
	return n
}

// Rounds are those of one test.
type Rounds struct {
	Seed  uint64         `json:"seed"`
	Done  int            `json:"done"`
	Kills map[string]int // how often what was done, of those done

	Total int    `json:"-"` // as many as there are to be
	File  string `json:"-"` // where the rest is kept; "": nowhere
}

// LoadRounds goes on with the rounds of the state file, or begins. Each kind of
// rounds has a file of its own, whose name ends with kind.
func LoadRounds(t testing.TB, kind string, total int) *Rounds {
	t.Helper()
	r := &Rounds{Seed: uint64(Number(t, "CLAWVM_SOAK_SEED", 0)), Kills: map[string]int{}, Total: total}
	if r.Seed == 0 {
		r.Seed = uint64(time.Now().UnixNano())
	}
	if file := os.Getenv("CLAWVM_SOAK_STATE"); file != "" {
		r.File = file + kind
		raw, err := os.ReadFile(r.File)
		if err == nil {
			err = json.Unmarshal(raw, r)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d (CLAWVM_SOAK_SEED), rounds %d to %d", r.Seed, r.Done+1, r.Total)
	return r
}

// Draw is what the next round is drawn from: the same for each try of it.
func (r *Rounds) Draw() *rand.Rand { return rand.New(rand.NewPCG(r.Seed, uint64(r.Done))) }

// Finish counts a round that went well.
func (r *Rounds) Finish(t testing.TB, what string) {
	t.Helper()
	r.Done++
	r.Kills[what]++
	if r.File == "" {
		return
	}
	raw, err := json.Marshal(r)
	if err == nil {
		err = durable.WriteFile(r.File, append(raw, '\n'), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}
