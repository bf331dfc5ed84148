//! Images that are damaged or want to do harm. Nothing outside the store may change, nothing may be left in it.

use std::fs;
use std::process::Command;

use hull_cli::image::{Digest, ImageError, SourceError, Store, StreamError, UnpackError};
use proptest::prelude::*;

use crate::support::*;

#[test]
fn names_that_lead_out_are_refused() {
    let bench = Bench::new();
    for name in ["../outside/file", "a/../../outside/file", "/etc/x", "..", "a/..", "../../../../../../../../tmp/x"] {
        for kind in *b"01235" {
            let error = bench.refuse(Layer::new().entry(kind, name.as_bytes(), b"x", b"", &Fields::default()));
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }
    for name in [".wh...", "a/.wh..", ".wh.", ".wh.x/y"] {
        assert!(bench.refuse(Layer::new().file(name, "")).contains("refused"), "{name}");
    }
}

#[test]
fn links_are_kept_but_not_followed_out() {
    let bench = Bench::new();
    let outside = bench.path("outside").to_str().unwrap().to_owned();
    let up = format!("../../../../../../../../../..{outside}");
    for target in [&outside, &up] {
        // The kernel takes the link for one in the layer, where nothing is yet.
        let image = bench
            .unpack(
                Layer::new()
                    .symlink("out", target)
                    .file("out/file", "touched")
                    .dir("out/new/")
                    .file("out/.wh.gone", ""),
            )
            .unwrap();
        let layer = &image.layers()[0];
        assert_eq!(fs::read_link(layer.join("out")).unwrap().to_str(), Some(target.as_str()));
        let inside = layer.join(outside.trim_start_matches('/'));
        assert_eq!(fs::read_to_string(inside.join("file")).unwrap(), "touched");
        assert!(inside.join("new").is_dir());
        drop(image);
        for image in bench.store.list().unwrap() {
            bench.store.remove(&image.digest).unwrap();
        }
        bench.assert_nothing_left();
    }
}

#[test]
fn a_link_is_replaced_not_written_through() {
    let bench = Bench::new();
    let file = bench.path("outside/file").to_str().unwrap().to_owned();
    let image = bench.unpack(Layer::new().symlink("x", &file).file("x", "replaced")).unwrap();
    assert_eq!(fs::read_to_string(image.layers()[0].join("x")).unwrap(), "replaced");
    assert_eq!(fs::read_to_string(file).unwrap(), "untouched");
}

#[test]
fn a_directory_that_becomes_a_link_leads_nowhere() {
    let bench = Bench::new();
    let outside = bench.path("outside").to_str().unwrap().to_owned();
    let image = bench
        .unpack(
            Layer::new().dir("a/").file("a/before", "").symlink("a", &outside).file("a/file", "touched").dir("a/b/"),
        )
        .unwrap();
    let inside = image.layers()[0].join(outside.trim_start_matches('/'));
    assert_eq!(fs::read_to_string(inside.join("file")).unwrap(), "touched");
    assert_eq!(fs::read_to_string(bench.path("outside/file")).unwrap(), "untouched");
    assert!(!bench.path("outside/b").exists());
}

#[test]
fn hard_links_stay_in_the_layer() {
    let bench = Bench::new();
    let outside = bench.path("outside/file").to_str().unwrap().to_owned();
    for target in [outside.as_str(), "../outside/file", "a/../../x", "missing", "", "."] {
        let error = bench.refuse(Layer::new().hard_link("link", target));
        assert!(error.contains("`link` is a hard link"), "{error}");
    }
    // Through a link whose target is outside, the kernel looks inside.
    let through = Layer::new().symlink("out", bench.path("outside").to_str().unwrap()).hard_link("link", "out/file");
    assert!(bench.refuse(through).contains("not in the layer"));
    assert!(bench.refuse(Layer::new().dir("d/").hard_link("link", "d")).contains("is a directory"));
    // A hard link to a symbolic link is one to the link.
    let image = bench.unpack(Layer::new().symlink("s", &outside).hard_link("h", "s")).unwrap();
    assert!(image.layers()[0].join("h").is_symlink());
}

#[test]
fn impossible_trees_are_refused() {
    let bench = Bench::new();
    assert!(bench.refuse(Layer::new().file("f", "").file("f/x", "")).contains("no directory"));
    assert!(bench.refuse(Layer::new().symlink("l", "l").file("l/x", "")).contains("loop"));
    assert!(bench.refuse(Layer::new().symlink("a", "b/c").symlink("b", "a/c").file("a/x", "")).contains("refused"));
}

#[test]
fn steering_attributes_do_not_reach_overlayfs() {
    if !may_mark_opaque() {
        return;
    }
    let bench = Bench::new();
    let image = bench
        .unpack(
            Layer::new()
                .pax(&[
                    ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                    ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ])
                .dir("d/"),
        )
        .unwrap();
    let mut value = [0; 64];
    let length = rustix::fs::listxattr(image.layers()[0].join("d"), &mut value).unwrap();
    assert!(!String::from_utf8_lossy(&value[..length]).contains("trusted"));
}

#[test]
fn a_blob_must_have_its_digest() {
    let bench = Bench::new();
    for suffix in ["", "+gzip", "+zstd"] {
        let build = Build::new().layer(suffix, Layer::new().file("f", "content").bytes());
        let mut files = build.files();
        // The first blob is the layer; a changed byte in its middle may or may not break the compression.
        let middle = files[1].1.len() / 2;
        files[1].1[middle] ^= 1;
        let error = bench.store.load(&write_files(&bench.path(&format!("layout{suffix}")), &files), None).unwrap_err();
        let ImageError::Layer { source: UnpackError::Stream(StreamError::Mismatch { .. }), .. } = &error else {
            panic!("{suffix}: {error}");
        };
        assert!(error.to_string().contains(&build.layers[0].diff_id.to_string()), "{error}");
        bench.assert_nothing_left();
    }
    // One byte more or less is seen before anything is read.
    let mut files = Build::of([Layer::new().file("f", "")]).files();
    files[1].1.pop();
    let error = bench.store.load(&write_files(&bench.path("short"), &files), None).unwrap_err();
    assert!(error.to_string().contains("does not have its size"), "{error}");
}

#[test]
fn documents_must_have_their_digest() {
    let bench = Bench::new();
    for (number, what) in [(2, "configuration"), (3, "manifest")] {
        let mut files = Build::of([Layer::new().file("f", "")]).files();
        let blob = &mut files[number].1;
        let last = blob.iter().rposition(|byte| *byte == b'"').unwrap();
        blob[last] = b'\'';
        let error = bench.store.load(&write_files(&bench.path(what), &files), None).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("does not have its digest"), "{error}");
    }
    let mut files = Build::of([Layer::new().file("f", "")]).docker_files();
    files[0].1.push(b' ');
    let error = bench.store.load(&write_archive(&bench.path("docker.tar"), &files), None).unwrap_err().to_string();
    assert!(error.contains("does not have its digest"), "{error}");
}

#[test]
fn content_must_have_its_diff_id() {
    let bench = Bench::new();
    for suffix in ["", "+gzip", "+zstd"] {
        let mut build = Build::new().layer(suffix, Layer::new().file("f", "content").bytes());
        build.layers[0].diff_id = Digest::of(b"something else");
        let error = bench.load(&build).unwrap_err();
        assert!(error.to_string().contains("diff id"), "{suffix}: {error}");
        bench.assert_nothing_left();
    }
    let mut build = Build::of([Layer::new().file("f", "content")]);
    build.layers[0].diff_id = Digest::of(b"something else");
    let archive = write_archive(&bench.path("docker.tar"), &build.docker_files());
    assert!(bench.store.load(&archive, None).unwrap_err().to_string().contains("diff id"));
    bench.assert_nothing_left();
}

#[test]
fn cut_compression_is_told_from_a_wrong_digest() {
    let bench = Bench::new();
    let tar = Layer::new().file("f", vec![7; 100_000]).bytes();
    for (suffix, name) in [("+gzip", "gzip"), ("+zstd", "zstd")] {
        for cut in [1, 10, 30] {
            let mut build = Build::new().layer(suffix, tar.clone());
            let blob = &mut build.layers[0].bytes;
            blob.truncate(blob.len() - cut);
            let error = bench.load(&build).unwrap_err().to_string();
            assert!(error.contains(&format!("the {name} data is damaged or cut short")), "{error}");
            bench.assert_nothing_left();
        }
    }
    // A whole compressed stream of half an archive.
    let build = Build::new().layer("+gzip", tar[..5000].to_vec());
    assert!(bench.load(&build).unwrap_err().to_string().contains("cut short"));
}

#[test]
fn what_is_not_supported_says_what_it_is() {
    let bench = Bench::new();
    let layer = Layer::new().file("f", "").bytes();
    let mut build = Build::new().layer("", layer.clone());
    build.layers[0].media_type = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted".into();
    assert!(bench.load(&build).unwrap_err().to_string().contains("+encrypted"));
    let mut build = Build::new().layer("", layer.clone());
    build.layers[0].bytes = [b"\xfd7zXZ\0", layer.as_slice()].concat();
    assert!(bench.load(&build).unwrap_err().to_string().contains("compressed with xz"));
    let mut build = Build::new().layer("", layer.clone());
    build.layers[0].bytes = b"this is no archive".repeat(100);
    build.layers[0].diff_id = Digest::of(&build.layers[0].bytes);
    assert!(bench.load(&build).unwrap_err().to_string().contains("no tar header at byte 0"));
    bench.assert_nothing_left();
}

#[test]
fn counts_and_sizes_are_capped() {
    let bench = Bench::new();
    let error = bench.load(&Build::of(vec![Layer::new(); 129])).unwrap_err().to_string();
    assert!(error.contains("number of layers is 129"), "{error}");
    let mut build = Build::of([Layer::new()]);
    build.config["author"] = "x".repeat(5 << 20).into();
    let error = bench.load(&build).unwrap_err();
    assert!(matches!(error, ImageError::Source(SourceError::TooLarge { .. })), "{error}");
    let files = [("index.json".to_owned(), vec![b' '; 5 << 20])];
    let error = bench.store.load(&write_files(&bench.path("large"), &files), None).unwrap_err();
    assert!(matches!(error, ImageError::Source(SourceError::TooLarge { .. })), "{error}");
    let nested = [("index.json".to_owned(), [vec![b'['; 100_000]].concat())];
    let error = bench.store.load(&write_files(&bench.path("nested"), &nested), None).unwrap_err();
    assert!(matches!(error, ImageError::Source(SourceError::Json { .. })), "{error}");
}

#[test]
fn a_file_larger_than_the_disk_is_not_begun() {
    let bench = Bench::new();
    let mut layer = Layer::new().file("huge", "");
    let mut header = tar::Header::from_byte_slice(&layer.0[..512]).clone();
    header.set_size(1 << 60);
    header.set_cksum();
    layer.0 = header.as_bytes().to_vec();
    let error = bench.refuse(layer);
    assert!(error.contains("cut short") || error.contains("disk is full"), "{error}");
}

#[test]
fn a_full_disk_is_named_and_left_as_it_was() {
    let bench = Bench::new();
    fs::create_dir(bench.path("small")).unwrap();
    let mount = |options: &str| {
        let mut command = Command::new("mount");
        let mounted = command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(bench.path("small")).output();
        may(mounted.is_ok_and(|output| output.status.success()), "mounting")
    };
    // The archive is small enough; its content, or the number of its files, is not.
    let bytes = Build::new().layer("+gzip", Layer::new().file("a", "").file("large", vec![0; 64 << 20]).bytes());
    let files = (0..500).fold(Layer::new(), |layer, number| layer.file(&format!("f{number}"), ""));
    for (options, build) in [("size=48m", bytes), ("size=48m,nr_inodes=200", Build::of([files]))] {
        if !is_root() || !mount(options) {
            may(false, "mounting");
            return;
        }
        let store = Store::open(&bench.path("small/store")).unwrap();
        let error = store.load(&build.write(&bench.path("layout")), None).map(drop);
        let left: Vec<String> = tree(&bench.path("small/store"));
        drop(store);
        assert!(Command::new("umount").arg(bench.path("small")).status().unwrap().success());
        assert!(error.unwrap_err().to_string().contains("the disk is full"), "{options}");
        assert!(left.iter().all(|path| !path.starts_with("tmp/") && !path.starts_with("layers/")), "{left:?}");
    }
}

#[test]
fn what_is_no_image_is_described() {
    let bench = Bench::new();
    let cases: [(&str, Vec<u8>, &str); 6] = [
        ("empty", Vec::new(), "an empty file"),
        ("gzip", gzip(b"x"), "gunzip"),
        ("elf", b"\x7fELF1234".to_vec(), "a program"),
        ("json", b"{}".to_vec(), "JSON"),
        ("text", b"hello".repeat(1000), "another kind"),
        ("root.tar", Layer::new().file("etc/passwd", "").bytes(), "a tar archive without index.json"),
    ];
    for (name, bytes, expected) in cases {
        let path = bench.path(name);
        fs::write(&path, bytes).unwrap();
        let error = bench.store.load(&path, None).unwrap_err().to_string();
        assert!(error.contains("is not an image") && error.contains(expected), "{error}");
    }
    let error = bench.store.load(&bench.path("outside"), None).unwrap_err().to_string();
    assert!(error.contains("a directory without index.json"), "{error}");
    let error = bench.store.load(&bench.path("missing"), None).unwrap_err().to_string();
    assert!(error.contains("there is no"), "{error}");
}

/// One entry of a hostile layer: names and targets from a few components, so that they meet.
fn entry() -> impl Strategy<Value = (u8, String, String)> {
    let component = prop_oneof![
        4 => Just("a"), 3 => Just("b"), 1 => Just(".."), 1 => Just("."), 1 => Just(""), 1 => Just(".wh.a"), 1 => Just("outside"),
    ];
    let path = proptest::collection::vec(component, 1..5).prop_map(|parts| parts.join("/"));
    (prop_oneof![Just(b'0'), Just(b'1'), Just(b'2'), Just(b'2'), Just(b'5'), Just(b'6')], path.clone(), path)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Links in all directions, replaced and written through: whatever comes of it, it stays in the layer.
    #[test]
    fn nothing_lands_outside(entries in proptest::collection::vec(entry(), 1..24), absolute in any::<bool>()) {
        let bench = Bench::new();
        let before = tree(&bench.path("outside"));
        let root = bench.path("");
        let mut layer = Layer::new();
        for (kind, name, target) in &entries {
            let target = if absolute { format!("{}{target}", root.display()) } else { format!("../../../{target}") };
            // Links to the real outside, hard links to what may be in the layer.
            let target = if *kind == b'1' { name.chars().rev().collect() } else { target };
            layer = layer.entry(*kind, name.as_bytes(), &target.as_bytes()[..target.len().min(99)], b"", &Fields::default());
        }
        match bench.unpack(layer) {
            Ok(image) => {
                let layers = bench.path("store/layers");
                prop_assert!(image.layers()[0].starts_with(&layers));
                prop_assert_eq!(fs::read_dir(layers).unwrap().count(), 1);
            }
            Err(_) => bench.assert_nothing_left(),
        }
        prop_assert_eq!(before, tree(&bench.path("outside")));
        let mut left: Vec<_> =
            fs::read_dir(bench.path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        prop_assert_eq!(left, ["outside", "store"]);
        prop_assert_eq!(fs::read_dir(bench.path("store/tmp")).unwrap().count(), 0);
    }
}
