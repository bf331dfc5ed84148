//! Roots that are disks, as containerd's snapshotters hand them over: devmapper and blockfile one mount, erofs since containerd 2.2 one
//! for each layer, top first, and an overlay that names them by templates.

use containerd_shim_protos::types::mount::Mount;
use fixture::shell;

use super::*;

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        type_: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Default::default()
    }
}

fn layer(path: &str) -> Mount {
    mount("erofs", path, &["ro", "loop"])
}

/// An overlay of layers from the `first` mount to the `last`, whose changes go where `upper` and `work` say.
fn overlay(first: usize, last: usize, upper: &str, work: &str) -> Mount {
    let lower = if first == last { format!("mount {first}") } else { format!("overlay {first} {last}") };
    let options = [
        format!("X-containerd.mkdir.path={upper}:0755"),
        format!("workdir={work}"),
        format!("upperdir={upper}"),
        format!("lowerdir={{{{ {lower} }}}}"),
    ];
    mount("format/mkdir/overlay", "overlay", &options.each_ref().map(String::as_str))
}

/// Makes two layers of a bundle's root: programs below, and above them a file and the removal of a program.
fn two_layers(bundle: &Path) -> [String; 2] {
    let at = bundle.display();
    shell(&format!(
        "cd {at} && mkdir -p top/bin && echo top >top/file && mknod top/bin/dd c 0 0 &&
         mkfs.erofs --quiet bottom.erofs rootfs >/dev/null && mkfs.erofs --quiet top.erofs top >/dev/null && rm -r rootfs"
    ));
    [format!("{at}/top.erofs"), format!("{at}/bottom.erofs")]
}

/// Creates and starts a container with this root, its output going to a file.
async fn start(shim: &Shim, id: &str, rootfs: &[Mount]) -> PathBuf {
    let bundle = shim.dir.join(id);
    let out = bundle.join("out");
    let request = CreateTaskRequest {
        rootfs: rootfs.to_vec(),
        stdout: format!("file://{}", out.display()),
        ..create(id, &bundle)
    };
    shim.tasks().create(patience(), &request).await.unwrap();
    shim.start_task(id, "").await.unwrap();
    out
}

const LOOK: &str = "cat /file; test -e /bin/dd || echo removed; echo changed >/file; cat /file; sleep 1000";
const SEEN: &str = "top\nremoved\nchanged\n";

#[test]
fn task_create_has_layers_of_erofs_as_disks_below_memory() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        let bundle = shim.bundle("erofs-1", &["/bin/sh", "-c", LOOK]);
        let [top, bottom] = two_layers(&bundle);
        let rootfs = [layer(&top), layer(&bottom), overlay(0, 1, "/no/such/upper", "/no/such/work")];
        says(&start(&shim, "erofs-1", &rootfs).await, SEEN);
        // Another container of the pod shares the disks, and not what is written.
        shim.bundle("erofs-2", &["/bin/sh", "-c", LOOK]);
        says(&start(&shim, "erofs-2", &rootfs).await, SEEN);
        assert_eq!((opened(vmm, &top), opened(vmm, &bottom)), (1, 1));
        shim.remove_task("erofs-1").await;
        assert_eq!((opened(vmm, &top), opened(vmm, &bottom)), (1, 1));
        shim.remove_task("erofs-2").await;
        assert_eq!((opened(vmm, &top), opened(vmm, &bottom)), (0, 0));
    });
}

#[test]
fn task_create_writes_to_the_disk_that_comes_with_layers_of_erofs() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        let bundle = shim.bundle("erofs-rw", &["/bin/sh", "-c", LOOK]);
        let [top, bottom] = two_layers(&bundle);
        let writable = bundle.join("rwlayer.img").into_os_string().into_string().unwrap();
        shell(&format!("truncate -s 16M {writable} && mkfs.ext4 -q {writable}"));
        let rootfs = [
            mount("ext4", &writable, &["X-containerd.mkfs.fs=ext4", "rw", "loop"]),
            layer(&top),
            layer(&bottom),
            overlay(1, 2, "{{ mount 0 }}/upper", "{{ mount 0 }}/work"),
        ];
        says(&start(&shim, "erofs-rw", &rootfs).await, SEEN);
        assert_eq!(opened(vmm, &writable), 1);
        shim.remove_task("erofs-rw").await;
        assert_eq!(opened(vmm, &writable), 0);
        // containerd finds what was written, and no journal to be replayed.
        assert_eq!(shell(&format!("debugfs -R 'cat /upper/file' {writable} 2>/dev/null")), "changed\n");
        assert_eq!(shell(&format!("dumpe2fs -h {writable} 2>/dev/null | grep -c needs_recovery || true")).trim(), "0");
    });
}

#[test]
fn task_create_has_layers_as_files_where_the_bus_has_no_room() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        let script = "cat /layer1 /layer29; ls /sys/block | grep -c vd";
        let bundle = shim.bundle("erofs-many", &["/bin/sh", "-c", script]);
        for program in ["ls", "grep"] {
            std::os::unix::fs::symlink("busybox", bundle.join("rootfs/bin").join(program)).unwrap();
        }
        change(&bundle, |spec| {
            let sys = json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] });
            spec["mounts"].as_array_mut().unwrap().push(sys);
        });
        let at = bundle.display();
        shell(&format!(
            "cd {at} && mkfs.erofs --quiet 0.erofs rootfs >/dev/null && rm -r rootfs &&
             for n in $(seq 29); do rm -rf l && mkdir l && echo $n >l/layer$n && mkfs.erofs --quiet $n.erofs l >/dev/null; done"
        ));
        let mut rootfs: Vec<Mount> = (0..30).rev().map(|number| layer(&format!("{at}/{number}.erofs"))).collect();
        rootfs.push(overlay(0, 29, "/upper", "/work"));
        says(&start(&shim, "erofs-many", &rootfs).await, "1\n29\n0\n");
        shim.remove_task("erofs-many").await;
        // The share keeps what it has used last for some seconds.
        eventually("the VMM lets go of the layer", || match opened(vmm, &format!("{at}/0.erofs")) {
            0 => Ok(()),
            count => Err(format!("it has {count} descriptors of it")),
        });
    });
}

#[test]
fn task_create_refuses_roots_that_the_guest_cannot_have_and_leaves_nothing() {
    run(async {
        let (shim, vmm) = Shim::shared().await;
        let bundle = shim.bundle("no-root", &["/bin/sh"]);
        let [top, bottom] = two_layers(&bundle);
        let at = bundle.display().to_string();
        shell(&format!(
            "head -c 65536 /dev/urandom >{at}/noise; mkfifo {at}/fifo; truncate -s 16M {at}/ext4 && mkfs.ext4 -q {at}/ext4"
        ));
        let broken = |name: &str| mount("ext4", &format!("{at}/{name}"), &["loop"]);
        for (rootfs, code, word) in [
            (vec![broken("missing")], Code::FAILED_PRECONDITION, "missing"),
            (vec![broken("fifo")], Code::INVALID_ARGUMENT, "fifo"),
            (vec![broken("noise")], Code::INTERNAL, "fsck"),
            (vec![mount("xfs", &format!("{at}/ext4"), &[])], Code::INTERNAL, "another type"),
            (vec![layer(&top), layer(&format!("{at}/noise")), overlay(0, 1, "/u", "/w")], Code::INTERNAL, "erofs"),
            (vec![layer(&top), layer(&bottom), overlay(0, 7, "/u", "/w")], Code::INVALID_ARGUMENT, "overlay"),
            (vec![mount("erofs", &top, &["device=/other"])], Code::INVALID_ARGUMENT, "merged"),
        ] {
            let request = CreateTaskRequest { rootfs, ..create("no-root", &bundle) };
            let (said, message) = refused(shim.tasks().create(patience(), &request).await);
            assert_eq!(said, code, "{message}");
            assert!(message.contains(word), "{message}");
        }
        for name in ["top.erofs", "bottom.erofs", "noise", "ext4"] {
            assert_eq!(opened(vmm, &format!("{at}/{name}")), 0, "{name}");
        }
        // One disk has one writer: here it is the host.
        let locked = std::fs::File::open(format!("{at}/ext4")).unwrap();
        locked.lock().unwrap();
        let request = CreateTaskRequest { rootfs: vec![broken("ext4")], ..create("no-root", &bundle) };
        let (said, message) = refused(shim.tasks().create(patience(), &request).await);
        assert_eq!(said, Code::FAILED_PRECONDITION, "{message}");
        assert!(message.contains("in use"), "{message}");
    });
}
