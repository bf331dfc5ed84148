//! Roots that are disks: `hull run --rootfs FILE`, and `--storage-size`.

use std::path::{Path, PathBuf};

use fixture::devices::Loop;
use fixture::{Detached, Hull, busybox, hull, shell, traces_of};

/// Images of one root in several file systems; gone when dropped.
struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    /// A root with busybox alone.
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let root = dir.path().join("root");
        shell(&format!(
            "mkdir -p {root}/bin {root}/etc {root}/tmp {root}/dir && cp /usr/bin/busybox {root}/bin/ &&
             for name in $(busybox --list); do [ $name = busybox ] || ln -s busybox {root}/bin/$name; done &&
             echo from the image >{root}/etc/motd && printf 'root:x:0:0:root:/tmp:/bin/sh\\nweb:x:33:44::/dir:/bin/sh\\n' >{root}/etc/passwd &&
             echo 'log:x:4:web' >{root}/etc/group &&
             chmod 0751 {root} && chmod 1777 {root}/tmp",
            root = root.display()
        ));
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// The root in a new image of this type.
    fn make(&self, fstype: &str) -> String {
        let (root, image) = (self.root(), self.dir.path().join(fstype));
        let (root, path) = (root.display(), image.display());
        shell(&match fstype {
            "ext4" => format!("truncate -s 64M {path} && mkfs.ext4 -q -d {root} {path}"),
            "erofs" => format!("mkfs.erofs --quiet {path} {root} >/dev/null"),
            "squashfs" => format!("mksquashfs {root} {path} -quiet -no-progress >/dev/null"),
            "xfs" => format!(
                "truncate -s 320M {path} && mkfs.xfs -q {path} && mkdir {path}.m && mount -o loop {path} {path}.m &&
                 cp -a {root}/. {path}.m && umount {path}.m"
            ),
            other => panic!("{other}"),
        });
        image.into_os_string().into_string().unwrap()
    }
}

/// `hull run --rm` of a shell script with this root and options.
fn with_root(root: &str, options: &[&str], script: &str) -> Hull {
    let start = ["run", "--rm", "--memory", "128", "--rootfs", root];
    Hull::new(start.into_iter().chain(options.iter().copied()).chain(["sh", "-c", script]))
}

/// What an ext4 image holds at a path, as e2fsprogs reads it.
fn in_ext4(image: &str, path: &str) -> String {
    shell(&format!("debugfs -R 'cat {path}' {image} 2>/dev/null"))
}

#[test]
fn a_root_in_ext4_or_xfs_is_written_to() {
    let images = Images::new();
    for fstype in ["ext4", "xfs"] {
        let image = images.make(fstype);
        let script =
            "cat /etc/motd; echo $HOME; grep ' / ' /proc/mounts; echo changed >/dir/file; cat /etc/hostname | wc -l";
        let said = with_root(&image, &[], script).run().ok();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!((lines[0], lines[1], lines[3]), ("from the image", "/tmp", "1"), "{said}");
        assert!(lines[2].starts_with("/dev/vd") && lines[2].contains(&format!(" / {fstype} rw")), "{said}");
        // Not in a journal that is still to be replayed, either.
        let unclean = "dumpe2fs -h {} 2>/dev/null | grep -c needs_recovery".replace("{}", &image);
        if fstype == "ext4" {
            assert_eq!(in_ext4(&image, "/dir/file"), "changed\n");
            assert_eq!(shell(&format!("{unclean} || true")).trim(), "0");
        }
        assert_eq!(with_root(&image, &[], "cat /dir/file").run().ok(), "changed", "{fstype}");
    }
}

#[test]
fn a_root_in_erofs_or_squashfs_stays_as_it_is_below_what_is_written() {
    let images = Images::new();
    for fstype in ["erofs", "squashfs"] {
        let image = images.make(fstype);
        let before = std::fs::read(&image).unwrap();
        let script = "cat /etc/motd; stat -c %a /; echo new >/etc/motd && cat /etc/motd; rm -r /dir && ! test -e /dir; \
                      grep ' / ' /proc/mounts | cut -d' ' -f3";
        let said = with_root(&image, &[], script).run().ok();
        assert_eq!(said, "from the image\n751\nnew\noverlay", "{fstype}");
        assert_eq!(with_root(&image, &[], "cat /etc/motd; ls -d /dir").run().ok(), "from the image\n/dir", "{fstype}");
        assert!(std::fs::read(&image).unwrap() == before, "the image in {fstype} has changed");
    }
}

#[test]
fn a_block_device_is_a_root_and_has_one_user() {
    let images = Images::new();
    let image = images.make("ext4");
    let device = Loop::new(&image);
    let container = Detached::start(["--memory", "128", "--rootfs", &device.0, "sleep", "1000"]);
    container.exec(["sh", "-c", "echo changed >/dir/file; sync"]).run().ok();
    assert_eq!(container.exec(["-u", "7:8", "id", "-u"]).run().ok(), "7");
    let refused = |root: &str| with_root(root, &[], "true").run().failed(&[root, "in use"]);
    refused(&device.0);
    // The node's own mount counts as well.
    let id = container.id.clone();
    drop(container);
    assert!(traces_of(&id).is_empty(), "{:?}", traces_of(&id));
    let mounted = images.dir.path().join("m");
    shell(&format!("mkdir {0} && mount {1} {0}", mounted.display(), device.0));
    assert_eq!(std::fs::read_to_string(mounted.join("dir/file")).unwrap(), "changed\n");
    refused(&device.0);
    shell(&format!("umount {}", mounted.display()));
    assert_eq!(with_root(&device.0, &[], "cat /dir/file").run().ok(), "changed");
}

#[test]
fn users_are_looked_up_in_the_guest() {
    let images = Images::new();
    let erofs = images.make("erofs");
    let script = "id -u; id -g; id -G; echo $HOME; grep CapEff /proc/self/status";
    assert_eq!(with_root(&erofs, &["-u", "web"], script).run().ok(), "33\n44\n44 4\n/dir\nCapEff:\t0000000000000000");
    with_root(&erofs, &["-u", "nobody"], "true").run().failed(&["nobody", "numeric"]);
    let container = Detached::start(["--memory", "128", "-u", "web", "--rootfs", &erofs, "sleep", "1000"]);
    assert_eq!(container.exec(["id", "-u"]).run().ok(), "33");
    let change = "sed -i s/33:44/34:45/ /etc/passwd && id -u";
    assert_eq!(container.exec(["-u", "root", "sh", "-c", change]).run().ok(), "0");
    assert_eq!(container.exec(["-u", "web:log", "sh", "-c", "id -u; id -g; echo $HOME"]).run().ok(), "34\n4\n/dir");
    container.exec(["-u", "nobody", "true"]).run().failed(&["nobody", "numeric"]);
}

#[test]
fn a_file_has_one_container_that_writes_to_it_or_many_that_do_not() {
    let images = Images::new();
    let (ext4, erofs) = (images.make("ext4"), images.make("erofs"));
    let _writer = Detached::start(["--memory", "128", "--rootfs", &ext4, "sleep", "1000"]);
    with_root(&ext4, &[], "true").run().failed(&[&ext4, "in use"]);
    let _reader = Detached::start(["--memory", "128", "--rootfs", &erofs, "sleep", "1000"]);
    assert_eq!(with_root(&erofs, &[], "cat /etc/motd").run().ok(), "from the image");
}

#[test]
fn what_is_no_root_is_refused_with_a_remedy_and_leaves_nothing() {
    let images = Images::new();
    let dir = images.dir.path();
    let ext4 = images.make("ext4");
    let sandboxes = || {
        let entries = std::fs::read_dir("/run/hull").into_iter().flatten().flatten();
        // What is hidden is Hull's own, and stays.
        entries.filter(|entry| entry.path().is_dir() && !entry.file_name().as_encoded_bytes().starts_with(b".")).count()
    };
    let before = sandboxes();
    let made = |name: &str, script: &str| {
        let path = dir.join(name).into_os_string().into_string().unwrap();
        shell(&script.replace("{}", &path));
        path
    };
    let no_image = made("zeros", "truncate -s 1M {}");
    with_root(&no_image, &[], "true").run().failed(&[&no_image, "no file system", "ext4"]);
    let text = made("short", "echo hello >{}");
    with_root(&text, &[], "true").run().failed(&[&text, "no file system"]);
    with_root("/no/such/image", &[], "true").run().failed(&["/no/such/image", "must exist"]);
    with_root("/dev/null", &[], "true").run().failed(&["/dev/null", "no file system"]);
    // The mark is right and nothing else is.
    let hollow =
        made("hollow", "truncate -s 1M {} && printf '\\123\\357' | dd of={} bs=1 seek=1080 conv=notrunc 2>/dev/null");
    with_root(&hollow, &[], "true").run().failed(&["ext4", "broken", "fsck"]);
    let random = made(
        "random",
        "dd if=/dev/urandom of={} bs=64k count=16 2>/dev/null && printf XFSB | dd of={} conv=notrunc 2>/dev/null",
    );
    with_root(&random, &[], "true").run().failed(&["xfs", "broken"]);
    // An image once, with its table of groups overwritten.
    let torn = made(
        "torn",
        &format!("cp {ext4} {{}} && dd if=/dev/urandom of={{}} bs=1k seek=2 count=64 conv=notrunc 2>/dev/null"),
    );
    with_root(&torn, &[], "true").run().failed(&["ext4", "broken", "fsck"]);
    assert_eq!(sandboxes(), before);
}

#[test]
fn what_is_written_fits_into_the_size_that_was_asked_for_and_goes_with_the_container() {
    let images = Images::new();
    let erofs = images.make("erofs");
    let directory = images.root().into_os_string().into_string().unwrap();
    let script = "cat /etc/motd 2>/dev/null; echo kept >/file && cat /file; dd if=/dev/zero of=/full bs=1M count=100 2>&1 | grep -o 'No space left'; \
                  rm /full; echo again >/file && cat /file";
    for root in [&erofs, &directory] {
        let said = with_root(root, &["--storage-size", "32m"], script).run().ok();
        assert_eq!(said, "from the image\nkept\nNo space left\nagain", "{root}");
    }
    assert!(!Path::new(&directory).join("file").exists(), "the directory has changed");
    // An image of the store, and a kept container, whose disk goes when it is removed.
    let container = Detached::start(["--memory", "128", "--storage-size", "1g", &busybox(), "sleep", "1000"]);
    let size = container.exec(["sh", "-c", "echo x >/file; df -m / | tail -1 | awk '{print ($2 > 900 && $2 < 1025)}'"]);
    assert_eq!(size.run().ok(), "1");
    let disk = PathBuf::from("/var/lib/hull/containers").join(&container.id).join(&container.id).join("disk.ext4");
    let metadata = std::fs::metadata(&disk).unwrap();
    assert_eq!(metadata.len(), 1 << 30);
    let used = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
    assert!(used < 32 << 20, "{used} bytes of the disk are on the host's");
    let id = container.id.clone();
    drop(container);
    assert!(traces_of(&id).is_empty(), "{:?}", traces_of(&id));
}

#[test]
fn a_disk_that_cannot_be_made_is_one_error() {
    for (size, word) in [("1m", "16m"), ("x", "x"), ("99999t", "16m")] {
        let said = hull(["run", "--rm", "--storage-size", size, &busybox(), "true"]).run();
        assert!(said.code != 0 && said.stderr.contains(word), "{said:?}");
    }
    let said = hull(["run", "--rm", "--storage-size", "64m", &busybox(), "true"])
        .after("for dir in /usr/sbin /sbin /usr/bin /bin; do [ ! -e $dir/mkfs.ext4 ] || mount --bind /dev/null $dir/mkfs.ext4; done")
        .run();
    said.failed(&["mkfs.ext4"]);
}
