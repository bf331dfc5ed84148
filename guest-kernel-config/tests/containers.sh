# What a container runtime sets up.

every_namespace() {
	unshare -m -u -i -n -p -f -U -r -C -T true
	for ns in cgroup ipc mnt net pid time user uts; do [ -e /proc/self/ns/$ns ]; done
}
every_controller() {
	for c in cpuset cpu io memory hugetlb pids rdma misc; do grep -qw $c /sys/fs/cgroup/cgroup.controllers; done
	echo '+cpuset +cpu +io +memory +hugetlb +pids +rdma +misc' >/sys/fs/cgroup/cgroup.subtree_control
	mkdir -p /sys/fs/cgroup/t
	cd /sys/fs/cgroup/t || exit
	for f in cpu.max cpu.weight cpu.pressure io.max io.weight io.latency io.pressure memory.max memory.high memory.swap.max \
		memory.peak memory.pressure memory.oom.group pids.max hugetlb.2MB.max cpuset.cpus rdma.max misc.max \
		cgroup.freeze cgroup.kill; do
		[ -e $f ] || { echo "no $f"; false; }
	done
	echo '50000 100000' >cpu.max
	echo 10M >memory.max
}
memory_limit_kills_and_is_counted() {
	mkdir -p /sys/fs/cgroup/oom
	echo 20M >/sys/fs/cgroup/oom/memory.max
	echo 0 >/sys/fs/cgroup/oom/memory.swap.max
	! sh -c 'echo $$ >/sys/fs/cgroup/oom/cgroup.procs; exec python3 -c "bytearray(200 << 20)"'
	grep -q 'oom_kill [1-9]' /sys/fs/cgroup/oom/memory.events
}
pid_limit_holds() {
	mkdir -p /sys/fs/cgroup/pids
	echo 3 >/sys/fs/cgroup/pids/pids.max
	! sh -c 'echo $$ >/sys/fs/cgroup/pids/cgroup.procs; (sleep 1 & sleep 1 & sleep 1 & sleep 1 & wait)'
	grep -q 'max [1-9]' /sys/fs/cgroup/pids/pids.events
}
freezer_freezes() {
	mkdir -p /sys/fs/cgroup/fr
	sleep 60 &
	echo $! >/sys/fs/cgroup/fr/cgroup.procs
	echo 1 >/sys/fs/cgroup/fr/cgroup.freeze
	sleep 1
	grep -q 'frozen 1' /sys/fs/cgroup/fr/cgroup.events
	echo 1 >/sys/fs/cgroup/fr/cgroup.kill
}
pressure_is_measured() {
	grep -q some /proc/pressure/memory
}
block_io_limit() {
	mkdir -p /sys/fs/cgroup/io
	echo "$(cat /sys/block/vda/dev) rbps=1048576" >/sys/fs/cgroup/io/io.max
}
sysctls_that_kubernetes_sets() {
	for s in kernel/shm_rmid_forced kernel/msgmax kernel/sem kernel/shmmax fs/mqueue/msg_max fs/inotify/max_user_watches \
		net/ipv4/ip_local_port_range net/ipv4/tcp_syncookies net/ipv4/ping_group_range \
		net/ipv4/ip_unprivileged_port_start net/ipv4/tcp_keepalive_time net/core/somaxconn net/ipv4/tcp_rmem \
		net/netfilter/nf_conntrack_max user/max_user_namespaces vm/overcommit_memory vm/max_map_count vm/panic_on_oom \
		kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
		[ -e /proc/sys/$s ] || { echo "no $s"; false; }
	done
}
pty_and_terminal() {
	[ -c /dev/ptmx ]
	python3 -c 'import os; a, b = os.openpty(); os.write(a, b"x\n"); assert os.read(b, 9) == b"x\n"'
}
