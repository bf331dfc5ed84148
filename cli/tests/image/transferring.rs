//! Images made of archives of files, images written out, and what is removed when nobody needs it.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use hull_cli::image::Digest;

use crate::support::*;

/// What can be seen of a file beside its name.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    device: u64,
    links: u64,
    content: Vec<u8>,
    attributes: Vec<Option<Vec<u8>>>,
}

/// All there is in a directory, and the directory itself.
fn seen(directory: &Path) -> BTreeMap<String, Seen> {
    let mut paths = vec![directory.to_owned()];
    let mut at = 0;
    while let Some(path) = paths.get(at).cloned() {
        if path.symlink_metadata().unwrap().is_dir() {
            paths.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        }
        at += 1;
    }
    let look = |path: PathBuf| {
        let name = path.strip_prefix(directory).unwrap().as_os_str().as_bytes().escape_ascii().to_string();
        let metadata = path.symlink_metadata().unwrap();
        let kind = metadata.file_type();
        let content = match () {
            () if kind.is_file() => std::fs::read(&path).unwrap(),
            () if kind.is_symlink() => std::fs::read_link(&path).unwrap().into_os_string().as_bytes().to_vec(),
            () => Vec::new(),
        };
        let attributes = ["user.note", "security.capability", "trusted.overlay.opaque"].map(|name| {
            let mut value = vec![0; 100];
            let length = rustix::fs::lgetxattr(&path, name, &mut value).ok()?;
            value.truncate(length);
            Some(value)
        });
        let is_whiteout = kind.is_char_device() && metadata.rdev() == 0;
        let mtime = if is_whiteout { (0, 0) } else { (metadata.mtime(), metadata.mtime_nsec()) };
        let owner = (metadata.uid(), metadata.gid());
        let links = if kind.is_dir() { 0 } else { metadata.nlink() };
        let attributes = attributes.to_vec();
        (name, Seen { mode: metadata.mode(), owner, mtime, device: metadata.rdev(), links, content, attributes })
    };
    paths.into_iter().map(look).collect()
}

/// A layer with something of everything that any user may make.
fn varied() -> Layer {
    let deep = "d".repeat(120);
    let odd = Fields { mode: 0o4755, mtime: 5, ..Fields::default() };
    Layer::new()
        .dir("etc/")
        .file("etc/passwd", "root")
        .file("empty", "")
        .hard_link("same", "etc/passwd")
        .symlink("link", "/etc/passwd")
        .pax(&[("linkpath", "/x".repeat(100).as_bytes())])
        .symlink("long", "x")
        .pax(&[("path", format!("{deep}/{deep}/file").as_bytes()), ("mtime", b"1234567890.123456789")])
        .file("x", "deep".repeat(1000))
        .pax(&[("SCHILY.xattr.user.note", b"a note")])
        .file("noted", "x")
        .entry(b'0', b"odd name \xff", b"", b"x", &odd)
        .entry(b'6', b"fifo", b"", b"", &Fields::default())
}

#[test]
fn an_archive_of_files_becomes_an_image_of_one_layer() {
    let bench = Bench::new();
    for (number, bytes) in [varied().bytes(), gzip(&varied().bytes()), zstd(&varied().bytes())].iter().enumerate() {
        let archive = bench.path("root.tar");
        std::fs::write(&archive, bytes).unwrap();
        let image = bench.store.import(&archive, &format!("mine:{number}")).unwrap();
        assert_eq!(image.name(), format!("mine:{number}"));
        assert_eq!(image.layers().len(), 1, "and all share it");
        assert_eq!(std::fs::read(image.layers()[0].join("same")).unwrap(), b"root");
        assert_eq!((image.config().os().to_string(), image.cmd().len()), ("linux".to_owned(), 0));
        assert_eq!(bench.store.resolve(&format!("mine:{number}")).unwrap().digest(), image.digest());
    }
    assert_eq!(std::fs::read_dir(bench.path("store/layers")).unwrap().count(), 1);
}

#[test]
fn what_is_no_archive_of_files_is_refused_and_leaves_nothing() {
    let bench = Bench::new();
    let file = bench.path("file");
    let escape = Layer::new().file("../escape", "x").bytes();
    let half = gzip(&varied().bytes())[..100].to_vec();
    for (content, expected) in [
        (escape, "leads out of the layer"),
        (half, "damaged or cut short"),
        (b"BZh9x".to_vec(), "bzip2, but only gzip and zstd"),
        (vec![b'x'; 2000], "header"),
    ] {
        std::fs::write(&file, content).unwrap();
        let error = bench.store.import(&file, "mine").unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        bench.assert_nothing_left();
    }
    for (path, name, expected) in
        [("outside", "mine", "a directory"), ("no-such-file", "mine", "there is no"), ("file", "", "is empty")]
    {
        let error = bench.store.import(&bench.path(path), name).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        bench.assert_nothing_left();
    }
}

#[test]
fn an_exported_image_comes_back_as_it_was() {
    let bench = Bench::new();
    let mut build = Build::of([varied(), Layer::new().file("top", "top")]);
    build.name = Some("r.example/app:1".to_owned());
    let image = bench.load(&build).unwrap();
    let file = bench.path("image.tar");
    let digest = bench.store.export("app:1", &file).unwrap();

    let other = Bench::new();
    let loaded = other.store.load(&file, None).unwrap();
    assert_eq!((loaded.name(), loaded.digest()), ("r.example/app:1", digest));
    assert_eq!(loaded.config().config(), image.config().config());
    assert_eq!(loaded.layers().len(), 2);
    for (before, after) in image.layers().iter().zip(loaded.layers()) {
        assert_eq!(seen(before), seen(after));
    }
    assert_eq!(seen(&loaded.layers()[0])["noted"].attributes[0].as_deref(), Some(b"a note".as_slice()));

    // From there on nothing changes any more.
    let again = other.path("again.tar");
    assert_eq!(other.store.export("app:1", &again).unwrap(), digest);
    assert!(std::fs::read(&file).unwrap() == std::fs::read(&again).unwrap());
}

#[test]
fn what_a_layer_hides_is_hidden_in_the_exported_one() {
    if !may(is_root(), "making device nodes") || !may_mark_opaque() {
        return;
    }
    let bench = Bench::new();
    let device = Fields { device: (1, 3), uid: 3_000_000, ..Fields::default() };
    let top = Layer::new()
        .file(".wh.gone", "")
        .dir("clean/")
        .file("clean/.wh..wh..opq", "")
        .file("clean/new", "x")
        .pax(&[("uid", b"3000000")])
        .entry(b'3', b"null", b"", b"", &Fields { uid: 0, ..device });
    let image = bench.load(&Build::of([Layer::new().file("gone", "x").file("clean/old", "x"), top])).unwrap();
    let file = bench.path("image.tar");
    bench.store.export(&image.digest().to_string(), &file).unwrap();
    let other = Bench::new();
    let loaded = other.store.load(&file, Some("x")).unwrap();
    let found = seen(&loaded.layers()[1]);
    assert_eq!(found, seen(&image.layers()[1]));
    assert_eq!(found["clean"].attributes[2].as_deref(), Some(b"y".as_slice()));
    assert_eq!((found["gone"].device, found["null"].owner.0), (0, 3_000_000));
}

#[test]
fn an_export_that_fails_leaves_the_old_file_and_nothing_else() {
    let bench = Bench::new();
    bench.load(&Build { name: Some("app".to_owned()), ..Build::of([varied()]) }).unwrap();
    let target = bench.path("target");
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("image.tar"), "old").unwrap();
    assert!(bench.store.export("nothing", &target.join("image.tar")).unwrap_err().to_string().contains("no image"));
    // A directory cannot be replaced by a file.
    std::fs::create_dir(target.join("directory")).unwrap();
    let error = bench.store.export("app", &target.join("directory")).unwrap_err().to_string();
    assert!(error.contains("cannot write"), "{error}");
    assert!(bench.store.export("app", &target.join("none/image.tar")).is_err());
    assert_eq!(tree(&target), ["directory", "image.tar"]);
    assert_eq!(std::fs::read_to_string(target.join("image.tar")).unwrap(), "old");
}

#[test]
fn pruning_removes_what_nobody_needs_and_says_what() {
    let bench = Bench::new();
    let prune = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hull"));
        command.args(["image", "prune"]).args(options);
        command.env("HULL_DATA_DIR", bench.path("store")).env("HULL_STATE_DIR", bench.path("state"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(prune(&[]), "0 B freed\n", "before there is a store");
    let kept = bench.load(&Build { name: Some("kept".to_owned()), ..Build::of([varied()]) }).unwrap();
    let used = bench.load(&Build { name: Some("used".to_owned()), ..Build::of([Layer::new().file("a", "abc")]) });
    let used = used.unwrap();
    bench.store.remove("used").unwrap();
    let (held, dead) = (Digest::of(b"held"), Digest::of(b"dead"));
    let blob = |digest: &Digest| bench.path("store/blobs").join(digest.hex());
    std::fs::write(blob(&held), "12345").unwrap();
    std::fs::write(blob(&dead), "1234567").unwrap();
    let pulling = std::fs::File::open(blob(&held)).unwrap();
    pulling.lock().unwrap();

    // The first image is named, the second in use, the first blob being pulled.
    assert_eq!(prune(&[]), format!("blob {dead}\n7 B freed\n"));
    assert!(used.layers()[0].exists());
    drop((used, pulling));
    let freed: serde_json::Value = serde_json::from_str(&prune(&["--json"])).unwrap();
    let kinds: Vec<_> = freed.as_array().unwrap().iter().map(|item| item["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["layer", "blob"]);
    assert_eq!((freed[0]["size_bytes"].as_u64(), freed[1]["size_bytes"].as_u64()), (Some(512 + 3), Some(5)));
    assert_eq!(freed[1]["digest"], held.to_string());
    assert!(kept.layers()[0].exists());
    assert_eq!(prune(&["--json"]).trim(), "[]");
}
