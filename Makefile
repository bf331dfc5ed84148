# Hull: containers in virtual machines of their own.
#
#   make run [ARGS='…']   run a program from an image in a microVM
#   make test             run every test
#
# `make help` lists the rest. Every target installs the Debian packages that it needs.

SHELL := /bin/bash
PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
ARGS ?=

TARGET := x86_64-unknown-linux-gnu
RELEASE := $(abspath $(or $(CARGO_TARGET_DIR),target))/release
AGENT := $(abspath $(or $(CARGO_TARGET_DIR),target))/$(TARGET)/release/hull-agent
STAGE := build/stage
INSTALLED := $(RELEASE)/hull $(RELEASE)/hull-vmm $(RELEASE)/containerd-shim-hull-v2 build/kernel/vmlinux build/guest.img

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

.PHONY: build
build: host kernel guest-image ## build everything that is installed

.PHONY: host
host: packages ## the programs of the host: hull, hull-vmm, the containerd shim
	$(CARGO) build --release --locked -p hull -p hull-vmm -p containerd-shim-hull-v2

.PHONY: agent
agent: packages ## the guest's agent, a static binary
	# Size counts: what is touched of it at each boot is a page fault a page. These two take it from 7.7 to 5.1 MB.
	CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS='-C target-feature=+crt-static -C relocation-model=static' \
		CARGO_PROFILE_RELEASE_OPT_LEVEL=z \
		LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/x86_64-linux-gnu \
		$(CARGO) build --release --locked -p hull-agent --target $(TARGET)

.PHONY: kernel
kernel: ## the guest's kernel
	guest-kernel-config/build

.PHONY: guest-image
guest-image: agent ## the guest's image, with the agent in it
	rootfs/build $(AGENT) build/guest.img

.PHONY: image
image: ## the OCI images that `make run` and the tests use, in build/images
	rootfs/build-image

.PHONY: packages
packages:
	@scripts/apt-install gcc libc6-dev libseccomp-dev pkg-config

.PHONY: install
install: ## copy what was built to DESTDIR/PREFIX
	@for file in $(INSTALLED); do \
		[ -e "$$file" ] || { echo "make install: $$file is missing; run \`make build\` first" >&2; exit 1; }; done
	install -D -m 0755 -t $(DESTDIR)$(PREFIX)/bin $(RELEASE)/hull $(RELEASE)/containerd-shim-hull-v2
	# A cluster set up for Kata finds Hull under the name it knows.
	ln -sfn containerd-shim-hull-v2 $(DESTDIR)$(PREFIX)/bin/containerd-shim-kata-v2
	install -D -m 0755 -t $(DESTDIR)$(PREFIX)/libexec/hull $(RELEASE)/hull-vmm
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/share/hull build/kernel/vmlinux build/guest.img deploy/config.example.toml

.PHONY: uninstall
uninstall: ## remove what `make install` copied
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,hull containerd-shim-hull-v2 containerd-shim-kata-v2)
	rm -rf $(DESTDIR)$(PREFIX)/libexec/hull $(DESTDIR)$(PREFIX)/share/hull

.PHONY: node-image
node-image: build ## the image of the Helm chart's DaemonSet, in build/images/hull-node
	rm -rf build/stage-node
	$(MAKE) -s install DESTDIR=build/stage-node PREFIX=/usr/local
	deploy/build-image build/stage-node build/images/hull-node

.PHONY: lab
lab: host # what stands in for hardware KVM where there is none
	@scripts/has-kvm || lab/build >/dev/null

# Side by side, because of each the longest parts (linking, unpacking packages) keep one CPU busy.
.PHONY: ready
ready:
	@$(MAKE) --no-print-directory -j build image lab

.PHONY: run
run: ready ## run a program in a microVM; ARGS go to `hull run`
	@scripts/run-example $(ARGS)

.PHONY: check
check: packages ## format, lints, licences and versions of dependencies, documentation
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	scripts/check-dependencies
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --locked --document-private-items

.PHONY: test
test: ## run every test
	@$(MAKE) --no-print-directory -j build image lab test-programs
	tests/run

# All with `--workspace`: of a part of it, cargo would build what it depends on anew, with fewer features.
.PHONY: test-programs
test-programs: packages
	$(CARGO) test --workspace --locked --no-run
	$(CARGO) test --workspace --locked --test system --no-run

.PHONY: bench
bench: ready ## measure in the lab; writes build/bench.json; FIRECRACKER=, CLOUD_HYPERVISOR= to compare with
	bench/run

.PHONY: clean
clean: ## remove what was built here, but for the cache shared by checkouts
	rm -rf build
	$(CARGO) clean
