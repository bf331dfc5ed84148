//! Honest images, in every form that they come in.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::process::Command;

use hull_cli::image::{Digest, ImageError, SourceError, Store, user};
use serde_json::json;

use crate::support::*;

fn base() -> Layer {
    Layer::new().dir("./").dir("etc/").file("etc/passwd", "app:x:7:8::/home/app:/bin/sh\n").file("bin/app", "#!")
}

#[test]
fn every_form_gives_the_same_image() {
    let bench = Bench::new();
    let build =
        Build::new().layer("+gzip", base().bytes()).layer("+zstd", Layer::new().file("etc/motd", "hello").bytes());
    let plain = Build::of([base(), Layer::new().file("etc/motd", "hello")]);
    let sources = [
        build.write(&bench.path("layout")),
        write_archive(&bench.path("layout.tar"), &build.files()),
        write_archive(&bench.path("docker.tar"), &plain.docker_files()),
        write_archive(&bench.path("docker-gzip.tar"), &build.docker_files()),
        write_files(&bench.path("docker"), &plain.docker_files()),
    ];
    for (number, source) in sources.iter().enumerate() {
        // A store of its own, so that nothing is recognised.
        let store = Store::open(&bench.path(&format!("store-{number}"))).unwrap();
        let image = store.load(source, None).unwrap();
        assert_eq!(image.layers().len(), 2);
        assert_eq!(fs::read_to_string(image.layers()[0].join("bin/app")).unwrap(), "#!");
        assert_eq!(fs::read_to_string(image.layers()[1].join("etc/motd")).unwrap(), "hello");
        assert_eq!(image.entrypoint(), ["/bin/app"]);
        assert_eq!(image.cmd(), ["serve"]);
        assert_eq!(image.env(), ["A=b"]);
        assert_eq!((image.user(), image.workdir(), image.stop_signal()), (Some("app"), Some("/srv"), Some("SIGINT")));
        assert_eq!((image.exposed_ports(), image.volumes()), (&["80/tcp".to_owned()][..], &["/data".to_owned()][..]));
        let user = user::resolve(image.user().unwrap(), image.layers()).unwrap();
        assert_eq!((user.uid, user.gid, user.home.as_str()), (7, 8, "/home/app"));
    }
}

#[test]
fn the_variant_for_this_machine_is_chosen() {
    let bench = Bench::new();
    let mut ours = Build::of([base()]);
    ours.platform = Some(json!({"os": "linux", "architecture": architecture()}));
    let mut other = Build::of([Layer::new().file("foreign", "")]);
    other.config["architecture"] = "riscv64".into();
    other.platform = Some(json!({"os": "linux", "architecture": "riscv64"}));
    // Both manifests in an index that the layout's index leads to, beside an attestation.
    let mut files = [other.files(), ours.files()].concat();
    let mut manifests: Vec<serde_json::Value> = Vec::new();
    for (_, index) in files.iter().filter(|(name, _)| name == "index.json") {
        manifests.push(serde_json::from_slice::<serde_json::Value>(index).unwrap()["manifests"][0].clone());
    }
    let mut attestation = manifests[0].clone();
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    manifests.insert(0, attestation);
    files.retain(|(name, _)| name != "index.json");
    let nested = index(&manifests);
    let digest = Digest::of(&nested);
    let top = json!({"mediaType": INDEX, "digest": digest.to_string(), "size": nested.len()});
    files.push((format!("blobs/sha256/{}", digest.hex()), nested));
    files.push(("index.json".to_owned(), index(&[top])));
    let image = bench.store.load(&write_files(&bench.path("layout"), &files), None).unwrap();
    assert!(image.layers()[0].join("bin/app").exists());
}

#[test]
fn a_foreign_image_is_refused_by_name() {
    let bench = Bench::new();
    let mut build = Build::of([base()]);
    build.config["architecture"] = "s390x".into();
    // Without a platform in the index the configuration tells.
    let error = bench.load(&build).unwrap_err();
    assert!(matches!(error, ImageError::Source(SourceError::WrongPlatform { .. })), "{error}");
    build.platform = Some(json!({"os": "linux", "architecture": "s390x"}));
    let error = bench.load(&build).unwrap_err().to_string();
    assert!(error.contains("linux/s390x") && error.contains(architecture()), "{error}");
    bench.assert_nothing_left();
}

#[test]
fn of_several_images_one_must_be_named() {
    let bench = Bench::new();
    let builds = ["example:1", "example:2"].map(|name| {
        let mut build = Build::of([Layer::new().file("name", name)]);
        build.name = Some(name.to_owned());
        build
    });
    let mut files = [builds[0].files(), builds[1].files()].concat();
    let manifests: Vec<serde_json::Value> = files
        .iter()
        .filter(|(name, _)| name == "index.json")
        .map(|(_, index)| serde_json::from_slice::<serde_json::Value>(index).unwrap()["manifests"][0].clone())
        .collect();
    files.retain(|(name, _)| name != "index.json");
    files.push(("index.json".to_owned(), index(&manifests)));
    let source = write_files(&bench.path("layout"), &files);
    let error = bench.store.load(&source, None).unwrap_err().to_string();
    assert!(error.contains("example:1, example:2"), "{error}");
    let image = bench.store.load(&source, Some("example:2")).unwrap();
    assert_eq!(fs::read_to_string(image.layers()[0].join("name")).unwrap(), "example:2");
}

#[test]
fn metadata_survives() {
    let bench = Bench::new();
    let setuid = Fields { mode: 0o4755, mtime: 5, ..Fields::default() };
    let read_only = Fields { mode: 0o555, mtime: 6, ..Fields::default() };
    let image = bench
        .unpack(
            Layer::new()
                .entry(b'5', b"locked/", b"", b"", &read_only)
                .entry(b'0', b"locked/su", b"", b"program", &setuid)
                .entry(b'5', b"tmp/", b"", b"", &Fields { mode: 0o1777, ..Fields::default() })
                .pax(&[("mtime", b"1234.567890123"), ("SCHILY.xattr.user.note", b"a\n\0b")])
                .file("noted", "")
                .hard_link("locked/su-too", "locked/su")
                .symlink("absolute", "/etc/passwd")
                .symlink("dangling", "../../../nowhere")
                .entry(b'6', b"fifo", b"", b"", &Fields { mode: 0o620, ..Fields::default() })
                .entry(b'0', b"not-\xff-utf8", b"", b"", &Fields::default()),
        )
        .unwrap();
    let layer = &image.layers()[0];
    let stat = |name: &str| fs::symlink_metadata(layer.join(name)).unwrap();
    assert_eq!((stat("locked").mode() & 0o7777, stat("locked").mtime()), (0o555, 6));
    assert_eq!((stat("locked/su").mode() & 0o7777, stat("locked/su").mtime()), (0o4755, 5));
    assert_eq!(stat("locked/su").ino(), stat("locked/su-too").ino());
    assert_eq!(stat("tmp").mode() & 0o7777, 0o1777);
    assert_eq!((stat("noted").mtime(), stat("noted").mtime_nsec()), (1234, 567_890_123));
    assert!(stat("fifo").file_type().is_fifo() && stat("fifo").mode() & 0o7777 == 0o620);
    assert_eq!(fs::read_link(layer.join("absolute")).unwrap().to_str(), Some("/etc/passwd"));
    assert_eq!(fs::read_link(layer.join("dangling")).unwrap().to_str(), Some("../../../nowhere"));
    assert!(tree(layer).contains(&r"not-\xff-utf8".to_owned()));
    let mut value = [0; 16];
    match rustix::fs::getxattr(layer.join("noted"), "user.note", &mut value) {
        Ok(length) => assert_eq!(&value[..length], b"a\n\0b"),
        Err(error) => assert_eq!(error, rustix::io::Errno::OPNOTSUPP),
    }
}

#[test]
fn owners_devices_and_capabilities_survive_for_root() {
    if !may(is_root(), "making other people's files") {
        return;
    }
    let bench = Bench::new();
    let theirs = Fields { uid: 1234, gid: 5678, mode: 0o6711, ..Fields::default() };
    let capability = [0, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let layer = Layer::new()
        .entry(b'5', b"theirs/", b"", b"", &theirs)
        .pax(&[("SCHILY.xattr.security.capability", &capability)])
        .entry(b'0', b"theirs/ping", b"", b"x", &theirs)
        .entry(b'2', b"link", b"x", b"", &theirs)
        .entry(b'3', b"null", b"", b"", &Fields { device: (1, 3), mode: 0o666, ..Fields::default() })
        .entry(b'4', b"disk", b"", b"", &Fields { device: (8, 300), ..Fields::default() });
    let image = match bench.unpack(layer) {
        Err(error) if error.to_string().contains("takes root") => {
            may(false, "making devices");
            return;
        }
        other => other.unwrap(),
    };
    let layer = &image.layers()[0];
    for name in ["theirs", "theirs/ping", "link"] {
        let found = fs::symlink_metadata(layer.join(name)).unwrap();
        assert_eq!((found.uid(), found.gid()), (1234, 5678), "{name}");
        assert!(name == "link" || found.mode() & 0o7777 == 0o6711, "{name}");
    }
    let mut value = [0; 32];
    let length = rustix::fs::getxattr(layer.join("theirs/ping"), "security.capability", &mut value).unwrap();
    assert_eq!(&value[..length], capability);
    let device = |name: &str| {
        let found = fs::symlink_metadata(layer.join(name)).unwrap();
        (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()))
    };
    assert_eq!((device("null"), device("disk")), ((1, 3), (8, 300)));
}

#[test]
fn what_takes_root_says_so() {
    if is_root() {
        println!("skipped: this is root");
        return;
    }
    let bench = Bench::new();
    let device = Layer::new().entry(b'3', b"null", b"", b"", &Fields { device: (1, 3), ..Fields::default() });
    assert!(bench.refuse(device).contains("takes root"));
    let theirs = Layer::new().entry(b'0', b"shadow", b"", b"", &Fields { uid: 0, ..Fields::default() });
    assert!(bench.refuse(theirs).contains("takes root"));
}

#[test]
fn deletions_become_those_of_overlayfs() {
    let bench = Bench::new();
    let image =
        bench.unpack(Layer::new().file("etc/.wh.shadow", "").file(".wh..wh.plnk/0.1", "x").file("kept", "")).unwrap();
    let layer = &image.layers()[0];
    assert_eq!(tree(layer), ["etc", "etc/shadow", "kept"]);
    let whiteout = fs::symlink_metadata(layer.join("etc/shadow")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
}

#[test]
fn opaque_directories_become_those_of_overlayfs() {
    if !may_mark_opaque() {
        return;
    }
    let bench = Bench::new();
    let layer = Layer::new()
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "")
        // Deleted and made anew: what lower layers have in it must not come back.
        .file(".wh.anew", "")
        .file("anew/file", "")
        .dir("first/")
        .file(".wh.first", "")
        .symlink("was-link", "kept")
        .dir("was-link/")
        .dir("kept/");
    let image = bench.unpack(layer).unwrap();
    let opaque = |name: &str| {
        let mut value = [0; 1];
        rustix::fs::getxattr(image.layers()[0].join(name), "trusted.overlay.opaque", &mut value)
            .is_ok_and(|_| value == *b"y")
    };
    for name in ["opaque", "anew", "first", "was-link"] {
        assert!(opaque(name), "{name}");
    }
    assert!(!opaque("kept"));
}

#[test]
fn overlayfs_shows_what_the_image_is() {
    if !may(is_root(), "mounting") || !may_mark_opaque() {
        return;
    }
    let bench = Bench::new();
    let image = bench
        .load(&Build::of([
            Layer::new().file("a/deleted", "").file("a/kept", "old").file("b/hidden", "").file("c", ""),
            Layer::new().file("a/.wh.deleted", "").file("b/.wh..wh..opq", "").file("b/new", ""),
            Layer::new().file("a/kept", "new").file(".wh.c", "").file("c/d", ""),
        ]))
        .unwrap();
    let at = bench.path("mounted");
    fs::create_dir(&at).unwrap();
    let lower: Vec<_> = image.layers().iter().rev().map(|layer| layer.to_str().unwrap()).collect();
    let options = format!("lowerdir={}", lower.join(":"));
    let mounted = Command::new("mount").args(["-t", "overlay", "-o", &options, "overlay"]).arg(&at).status();
    if !may(mounted.is_ok_and(|status| status.success()), "mounting overlayfs") {
        return;
    }
    let (seen, kept) = (tree(&at), fs::read_to_string(at.join("a/kept")));
    assert!(Command::new("umount").arg(&at).status().unwrap().success());
    assert_eq!(seen, ["a", "a/kept", "b", "b/new", "c", "c/d"]);
    assert_eq!(kept.unwrap(), "new");
}

#[test]
fn entries_replace_each_other() {
    let bench = Bench::new();
    let image = bench
        .unpack(
            Layer::new()
                .file("twice", "first")
                .file("twice", "second")
                .dir("tree/")
                .dir("tree/deep/")
                .file("tree/deep/file", "")
                .file("tree", "now a file")
                .hard_link("twice-too", "twice")
                .hard_link("twice-too", "twice")
                .file("twice", "third"),
        )
        .unwrap();
    let layer = &image.layers()[0];
    assert_eq!(tree(layer), ["tree", "twice", "twice-too"]);
    assert_eq!(fs::read_to_string(layer.join("tree")).unwrap(), "now a file");
    assert_eq!(fs::read_to_string(layer.join("twice")).unwrap(), "third");
    assert_eq!(fs::read_to_string(layer.join("twice-too")).unwrap(), "second");
}

#[test]
fn equal_layers_are_mounted_once() {
    let bench = Bench::new();
    let (a, b) = (Layer::new().file("a", ""), Layer::new().file("b", ""));
    let image = bench.load(&Build::of([a.clone(), b, a])).unwrap();
    assert_eq!(image.layers().len(), 2);
    assert!(image.layers()[0].join("b").exists() && image.layers()[1].join("a").exists());
}

#[test]
fn nothing_is_mounted_below_an_opaque_root() {
    if !may_mark_opaque() {
        return;
    }
    let bench = Bench::new();
    let layers = [
        Layer::new().file("old", ""),
        Layer::new().file(".wh..wh..opq", "").file("new", ""),
        Layer::new().file("top", ""),
    ];
    let image = bench.load(&Build::of(layers)).unwrap();
    assert_eq!(image.layers().len(), 2);
    assert!(image.layers()[0].join("new").exists());
}

#[test]
fn sparse_files_stay_sparse() {
    let bench = Bench::new();
    let data = [b"1\n8388608\n6\n".as_slice(), &[0; 500], b"island"].concat();
    let image = bench
        .unpack(
            Layer::new()
                .pax(&[
                    ("GNU.sparse.major", b"1"),
                    ("GNU.sparse.minor", b"0"),
                    ("GNU.sparse.name", b"disk.img"),
                    ("GNU.sparse.realsize", b"1099511627776"),
                ])
                .file("GNUSparseFile.0/disk.img", data),
        )
        .unwrap();
    let found = fs::metadata(image.layers()[0].join("disk.img")).unwrap();
    assert_eq!(found.len(), 1 << 40);
    assert!(found.blocks() < 100 && image.size_bytes() < 10_000);
}
