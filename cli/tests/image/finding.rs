//! Names, digests, listing and removal.

use std::fs;

use hull_cli::image::{ImageError, Store};

use crate::support::*;

fn named(name: &str) -> Build {
    let mut build = Build::of([Layer::new().file("shared", ""), Layer::new().file("name", name)]);
    build.name = Some(name.to_owned());
    build
}

fn layer_count(bench: &Bench) -> usize {
    fs::read_dir(bench.path("store/layers")).unwrap().count()
}

#[test]
fn a_store_that_is_not_there_is_empty() {
    let bench = Bench::new();
    assert!(bench.store.list().unwrap().is_empty());
    assert!(matches!(bench.store.resolve("debian"), Err(ImageError::NoSuchImage(_))));
    assert!(matches!(bench.store.remove("debian"), Err(ImageError::NoSuchImage(_))));
    assert!(!bench.path("store").exists(), "looking must not make it");
}

#[test]
fn images_are_found_by_name_end_of_name_and_digest() {
    let bench = Bench::new();
    let one = bench.load(&named("mirror.example/library/one:1")).unwrap();
    let two = bench.store.load(&named("ignored").write(&bench.path("two")), Some("two")).unwrap();
    assert_eq!((one.name(), two.name()), ("mirror.example/library/one:1", "two:latest"));
    for reference in
        ["mirror.example/library/one:1", "library/one:1", "one:1", &one.digest().to_string(), &one.digest().hex()[..12]]
    {
        assert_eq!(bench.store.resolve(reference).unwrap().digest(), one.digest(), "{reference}");
    }
    for reference in ["two", "two:latest"] {
        assert_eq!(bench.store.resolve(reference).unwrap().digest(), two.digest(), "{reference}");
    }
    for reference in ["one", "one:2", "ne:1", "mirror.example", "zzzz", "sha256:", "", "-x"] {
        let error = bench.store.resolve(reference).unwrap_err();
        assert!(matches!(error, ImageError::NoSuchImage(_)), "{reference}: {error}");
    }
}

#[test]
fn what_could_be_several_must_be_said_better() {
    let bench = Bench::new();
    bench.load(&named("a.example/app:1")).unwrap();
    bench.load(&named("b.example/app:1")).unwrap();
    let error = bench.store.resolve("app:1").unwrap_err().to_string();
    assert!(
        error.contains("a.example/app:1, b.example/app:1") || error.contains("b.example/app:1, a.example/app:1"),
        "{error}"
    );
}

#[test]
fn paths_are_loaded_without_a_name() {
    let bench = Bench::new();
    let path = named("inner:1").write(&bench.path("layout"));
    let image = bench.store.resolve(path.to_str().unwrap()).unwrap();
    assert_eq!(image.name(), image.digest().to_string());
    let listed = bench.store.list().unwrap();
    assert_eq!((listed.len(), listed[0].name.as_deref()), (1, None));
    assert!(matches!(bench.store.resolve("./missing"), Err(ImageError::Source(_))));
}

#[test]
fn a_name_moves_to_the_image_loaded_last() {
    let bench = Bench::new();
    let (first, second) = (named("x").write(&bench.path("1")), named("y").write(&bench.path("2")));
    let old = bench.store.load(&first, Some("app")).unwrap().digest();
    let new = bench.store.load(&second, Some("app")).unwrap().digest();
    assert_eq!(bench.store.resolve("app").unwrap().digest(), new);
    let listed = bench.store.list().unwrap();
    let rows: Vec<_> = listed.iter().map(|image| (image.name.as_deref(), image.digest.clone())).collect();
    assert_eq!(rows, [(Some("app:latest"), new.to_string()), (None, old.to_string())]);
    assert!(listed[0].size_bytes > 0 && listed[0].created.as_deref() == Some("2024-01-02T03:04:05Z"));
}

#[test]
fn a_known_image_is_recognised_without_its_layers() {
    let bench = Bench::new();
    let build = named("app:1");
    let path = build.write(&bench.path("layout"));
    bench.store.load(&path, None).unwrap();
    for layer in &build.layers {
        fs::remove_file(path.join("blobs/sha256").join(hull_cli::image::Digest::of(&layer.bytes).hex())).unwrap();
    }
    let again = bench.store.load(&path, Some("again")).unwrap();
    assert_eq!((again.name(), again.layers().len()), ("again:latest", 2));
    // The same content in another form is the same image.
    let docker = write_archive(&bench.path("docker.tar"), &build.docker_files());
    assert_eq!(bench.store.load(&docker, None).unwrap().digest(), again.digest());
    assert_eq!(layer_count(&bench), 2);
}

#[test]
fn removal_keeps_what_others_need() {
    let bench = Bench::new();
    drop(bench.load(&named("one:1")).unwrap());
    drop(bench.load(&named("two:1")).unwrap());
    assert_eq!(layer_count(&bench), 3);
    bench.store.remove("one:1").unwrap();
    assert_eq!(layer_count(&bench), 2);
    assert!(bench.store.resolve("two:1").is_ok() && bench.store.resolve("one:1").is_err());
    bench.store.remove("two").unwrap_err();
    bench.store.remove("two:1").unwrap();
    bench.assert_nothing_left();
    assert_eq!(fs::read_dir(bench.path("store/uses")).unwrap().count(), 0);
}

#[test]
fn an_image_goes_with_its_last_name() {
    let bench = Bench::new();
    let path = named("one:1").write(&bench.path("layout"));
    let digest = bench.store.load(&path, None).unwrap().digest().to_string();
    drop(bench.store.load(&path, Some("second")).unwrap());
    bench.store.remove("one:1").unwrap();
    assert_eq!(bench.store.resolve("second").unwrap().digest().to_string(), digest);
    drop(bench.store.load(&path, None).unwrap());
    // By digest all names go.
    bench.store.remove(&digest).unwrap();
    assert!(bench.store.list().unwrap().is_empty());
    bench.assert_nothing_left();
}

#[test]
fn layers_in_use_outlive_their_image() {
    let bench = Bench::new();
    let image = bench.load(&named("one:1")).unwrap();
    let (layers, hold) = (image.layers().to_vec(), image.hold());
    drop(image);
    bench.store.remove("one:1").unwrap();
    assert!(bench.store.list().unwrap().is_empty());
    assert!(layers.iter().all(|layer| layer.exists()));
    assert_eq!(hold.fds().count(), 2);
    drop(hold);
    Store::open(&bench.path("store")).unwrap().collect_garbage().unwrap();
    bench.assert_nothing_left();
}

#[test]
fn a_damaged_record_hinders_no_other_image() {
    let bench = Bench::new();
    let image = bench.load(&named("one:1")).unwrap();
    fs::write(bench.path("store/images").join(format!("{}.json", image.digest().hex())), "{").unwrap();
    drop(image);
    bench.load(&named("two:1")).unwrap();
    assert!(bench.store.resolve("two:1").is_ok());
    // Which layers it had is not known any more, so none may go.
    assert_eq!(layer_count(&bench), 3);
    bench.store.remove("one:1").unwrap();
    assert_eq!((layer_count(&bench), bench.store.list().unwrap().len()), (2, 1));
}

#[test]
fn a_damaged_record_is_named() {
    let bench = Bench::new();
    let image = bench.load(&named("one:1")).unwrap();
    let record = bench.path("store/images").join(format!("{}.json", image.digest().hex()));
    fs::write(&record, "{").unwrap();
    let error = bench.store.resolve("one:1").unwrap_err().to_string();
    assert!(error.contains(record.to_str().unwrap()) && error.contains("load the image again"), "{error}");
}
