# clawvm's front door. `make up` on a fresh Debian 12 or 13, as root, ends with
# an OpenClaw gateway that answers; everything of it but packages, the bridge and
# the packet filter rules is below ./.clawvm.

ROOT    ?= $(CURDIR)/.clawvm
CLAWVM  := bin/clawvm --root $(ROOT)
VM      ?= openclaw
PREFIX  ?= /usr
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)

GO      := scripts/go

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

install: build
	install -D -m 0755 bin/clawvm $(DESTDIR)$(PREFIX)/bin/clawvm
	install -D -m 0755 bin/clawvm-init $(DESTDIR)$(PREFIX)/lib/clawvm/clawvm-init
	install -D -m 0644 examples/openclaw.yaml $(DESTDIR)$(PREFIX)/share/doc/clawvm/examples/openclaw.yaml
	install -d -m 0755 $(DESTDIR)/etc/clawvm/vms
	test -e $(DESTDIR)/etc/clawvm/vms/openclaw.yaml || install -m 0644 examples/openclaw.yaml $(DESTDIR)/etc/clawvm/vms/openclaw.yaml

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/clawvm $(DESTDIR)$(PREFIX)/lib/clawvm/clawvm-init
	rm -rf $(DESTDIR)$(PREFIX)/share/doc/clawvm

clean:
	rm -rf bin
