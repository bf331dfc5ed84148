//! Bare microVMs of somebody's own kernel.

use std::fs;
use std::path::{Path, PathBuf};

use fixture::{Said, busybox, hull, installed};

/// An initial RAM file system of busybox and a script that is its init.
fn initrd(dir: &Path, script: &str) -> PathBuf {
    // The image's own busybox, which is static.
    let volume = format!("{}:/out", dir.display());
    hull(["run", "--rm", "--memory", "128", "-v", &volume, &busybox(), "cp", "/bin/busybox", "/out/"]).run().ok();
    let program = fs::read(dir.join("busybox")).unwrap();
    let script = format!(
        "#!/busybox sh
         /busybox mkdir /bin /proc /dev /mnt
         /busybox --install -s /bin
         export PATH=/bin
         mount -t proc proc /proc
         mount -t devtmpfs dev /dev
         {script}
         poweroff -f\n"
    );
    let mut archive = Vec::new();
    for (name, mode, contents) in
        [("busybox", 0o100_755, &program[..]), ("init", 0o100_755, script.as_bytes()), ("TRAILER!!!", 0, b"")]
    {
        entry(&mut archive, name, mode, contents);
    }
    let path = dir.join("initrd");
    fs::write(&path, archive).unwrap();
    path
}

/// Adds an entry in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst).
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, contents: &[u8]) {
    let inode = u32::try_from(archive.len()).unwrap() + 1;
    let size = u32::try_from(contents.len()).unwrap();
    let name_size = u32::try_from(name.len()).unwrap() + 1;
    archive.extend(b"070701");
    for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        archive.extend(format!("{field:08x}").bytes());
    }
    for part in [[name.as_bytes(), b"\0"].concat().as_slice(), contents] {
        archive.extend(part);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
}

fn boot(initrd: &Path, more: &[&str]) -> Said {
    let kernel = installed("share/hull/vmlinux");
    let mut args = vec!["boot", "--kernel", &kernel, "--initrd", initrd.to_str().unwrap(), "--memory", "128"];
    args.extend_from_slice(more);
    fixture::Hull::new(args).run()
}

#[test]
fn a_kernel_of_ones_own_runs_until_it_powers_off() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let initrd = initrd(dir.path(), "echo cpus $(nproc) words $(cat /proc/cmdline)");
    let said = boot(&initrd, &["--cpus", "2", "--cmdline", "console=hvc0 quiet panic=-1 mine"]);
    let text = said.text();
    assert!(text.contains("cpus 2 words") && text.contains(" mine"), "{text}{}", said.stderr);
    assert_eq!((said.code, said.stderr.as_str()), (0, ""));
}

#[test]
fn a_disk_keeps_what_was_written_and_may_be_read_only() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let disk = dir.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let disk = disk.to_str().unwrap();
    let quiet = ["--cmdline", "console=hvc0 quiet panic=-1", "--disk"];

    let write = initrd(
        dir.path(),
        "mke2fs -F /dev/vda >/dev/null && mount -t ext4 /dev/vda /mnt && head -c 8000000 /dev/urandom >/mnt/noise
         cd /mnt && sha256sum noise | tee sum; cd /; umount /mnt && echo written",
    );
    let said = boot(&write, &[&quiet[..], &[disk]].concat()).ok();
    let sum = said.split_whitespace().next().unwrap().to_owned();
    assert!(said.ends_with("written"), "{said}");

    let read = initrd(
        dir.path(),
        "mount -t ext4 -o ro /dev/vda /mnt && cd /mnt && sha256sum -c sum && cat sum; cat /sys/block/vda/ro
         dd if=/dev/zero of=/dev/vda count=1 2>/dev/null || echo refused",
    );
    let read_only = format!("{disk}:ro");
    let said = boot(&read, &[&quiet[..], &[&read_only]].concat()).ok();
    assert!(said.contains("noise: OK") && said.contains(&sum) && said.contains("refused"), "{said}");
}

#[test]
fn how_a_kernel_ended_is_told() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let init = initrd(dir.path(), "echo c >/proc/sysrq-trigger; sleep 100");
    let said = boot(&init, &[]);
    assert_eq!(said.code, 125, "{}", said.text());
    assert!(said.stderr.contains("panic"), "{}", said.stderr);
    let init = initrd(dir.path(), "reboot -f");
    let said = boot(&init, &[]);
    assert!(said.code == 125 && said.stderr.contains("reset itself"), "{} {}", said.code, said.stderr);
}
