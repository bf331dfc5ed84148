# File systems and block devices: made, mounted, used.

# _image MIB: an empty file on the disk, since loop devices on tmpfs would not show direct I/O.
_image() {
	mkdir -p /var/tmp/t
	rm -f /var/tmp/t/image
	truncate -s "$1M" /var/tmp/t/image
	mkdir -p /tmp/m
}

ext4_with_acl_and_xattr() {
	_image 64
	mkfs.ext4 -q /var/tmp/t/image
	mount -o loop /var/tmp/t/image /tmp/m
	python3 -c 'import os; open("/tmp/m/f", "w"); [os.setxattr("/tmp/m/f", n, b"v") for n in ("user.a", "trusted.a", "security.a")]
os.setxattr("/tmp/m/f", "system.posix_acl_access", bytes.fromhex("0200000001000600ffffffff02000400e803000004000400ffffffff10000600ffffffff20000400ffffffff"))'
}
ext2_through_ext4() {
	_image 16
	mkfs.ext2 -q /var/tmp/t/image
	mount -t ext2 -o loop /var/tmp/t/image /tmp/m
}
project_quota_of_ext4() {
	grep -q prjquota /proc/mounts
}
xfs_with_quota() {
	_image 512
	mkfs.xfs -q /var/tmp/t/image
	mount -o loop,pquota,uquota /var/tmp/t/image /tmp/m
	xfs_quota -x -c 'limit -p bhard=1m 42' /tmp/m
}
overlay_on_ext4() {
	mkdir -p /var/tmp/l /var/tmp/u /var/tmp/w /tmp/m
	echo lower >/var/tmp/l/f
	mount -t overlay -o lowerdir=/var/tmp/l,upperdir=/var/tmp/u,workdir=/var/tmp/w,metacopy=on,index=on overlay /tmp/m
	echo upper >/tmp/m/f
	[ "$(cat /var/tmp/l/f) $(cat /var/tmp/u/f)" = "lower upper" ]
}
overlay_in_a_user_namespace() {
	unshare -Urm sh -euc 'mkdir -p /tmp/o && mount -t tmpfs t /tmp/o && cd /tmp/o && mkdir l u w m &&
		mount -t overlay -o lowerdir=l,upperdir=u,workdir=w,userxattr overlay m && touch m/f && [ -e u/f ]'
}
erofs_with_every_compression() {
	for z in "" -zlz4 -zlzma -zdeflate -zzstd; do
		mkdir -p /tmp/m
		rm -f /var/tmp/e
		mkfs.erofs --quiet $z /var/tmp/e /usr/lib/python3 >/dev/null
		mount -t erofs -o loop /var/tmp/e /tmp/m
		diff -r /usr/lib/python3 /tmp/m
		umount /tmp/m
	done
}
erofs_from_a_file_without_loop() {
	mkdir -p /tmp/m
	rm -f /var/tmp/e
	mkfs.erofs --quiet /var/tmp/e /etc >/dev/null
	mount -t erofs /var/tmp/e /tmp/m
}
squashfs_with_every_compression() {
	for z in gzip lz4 lzo xz zstd; do
		mkdir -p /tmp/m
		rm -f /var/tmp/s
		mksquashfs /usr/lib/python3 /var/tmp/s -quiet -no-progress -comp $z >/dev/null
		mount -t squashfs -o loop /var/tmp/s /tmp/m
		diff -r /usr/lib/python3 /tmp/m
		umount /tmp/m
	done
}
tmpfs_with_acl_xattr_and_quota() {
	mkdir -p /tmp/m
	mount -t tmpfs -o usrquota,huge=within_size tmpfs /tmp/m
	python3 -c 'import os; open("/tmp/m/f", "w"); os.setxattr("/tmp/m/f", "user.a", b"v"); os.setxattr("/tmp/m/f", "trusted.a", b"v")'
}
iso_and_vfat_are_known() {
	grep -qw iso9660 /proc/filesystems
	grep -qw vfat /proc/filesystems
}
fuse_and_virtiofs_are_known() {
	[ -c /dev/fuse ]
	grep -qw fuse /proc/filesystems
	grep -qw virtiofs /proc/filesystems
	[ -c /dev/cuse ]
}
hugetlbfs_holds_a_page() {
	echo 2 >/proc/sys/vm/nr_hugepages
	mkdir -p /tmp/m
	mount -t hugetlbfs h /tmp/m
	python3 -c 'import mmap, os; f = os.open("/tmp/m/f", os.O_RDWR | os.O_CREAT); os.ftruncate(f, 2 << 20); mmap.mmap(f, 2 << 20)[0] = 1'
}
binfmt_misc_runs_a_format() {
	mkdir -p /tmp/m
	mount -t binfmt_misc b /tmp/m
	echo ':t:M::HULLTEST::/bin/cat:' >/tmp/m/register
	echo HULLTEST >/tmp/f
	chmod +x /tmp/f
	[ "$(/tmp/f)" = HULLTEST ]
}
swap_counts_in_cgroups() {
	rm -f /var/tmp/swap
	dd if=/dev/zero of=/var/tmp/swap bs=1M count=16 2>/dev/null
	chmod 600 /var/tmp/swap
	mkswap /var/tmp/swap >/dev/null
	swapon /var/tmp/swap
	swapoff /var/tmp/swap
}
resize2fs_on_a_mounted_device() {
	_image 64
	mkfs.ext4 -q /var/tmp/t/image 32M
	loop=$(losetup -f --show /var/tmp/t/image)
	mount "$loop" /tmp/m
	resize2fs "$loop"
}
