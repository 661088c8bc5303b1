# clawvm's front door. `make up` on a fresh Debian 12 or 13, as root, ends with
# an OpenClaw gateway that answers; everything of it but packages, the bridge and
# the packet filter rules is below ./.clawvm.

ROOT    ?= $(CURDIR)/.clawvm
CLAWVM  := bin/clawvm --root $(ROOT)
VM      ?= openclaw
PREFIX  ?= /usr
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)

GO      := scripts/go

# Where an installed clawvm lies. NetworkManager reads its own prefix only.
UNITS           ?= $(PREFIX)/lib/systemd/system
NETWORKD        ?= $(PREFIX)/lib/systemd/network
NETWORKMANAGER  ?= $(if $(filter /usr,$(PREFIX)),/usr/lib,/etc)/NetworkManager/conf.d
DOCDIR          ?= $(PREFIX)/share/doc/clawvm
BASH_COMPLETION ?= $(PREFIX)/share/bash-completion/completions/clawvm
ZSH_COMPLETION  ?= $(PREFIX)/share/zsh/site-functions/_clawvm
FISH_COMPLETION ?= $(PREFIX)/share/fish/vendor_completions.d/clawvm.fish

.PHONY: up down build test check bench fuzz soak install uninstall clean

up: build
	scripts/setup run
	$(CLAWVM) kernel pull --missing
	$(CLAWVM) image build openclaw
	$(CLAWVM) up examples/$(VM).yaml

down:
	$(CLAWVM) down $(VM)

build:
	scripts/setup build
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ ./cmd/...

test:
	scripts/setup test
	scripts/test

check:
	scripts/setup build
	scripts/check

fuzz:
	scripts/setup test
	scripts/fuzz

soak:
	scripts/setup test
	scripts/soak

bench: build
	scripts/setup test
	scripts/bench

# What an installed file needs to know of where the others are.
PLACES = sed -e 's,@BINDIR@,$(PREFIX)/bin,g' -e 's,@DOCDIR@,$(DOCDIR),g'

install: build
	install -D -m 0755 bin/clawvm $(DESTDIR)$(PREFIX)/bin/clawvm
	install -D -m 0755 bin/clawvm-init $(DESTDIR)$(PREFIX)/lib/clawvm/clawvm-init
	install -d -m 0755 $(addprefix $(DESTDIR),$(UNITS) $(UNITS)/multi-user.target.wants $(NETWORKD) $(NETWORKMANAGER) $(DOCDIR)/examples $(dir $(BASH_COMPLETION) $(ZSH_COMPLETION) $(FISH_COMPLETION)))
	for f in clawvm@.service clawvm.target clawvm.slice; do \
		$(PLACES) integration/units/$$f >$(DESTDIR)$(UNITS)/$$f && chmod 0644 $(DESTDIR)$(UNITS)/$$f || exit 1; done
	ln -sfn ../clawvm.target $(DESTDIR)$(UNITS)/multi-user.target.wants/clawvm.target
	install -m 0644 integration/units/network/05-clawvm.network $(DESTDIR)$(NETWORKD)/
	install -m 0644 integration/units/NetworkManager/90-clawvm.conf $(DESTDIR)$(NETWORKMANAGER)/
	bin/clawvm completion bash >$(DESTDIR)$(BASH_COMPLETION)
	bin/clawvm completion zsh >$(DESTDIR)$(ZSH_COMPLETION)
	bin/clawvm completion fish >$(DESTDIR)$(FISH_COMPLETION)
	install -m 0644 README.md docs/*.md $(DESTDIR)$(DOCDIR)/
	install -m 0644 examples/openclaw.yaml $(DESTDIR)$(DOCDIR)/examples/openclaw.yaml
	install -d -m 0755 $(DESTDIR)/etc/clawvm/vms
	test -e $(DESTDIR)/etc/clawvm/vms/openclaw.yaml || install -m 0644 examples/openclaw.yaml $(DESTDIR)/etc/clawvm/vms/openclaw.yaml
	@test -n "$(DESTDIR)" || test ! -d /run/systemd/system || systemctl daemon-reload

uninstall:
	@if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then \
		up=$$(systemctl list-units --no-legend --plain 'clawvm@*' | cut -d' ' -f1); \
		if [ -n "$$up" ]; then echo "uninstall: these run, and could not be taken down in order after it: "$$up; \
			echo "uninstall: \`clawvm down\` and \`clawvm disable\` them, and \`clawvm gc --all\`, then try again"; exit 1; fi; fi
	rm -f $(addprefix $(DESTDIR),$(PREFIX)/bin/clawvm $(PREFIX)/lib/clawvm/clawvm-init \
		$(UNITS)/clawvm@.service $(UNITS)/clawvm.target $(UNITS)/clawvm.slice $(UNITS)/multi-user.target.wants/clawvm.target \
		$(NETWORKD)/05-clawvm.network $(NETWORKMANAGER)/90-clawvm.conf \
		$(BASH_COMPLETION) $(ZSH_COMPLETION) $(FISH_COMPLETION))
	rm -rf $(DESTDIR)$(DOCDIR)
	-rmdir $(DESTDIR)$(PREFIX)/lib/clawvm
	@test -n "$(DESTDIR)" || test ! -d /run/systemd/system || systemctl daemon-reload
	@for d in etc/clawvm var/lib/clawvm var/log/clawvm var/cache/clawvm; do \
		if [ -e $(DESTDIR)/$$d ]; then echo "uninstall: $(DESTDIR)/$$d is left; it is yours"; fi; done
	@for l in $(DESTDIR)/etc/systemd/system/*.wants/clawvm@*.service; do \
		if [ -L "$$l" ]; then echo "uninstall: $$l is left, of a VM that is enabled"; fi; done

clean:
	rm -rf bin
