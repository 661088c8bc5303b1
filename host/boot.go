package host

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/clawvm/clawvm/config"
	"github.com/clawvm/clawvm/guest"
	"github.com/clawvm/clawvm/guest/kernel"
	"github.com/clawvm/clawvm/guest/openclaw"
	"github.com/clawvm/clawvm/host/gate"
	"github.com/clawvm/clawvm/network"
	"github.com/clawvm/clawvm/storage"
	"github.com/clawvm/clawvm/vmm"
)

// describeMachine is the machine, but for what later steps make.
func (l *life) describeMachine() vmm.Machine {
	p := l.port()
	m := vmm.Machine{
		Name: l.name, VCPUs: l.vm.VCPUs, Memory: int64(l.vm.Memory),
		Kernel: l.layout.relative(l.boot.Vmlinux), Initramfs: l.layout.relative(l.paths.Initramfs()),
		Cmdline: kernel.Cmdline(kernel.CmdlineOptions{Emulated: l.emulated}),
		Disks:   l.disks,
		TAP:     p.TAP, MAC: p.MAC,
		Dir: l.layout.relative(l.paths.VMM()), UID: l.ids.vmm, GID: l.ids.vmm,
		Console: l.sockets.console, Spawn: l.spawnGuest,
		InstructionClock: l.emulated && needsInstructionClock(l.vm),
	}
	if m.InstructionClock {
		// One clock that counts instructions means one thread that executes them.
		m.VCPUs = 1
	}
	return m
}

// needsInstructionClock says whether the workload has time limits of its own in
// its start that an emulated processor does not meet. The gateway has one of 5 s.
func needsInstructionClock(vm *config.VM) bool { return vm.OpenClaw != nil }

// workloadUser is who the workload runs as: a name, UID or UID:GID.
func workloadUser(vm *config.VM) string {
	switch {
	case vm.OpenClaw != nil:
		return openclaw.User
	case vm.Run != nil:
		return vm.Run.User
	}
	return ""
}

// writeBootDocument writes this start's initramfs: the kernel's, and the document
// that tells the guest's init what to do.
func (l *life) writeBootDocument(context.Context) error {
	mtu, err := l.bridge.LinkMTU()
	if err != nil {
		return err
	}
	transport := guest.TransportSerial
	if l.machine.Agent.Listening {
		transport = guest.TransportVsock
	}
	doc, err := document(l.vm, l.user, documentFacts{
		address: l.address, gateway: l.hostConfig.Address.Addr(), mac: l.machine.MAC.String(),
		mtu: mtu, transport: transport, instructionClock: l.machine.InstructionClock,
	})
	if err != nil {
		return coded(ExitDeclaration, err)
	}
	raw, err := doc.Encode()
	if err != nil {
		return err
	}
	l.undo.push("the initramfs", func() error {
		if err := os.Remove(l.paths.Initramfs()); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	})
	f, err := os.OpenFile(l.paths.Initramfs(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return err
	}
	// The document holds no secret, and is still nobody's business but the VMM's.
	return errors.Join(kernel.WriteInitramfs(f, l.boot.Initramfs, raw), f.Chmod(0o640), f.Chown(0, l.ids.vmm), f.Close())
}

// documentFacts is what a boot document says beside the declaration.
type documentFacts struct {
	address, gateway netip.Addr
	mac              string
	mtu              int
	transport        string
	instructionClock bool
}

// document is the boot document of a VM. It is pure: the same VM has the same
// document.
func document(vm *config.VM, u user, f documentFacts) (*guest.Document, error) {
	doc := &guest.Document{
		Version: guest.DocumentVersion, Name: vm.Name, Hostname: vm.Hostname,
		Network: &guest.Network{
			MAC: f.mac, Address: f.address, Gateway: f.gateway, MTU: f.mtu,
			// The VM's own resolver in the gate, whatever the address.
			Nameservers: []netip.Addr{f.gateway},
		},
		Root:      guest.Root{Lower: guest.Lower{Share: storeTag}},
		Transport: f.transport, InstructionClock: f.instructionClock,
	}
	if vm.NoGateway {
		doc.Network.Gateway = netip.Addr{}
	}
	if vm.Overlay.Size > 0 {
		doc.Root.Upper.Disk = overlayID
	} else {
		doc.Root.Upper.Tmpfs = int64(vm.Overlay.Tmpfs)
	}
	for i, v := range vm.Volumes {
		doc.Mounts = append(doc.Mounts, guest.Mount{
			Kind: guest.MountVolume, Source: fmt.Sprintf(volumeID, i), Target: v.Mount,
			NoSUID: true, NoDev: true, Owner: &guest.Owner{UID: u.uid, GID: u.gid}, Mode: volumeMode,
		})
	}
	for i, s := range vm.Shares {
		doc.Mounts = append(doc.Mounts, guest.Mount{
			Kind: guest.MountShare, Source: fmt.Sprintf(shareTag, i), Target: s.Mount,
			ReadOnly: s.ReadOnly, NoSUID: true, NoDev: true,
		})
	}
	if len(vm.Secrets) > 0 {
		doc.Mounts = append(doc.Mounts, guest.Mount{Kind: guest.MountSecrets, Source: secretsTag, Target: guest.SecretsTarget})
	}
	switch {
	case vm.OpenClaw != nil:
		return doc, gatewayWorkload(doc, vm)
	case vm.Run != nil:
		r := vm.Run
		doc.Workload = &guest.Workload{
			Argv: r.Argv, Env: r.Env, User: r.User, Cwd: r.Cwd, Restart: vm.Restart, NoRestart: r.NoRestart,
			Ready: guest.Ready{TCP: r.Ready.TCP, Exec: r.Ready.Exec, Timeout: int(r.Ready.Timeout / time.Second)},
			Stop:  guest.Stop{Signal: r.Stop.Signal, Timeout: int(r.Stop.Timeout / time.Second)},
		}
		if h := r.Ready.HTTP; h != nil {
			doc.Workload.Ready.HTTP = &guest.HTTPReady{Port: h.Port, Path: h.Path, Status: h.Status}
		}
		doc.Workload.Health = healthOf(vm.Health, guest.Ready{})
	}
	return doc, nil
}

// volumeMode is the mode of a fresh volume's root, which is the workload's user's.
const volumeMode = 0o750

// gatewayWorkload fills in what the OpenClaw profile makes of the declaration.
func gatewayWorkload(doc *guest.Document, vm *config.VM) error {
	w, err := gatewayProfile(vm.OpenClaw).Render()
	if err != nil {
		return fmt.Errorf("openclaw: %w", err)
	}
	for _, f := range w.Files {
		doc.Files = append(doc.Files, guest.File{Path: f.Path, Mode: f.Mode, UID: f.UID, GID: f.GID, Content: f.Content})
	}
	doc.Workload = &guest.Workload{
		Argv: w.Argv, Env: w.Env, User: w.User, Cwd: w.Cwd, Restart: vm.Restart, NoRestart: w.NoRestart,
		Ready: guest.Ready{HTTP: &guest.HTTPReady{Port: w.Ready.Port, Path: w.Ready.Path, Status: w.Ready.Status}},
		Stop:  guest.Stop{Timeout: int(gatewayStop / time.Second)},
	}
	doc.Workload.Health = healthOf(vm.Health, guest.Ready{
		HTTP: &guest.HTTPReady{Port: w.Health.Port, Path: w.Health.Path, Status: w.Health.Status},
	})
	return nil
}

// healthOf is the declaration's health check in the boot document; other is the
// check of one that names none.
func healthOf(h *config.Health, other guest.Ready) *guest.Health {
	if h == nil {
		return nil
	}
	check := guest.Ready{TCP: h.TCP, Exec: h.Exec}
	if h.HTTP != nil {
		check.HTTP = &guest.HTTPReady{Port: h.HTTP.Port, Path: h.HTTP.Path, Status: h.HTTP.Status}
	}
	if check.TCP == 0 && check.HTTP == nil && len(check.Exec) == 0 {
		check = other
	}
	return &guest.Health{
		Check: check, Interval: int(h.Interval / time.Second), Timeout: int(h.Timeout / time.Second), Retries: h.Retries, Restart: h.Restart,
	}
}

// gatewayProfile is the declaration's profile in the words of package openclaw.
func gatewayProfile(o *config.OpenClaw) openclaw.Profile {
	p := openclaw.Profile{
		Model: o.Model, Port: o.Port, Config: o.Config,
		Auth: openclaw.Auth{Mode: o.Auth.Mode, TokenFile: o.Auth.TokenFile},
	}
	if o.Telegram != nil {
		p.Telegram = &openclaw.Telegram{TokenFile: o.Telegram.TokenFile, AllowFrom: o.Telegram.AllowFrom}
	}
	for name, provider := range o.Providers {
		if p.Providers == nil {
			p.Providers = make(map[string]openclaw.Provider)
		}
		p.Providers[name] = openclaw.Provider{KeyFile: provider.KeyFile}
	}
	return p
}

// gatewayStop is how long the gateway may take to end: a second as a rule, and
// 325 s when it has a channel without a route, which nobody waits for; its state
// is in SQLite's write-ahead logs, which survive a kill.
const gatewayStop = 30 * time.Second

// startShares starts a virtiofsd for the image, for the secrets, and for each of
// the declaration's shares.
func (l *life) startShares(ctx context.Context) error {
	shares := []storage.Share{{Tag: storeTag, Source: l.image.Root, ReadOnly: true, Cache: storage.CacheAlways, XAttr: l.image.XAttrs}}
	if len(l.secrets) > 0 {
		// Never cached: a rotated secret is there at the next open.
		shares = append(shares, storage.Share{Tag: secretsTag, Source: l.paths.Secrets(), ReadOnly: true, Cache: storage.CacheNever})
	}
	for i, s := range l.vm.Shares {
		uid, gid, err := ownerOf(s.Source)
		if err != nil {
			return coded(ExitDeclaration, err)
		}
		shares = append(shares, storage.Share{
			Tag: fmt.Sprintf(shareTag, i), Source: s.Source, ReadOnly: s.ReadOnly, Cache: storage.CacheAuto,
			// What the workload writes there is the directory's owner's, never root's.
			SquashUID: uid, SquashGID: gid, GuestUID: l.user.uid, GuestGID: l.user.gid,
		})
	}
	l.machine.Shares, l.daemons, l.daemonLogs = nil, nil, nil
	for _, s := range shares {
		socket := l.layout.relative(filepath.Join(l.paths.VMM(), s.Tag+".sock"))
		s.Socket, s.OwnerUID, s.OwnerGID, s.Spawn = socket, l.ids.vmm, l.ids.vmm, l.spawnGuest
		log, words, err := l.openWordLog(l.paths.ShareLog(s.Tag))
		if err != nil {
			return err
		}
		s.Log = words
		d, err := l.virtiofsd.Serve(ctx, s)
		err = errors.Join(err, words.Close())
		if d != nil {
			l.daemons, l.daemonLogs = append(l.daemons, d), append(l.daemonLogs, log)
			l.undo.push("the server of share "+s.Tag, d.Stop)
		}
		if err != nil {
			return fmt.Errorf("share %s: %w", s.Tag, err)
		}
		l.machine.Shares = append(l.machine.Shares, vmm.Share{Tag: s.Tag, Socket: socket})
	}
	return nil
}

// ownerOf says whose a directory of the host is.
func ownerOf(dir string) (uid, gid int, err error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("cannot share %s: %w; make the directory, or take the share out of the declaration", dir, err)
	}
	return int(st.Uid), int(st.Gid), nil
}

// startVMM starts the VMM, and with it the guest.
func (l *life) startVMM(ctx context.Context) error {
	log, err := openLog(l.paths.VMMLog())
	if err != nil {
		return err
	}
	// Written until the VMM has ended, whose undo comes before this one.
	l.undo.push("the VMM's log", log.Close)
	l.machine.Log = log
	if !l.emulated && l.hostFacts.KVMGroup >= 0 {
		l.machine.Groups = []int{l.hostFacts.KVMGroup}
	}
	if l.vmmProgram.Name() == vmm.QEMU {
		if l.machine.TAPFile, err = network.OpenTAP(l.machine.TAP); err != nil {
			return err
		}
		defer l.machine.TAPFile.Close()
	}
	if l.machine.InstructionClock {
		l.note("VM", "no hardware virtualisation: the guest's clock counts instructions, and it has one vCPU")
	}
	if err := l.record(); err != nil {
		return err
	}
	l.undo.push("the care for the boot files", l.keepBoot())
	instance, err := l.vmmProgram.Start(ctx, &l.machine)
	if err != nil {
		return l.blameShares(err)
	}
	l.instance = instance
	l.undo.push("the VMM", func() error {
		err := instance.Kill()
		instance.Wait()
		return errors.Join(err, instance.Close())
	})
	// The console ends for the gate when the VMM, its only writer, does.
	return closeFile(l.sockets.console)
}

// blameShares adds to a VMM's error the virtiofsd that ended before it, which is
// why it could not connect.
func (l *life) blameShares(err error) error {
	for i, d := range l.daemons {
		select {
		case <-d.Done():
			why := fmt.Errorf("cannot serve a share: %w", d.Err())
			l.daemonLogs[i].await()
			said, terr := Tail(l.paths.ShareLog(l.machine.Shares[i].Tag), 1)
			if len(said) > 0 {
				why = fmt.Errorf("%w; its last words: %s", why, said[0])
			}
			err = errors.Join(why, err, terr)
		default:
		}
	}
	return err
}

// How long a guest may take from its start until its agent answers, and from
// there until its workload is ready.
const (
	guestLimit         = 60 * time.Second
	readyLimit         = 5 * time.Minute  // what starts slowly (the gateway takes 10 s) on a server with much to do
	emulatedGuestLimit = 5 * time.Minute  // 3 s alone; many at once share the processors
	emulatedReadyLimit = 20 * time.Minute // the gateway takes 5 min on an idle machine
)

// awaitGuest waits until the guest's agent answers.
func (l *life) awaitGuest(ctx context.Context) error {
	limit := guestLimit
	if l.emulated {
		limit = emulatedGuestLimit
	}
	return l.awaitMessage(ctx, gate.Connected, limit)
}

// awaitReady waits until the workload is ready.
func (l *life) awaitReady(ctx context.Context) error {
	limit := readyLimit
	if l.emulated {
		limit = emulatedReadyLimit
	}
	if r := l.vm.Run; r != nil && r.Ready.Timeout > 0 {
		limit = r.Ready.Timeout
	}
	return l.awaitMessage(ctx, gate.Ready, limit)
}
