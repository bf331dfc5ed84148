//! Disks of `hull run`: with and without the host's cache, as large and in such blocks as the host has them.

use std::os::unix::fs::FileExt;
use std::path::Path;

use fixture::devices::Loop;
use fixture::{Detached, Hull, busybox, hull, shell};

/// A sparse file of this size in MiB.
fn image(dir: &Path, name: &str, mib: u64) -> String {
    let path = dir.join(name);
    std::fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path.into_os_string().into_string().unwrap()
}

/// How many pages of a file the host has in its page cache.
fn cached(path: &str) -> usize {
    let program = "import ctypes, mmap, os, sys\n\
                   memory = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)\n\
                   pages = (ctypes.c_ubyte * (len(memory) // mmap.PAGESIZE))()\n\
                   at = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n\
                   assert ctypes.CDLL(None).mincore(ctypes.c_void_p(at), ctypes.c_size_t(len(memory)), pages) == 0\n\
                   print(sum(page & 1 for page in pages))";
    shell(&format!("python3 -c '{program}' {path}")).trim().parse().unwrap()
}

#[test]
fn the_host_caches_a_disk_unless_it_is_told_not_to() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (direct, usual) = (image(dir.path(), "direct", 4), image(dir.path(), "usual", 4));
    let write = |disk: &str| {
        format!("dd if=/dev/urandom of=/dev/{disk} bs=64k count=40 conv=fsync 2>/dev/null; md5sum </dev/{disk}; ")
    };
    let script = write("vda")
        + &write("vdb")
        + "dd if=/dev/vda of=/dev/null bs=4k 2>/dev/null; cat /sys/block/vda/queue/write_cache";
    let busybox = busybox();
    // With a root on a disk as well, which comes after them.
    let options = [
        "run",
        "--rm",
        "--memory",
        "128",
        "--storage-size",
        "32m",
        "--disk",
        &format!("{direct}:cache=none"),
        "--disk",
        &usual,
    ];
    let said = Hull::new(options.into_iter().chain([busybox.as_str(), "sh", "-c", &script])).run().ok();
    assert_eq!(cached(&direct), 0);
    assert!(cached(&usual) >= 640, "{} pages", cached(&usual));
    let sums = shell(&format!("md5sum <{direct}; md5sum <{usual}"));
    assert_eq!(said, format!("{sums}write back"));

    // A file system whose files are nothing but page cache.
    let ram = dir.path().join("ram");
    shell(&format!("mkdir {0} && mount -t ramfs ramfs {0} && truncate -s 1M {0}/disk", ram.display()));
    let disk = format!("{}/disk", ram.display());
    let said = hull(["run", "--rm", "--mount", &format!("type=disk,src={disk},cache=none"), &busybox, "true"]).run();
    shell(&format!("umount {}", ram.display()));
    said.failed(&[&disk, "has no O_DIRECT", "leave out cache=none"]);
}

#[test]
fn a_disk_has_the_hosts_blocks_and_grows_under_writes() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (backing, file) = (image(dir.path(), "backing", 4), image(dir.path(), "file", 4));
    let device = Loop::with_sectors(&backing, 4096);
    let writes = "while dd if=/dev/zero of=/dev/vda bs=4k count=32 conv=fsync 2>/dev/null; do echo >/written; usleep 20000; done; touch /failed";
    let disk = format!("{}:cache=none", device.0);
    let container =
        Detached::start(["--memory", "128", "--disk", &disk, "--disk", &file, &busybox(), "sh", "-c", writes]);
    let sh = |script: &str| container.exec(["sh", "-c", script]).run().ok();
    let blocks = sh(
        "cd /sys/block; for disk in vda vdb; do cd $disk/queue; cat logical_block_size physical_block_size minimum_io_size optimal_io_size; cd ../..; done",
    );
    assert_eq!(blocks, "4096\n4096\n4096\n0\n512\n4096\n4096\n0");

    // The device's growth is announced, the file's is not.
    shell(&format!("truncate -s 8M {backing} {file}; losetup --set-capacity {}", device.0));
    let size = sh("cd /sys/block; until [ $(cat vda/size) = 16384 ]; do usleep 10000; done; cat vdb/size");
    let grown = |disk: &str| hull(["disk", "resize", &container.id, disk]).run();
    assert_eq!((size, grown(&file).ok()), ("8192".to_owned(), "8388608".to_owned()));
    assert_eq!(grown("/dev/vda").ok(), "8388608", "a disk that has its size already");
    let sizes =
        sh("for disk in vda vdb; do printf end | dd of=/dev/$disk bs=4k seek=2047 conv=sync,fsync 2>/dev/null; done
         rm /written; blockdev --getsize64 /dev/vda; blockdev --getsize64 /dev/vdb");
    assert_eq!(sizes, "8388608\n8388608");
    let mut end = [0; 3];
    for path in [&backing, &file] {
        std::fs::File::open(path).unwrap().read_exact_at(&mut end, 2047 * 4096).unwrap();
        assert_eq!(&end, b"end", "{path}");
    }

    shell(&format!("truncate -s 4M {file}"));
    grown("vdb").failed(&["4194304", "8388608", "cannot shrink"]);
    grown("vdc").failed(&["no disk vdc", &file]);
    sh("until [ -e /written ]; do usleep 10000; done; [ ! -e /failed ]");
}
