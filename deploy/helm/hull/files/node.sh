#!/bin/sh
# Installs Hull on a node, or removes it:
#   node.sh install SOURCE HOST
#   node.sh remove SOURCE HOST
# SOURCE holds what `make install DESTDIR=SOURCE PREFIX=/usr/local` put there; HOST is the node's root directory. Both may be
# repeated: what is right already is left alone, and containerd is restarted only when its configuration has changed.
#
# In the environment: CONTAINERD_CONFIG, its path on the node; CONTAINERD_RESTART, the command that restarts it, run in HOST;
# HULL_SETTINGS, a file that becomes Hull's drop-in where it has any text; NODE_CHROOT, what runs a command in HOST.
set -eu

PREFIX=/usr/local
FILES="bin/hull bin/containerd-shim-hull-v2 libexec/hull/hull-vmm share/hull/vmlinux share/hull/guest.img
share/hull/config.example.toml"
LINK=bin/containerd-shim-kata-v2
SETTINGS=/etc/hull/config.d/50-helm.toml
BEGIN='# BEGIN hull: written by its installer, which also removes it'
END='# END hull'

fail() {
	echo "node.sh: $*" >&2
	exit 1
}

[ $# = 3 ] || fail "usage: node.sh install|remove SOURCE HOST"
action=$1 source=$2 host=${3%/}
[ -d "$source" ] || fail "$source is no directory"
[ -d "$host/" ] || fail "$host is no directory"
config=$host${CONTAINERD_CONFIG:-/etc/containerd/config.toml}
new=$config.hull-new
# There from before the configuration changes until containerd has been restarted for it: whatever comes between, and a restart that
# fails, is made up for by the next call.
pending=$config.hull-restart
trap 'rm -f "$new"' EXIT
restart=${CONTAINERD_RESTART:-systemctl restart containerd}

in_host() {
	${NODE_CHROOT:-chroot} "$host/" "$@"
}

# put FILE PLACE: makes PLACE the same as FILE, in one step, so that who runs or maps the old file keeps it.
put() {
	cmp -s "$1" "$2" && return
	mkdir -p "${2%/*}"
	cp -p "$1" "$2.hull-new"
	mv -f "$2.hull-new" "$2"
	echo "installed $2"
}

# without_block FILE: prints it as it was before this script.
without_block() {
	awk -v begin="$BEGIN" -v end="$END" '$0 == begin { skip = 1 } !skip { print } $0 == end { skip = 0 }' "$1"
}

# The version of containerd's configuration, which decides what its parts are called.
config_version() {
	if [ -e "$config" ]; then
		version=$(sed -n 's/^[[:space:]]*version[[:space:]]*=[[:space:]]*\([0-9][0-9]*\).*/\1/p' "$config" | head -n 1)
		echo "${version:-1}"
		return
	fi
	case $(in_host containerd --version | awk '{ print $3 }') in
	1.* | v1.*) echo 2 ;;
	2.* | v2.*) echo 3 ;;
	*) fail "containerd on the node does not tell its version" ;;
	esac
}

# block VERSION FILE: the handler, for a configuration of this version, in a file that has the rest of it. containerd 1.7 forgets
# its own default handler when it is told of any other.
block() {
	case $1 in
	2) plugin=io.containerd.grpc.v1.cri ;;
	3) plugin=io.containerd.cri.v1.runtime ;;
	*) fail "$config has version $1; Hull needs version 2 or 3 of it" ;;
	esac
	echo "$BEGIN"
	[ -s "$2" ] || echo "version = $1"
	if ! grep -q 'runtimes[".]*runc' "$2"; then
		echo "[plugins.\"$plugin\".containerd.runtimes.runc]"
		echo '  runtime_type = "io.containerd.runc.v2"'
	fi
	echo "[plugins.\"$plugin\".containerd.runtimes.kata]"
	echo '  runtime_type = "io.containerd.hull.v2"'
	echo '  pod_annotations = ["io.katacontainers.*"]'
	[ "$1" = 2 ] || echo '  sandboxer = "shim"'
	echo "$END"
}

# set_config: puts the new configuration in the old one's place, if it differs and containerd can read it.
set_config() {
	if [ -e "$config" ] && cmp -s "$new" "$config"; then
		return
	fi
	if [ -s "$new" ]; then
		in_host containerd --config "${new#"$host"}" config dump >/dev/null ||
			fail "containerd does not take the new configuration; $config is as it was"
		: >"$pending"
		mv -f "$new" "$config"
	else
		: >"$pending"
		rm -f "$config"
	fi
	echo "changed $config"
}

# restart_containerd: if it does not run with its configuration yet.
restart_containerd() {
	[ -e "$pending" ] || return 0
	# Words are split: it is a command with arguments.
	# shellcheck disable=SC2086
	in_host $restart || return 1
	rm -f "$pending"
	echo "restarted containerd"
}

install() {
	if [ -s "${HULL_SETTINGS:-/dev/null}" ]; then
		"$source$PREFIX/bin/hull" config check "$HULL_SETTINGS" || fail "these settings are wrong; nothing was changed"
	fi
	for file in $FILES; do
		[ -e "$source$PREFIX/$file" ] || fail "$source$PREFIX/$file is missing"
	done
	if [ -e "$host$PREFIX/$LINK" ] && [ ! -L "$host$PREFIX/$LINK" ]; then
		fail "$host$PREFIX/$LINK is there and not Hull's; remove Kata Containers first"
	fi
	mkdir -p "${config%/*}"
	version=$(config_version)
	if [ -e "$config" ]; then
		# For its owner and mode.
		cp -p "$config" "$new"
		without_block "$config" >"$new"
	else
		: >"$new"
	fi
	# Whoever has a handler `kata` of their own has set it up on purpose.
	if grep -q 'runtimes[".]*kata"*\]' "$new"; then
		fail "$config has a handler kata of its own; remove it first"
	fi
	handler=$(block "$version" "$new")
	echo "$handler" >>"$new"
	for file in $FILES; do
		put "$source$PREFIX/$file" "$host$PREFIX/$file"
	done
	ln -sfn containerd-shim-hull-v2 "$host$PREFIX/$LINK"
	if [ -s "${HULL_SETTINGS:-/dev/null}" ]; then
		put "$HULL_SETTINGS" "$host$SETTINGS"
	else
		rm -f "$host$SETTINGS"
	fi
	set_config
	restart_containerd || fail "containerd was not restarted: \`$restart\` failed; the handler is not there yet"
}

remove() {
	if [ -e "$config" ] && grep -qxF "$BEGIN" "$config"; then
		cp -p "$config" "$new"
		without_block "$config" >"$new"
		set_config
	fi
	# Before the files go, so that no pod is sent to a shim that is gone; but whether or not it succeeds, nobody comes after this to
	# take them away.
	restarted=yes
	restart_containerd || restarted=no
	rm -f "$pending"
	for file in $FILES $LINK; do
		rm -f "$host$PREFIX/$file"
	done
	for dir in libexec/hull share/hull; do
		rmdir "$host$PREFIX/$dir" 2>/dev/null || true
	done
	rm -f "$host$SETTINGS"
	rmdir "$host${SETTINGS%/*}" "$host/etc/hull" 2>/dev/null || true
	echo "removed"
	[ $restarted = yes ] || fail "containerd was not restarted: \`$restart\` failed; it has the handler until it is"
}

case $action in
install | remove) "$action" ;;
*) fail "there is no action $action; there are install and remove" ;;
esac
