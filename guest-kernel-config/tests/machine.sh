# The board: CPUs, memory and devices that come, go and report.

three_more_cpus_come_online() {
	[ "$(nproc --all)" = 4 ] || [ "$(cat /sys/devices/system/cpu/present)" = 0-3 ]
	[ "$(cat /sys/devices/system/cpu/online)" = 0 ]
	for n in 1 2 3; do echo 1 >/sys/devices/system/cpu/cpu$n/online; done
	[ "$(cat /sys/devices/system/cpu/online)" = 0-3 ]
	echo 0 >/sys/devices/system/cpu/cpu3/online
}
virtio_mem_has_plugged_memory() {
	[ "$(awk '/MemTotal/ { print $2 }' /proc/meminfo)" -gt 650000 ]
}
pmem_is_a_disk_with_dax() {
	[ -b /dev/pmem0 ]
	mkfs.ext4 -q -b 4096 /dev/pmem0
	mkdir -p /tmp/m
	mount -o dax=always /dev/pmem0 /tmp/m
	grep -q 'dax=always' /proc/mounts
}
hardware_random_numbers() {
	grep -q virtio /sys/class/misc/hw_random/rng_available
	[ "$(head -c 16 /dev/hwrng | wc -c)" = 16 ]
}
balloon_reports_free_pages() {
	grep -l 0x0005 /sys/bus/virtio/devices/*/device
	[ -e /sys/module/page_reporting/parameters/page_reporting_order ]
}
virtio_console_writes() {
	echo "console works" >/dev/hvc0
	sleep 1
}
pci_rescan_finds_a_removed_disk() {
	device=$(readlink -f /sys/block/vdb/device/../..)
	grep -q '^/dev/vdb' /proc/mounts
	net=$(readlink -f /sys/class/net/eth0/device/..)
	echo 1 >"$net/remove"
	[ ! -e /sys/class/net/eth0 ]
	echo 1 >/sys/bus/pci/rescan
	sleep 1
	[ -e /sys/class/net/eth0 ]
	[ -n "$device" ]
}
interrupts_are_msix() {
	grep -q 'PCI-MSIX.*virtio' /proc/interrupts
}
huge_pages_on_request() {
	# The kernel itself turns them off on a machine that boots with less than 512 MiB; the agent may turn them on.
	echo madvise >/sys/kernel/mm/transparent_hugepage/enabled
	grep -F '[madvise]' /sys/kernel/mm/transparent_hugepage/enabled
}
boot_config_is_readable() {
	zcat /proc/config.gz | grep -q CONFIG_VIRTIO_MEM=y
}
no_modules_and_no_physical_memory() {
	[ ! -e /proc/modules ]
	[ ! -e /dev/mem ]
	[ ! -e /dev/port ]
}
