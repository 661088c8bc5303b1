package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/clawvm/clawvm/integration/emuhost"
	"github.com/clawvm/clawvm/integration/soak"
	"github.com/clawvm/clawvm/vmm"
)

// soakLimit bounds one round of killing on the server: it takes some 40 s.
const soakLimit = 5 * time.Minute

// TestKilledAtRandom runs package soak's rounds where guests have KVM: on the server, under QEMU and under
// cloud-hypervisor. It takes a minute a round, so it has to be asked for.
func TestKilledAtRandom(t *testing.T) {
	rounds := soak.Number(t, "CLAWVM_SOAK_SERVER", 0)
	if rounds == 0 {
		t.Skip("takes a minute a round: CLAWVM_SOAK_SERVER=20 asks for twenty under each VMM")
	}
	h := emuhost.Start(t, emuhost.Options{})
	limit := time.Duration(rounds) * soakLimit
	ctx, cancel := context.WithTimeout(t.Context(), 2*limit)
	defer cancel()
	carryTests(ctx, t, h, t.TempDir(), "../soak", "soak.test")
	for _, name := range []string{vmm.CloudHypervisor, vmm.QEMU} {
		t.Run(name, func(t *testing.T) {
			if name == vmm.CloudHypervisor && cloudHypervisor() == "" {
				t.Skipf("no cloud-hypervisor to carry along: neither %s nor the PATH has one", vmm.CloudHypervisorEnv)
			}
			var out bytes.Buffer
			said := io.MultiWriter(&out, os.Stdout) // hours of silence would say nothing of where it stands
			code, err := h.Exec(ctx, emuhost.Command{
				Dir:  inside,
				Argv: []string{"./soak.test", "-test.v", "-test.timeout", limit.String(), "-test.run", "^TestKilledAtRandom$"},
				Env: []string{"CLAWVM_TEST_VMM=" + name, "CLAWVM_TEST_BIN=" + inside + "/bin",
					fmt.Sprintf("CLAWVM_SOAK_ROUNDS=%d", rounds), "CLAWVM_SOAK_SEED=" + os.Getenv("CLAWVM_SOAK_SEED")},
				Stdout: said, Stderr: said,
			})
			if err != nil || code != 0 {
				t.Fatalf("the rounds on the server ended with %d, %v", code, err)
			}
			if !bytes.Contains(out.Bytes(), []byte("--- PASS: TestKilledAtRandom")) {
				t.Fatal("something was not tested")
			}
		})
	}
}
