//! Threads and processes that use one store, and processes that die while they do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hull_cli::image::{Image, Store};

use crate::support::*;

const STORE: &str = "HULL_TEST_STORE";
const SOURCE: &str = "HULL_TEST_SOURCE";

/// An image whose layers take a while.
fn slow() -> Build {
    let layer = |number: usize| {
        (0..2000).fold(Layer::new(), |layer, file| layer.file(&format!("l{number}/d{}/f{file}", file % 50), "content"))
    };
    Build::new().layer("+gzip", layer(0).bytes()).layer("+zstd", layer(1).bytes()).layer("", layer(2).bytes())
}

/// What the child processes of the other tests do; nothing in a run of all tests.
#[test]
fn child() {
    let (Some(store), Some(source)) = (std::env::var_os(STORE), std::env::var_os(SOURCE)) else { return };
    let image = Store::open(Path::new(&store)).unwrap().load(Path::new(&source), Some("shared")).unwrap();
    assert_complete(image.layers());
}

fn start(store: &Path, source: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sharing::child", "--nocapture"])
        .envs([(STORE, store), (SOURCE, source)])
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn assert_complete(layers: &[PathBuf]) {
    assert_eq!(layers.len(), 3);
    for (number, layer) in layers.iter().enumerate() {
        assert_eq!(tree(layer).len(), 1 + 50 + 2000, "layer {number}");
    }
}

fn count(directory: PathBuf) -> usize {
    fs::read_dir(directory).into_iter().flatten().count()
}

/// Each as a container would that does not end: whoever comes while another unpacks must not wait for the end of its use.
#[test]
fn many_threads_load_one_image_once_and_use_it_together() {
    let bench = Bench::new();
    let source = slow().write(&bench.path("layout"));
    let (loaded, images) = mpsc::channel();
    for number in 0..6 {
        let (store, source, loaded) = (bench.store.clone(), source.clone(), loaded.clone());
        std::thread::spawn(move || {
            let image = store.load(&source, Some(&format!("name-{number}"))).unwrap();
            loaded.send(image).unwrap();
        });
    }
    drop(loaded);
    let next = || images.recv_timeout(Duration::from_secs(60)).expect("one waits for the others' use to end");
    let in_use: Vec<Image> = (0..6).map(|_| next()).collect();
    in_use.iter().for_each(|image| assert_complete(image.layers()));
    assert_eq!(bench.store.list().unwrap().len(), 6);
    assert_eq!((count(bench.path("store/layers")), count(bench.path("store/tmp"))), (3, 0));
}

#[test]
fn many_processes_load_one_image_once() {
    let bench = Bench::new();
    let source = slow().write(&bench.path("layout"));
    let children: Vec<Child> = (0..4).map(|_| start(&bench.path("store"), &source)).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    assert_eq!((count(bench.path("store/layers")), count(bench.path("store/tmp"))), (3, 0));
    assert_complete(bench.store.resolve("shared").unwrap().layers());
}

/// Twenty that looked whether the layer was there once kept each other from unpacking it for minutes.
#[test]
fn who_only_looks_whether_a_layer_is_there_keeps_nobody_from_unpacking_it() {
    let bench = Bench::new();
    let source = Build::of([Layer::new().file("a", "")]).write(&bench.path("layout"));
    let image = bench.store.load(&source, Some("app")).unwrap();
    let looks = bench.path("store/uses").join(image.layers()[0].file_name().unwrap());
    drop(image);
    bench.store.remove("app").unwrap();
    let looks = fs::File::create(looks).unwrap();
    looks.lock_shared().unwrap();
    let (loaded, image) = mpsc::channel();
    let store = bench.store.clone();
    std::thread::spawn(move || {
        let image = store.load(&source, None).unwrap();
        loaded.send(image).unwrap();
    });
    let image: Image = image.recv_timeout(Duration::from_secs(60)).expect("it waits for who looks");
    assert!(image.layers()[0].join("a").exists());
}

#[test]
fn a_process_killed_while_unpacking_leaves_a_store_that_works() {
    let bench = Bench::new();
    let source = slow().write(&bench.path("layout"));
    for layers_first in 0..3 {
        let mut child = start(&bench.path("store"), &source);
        let deadline = Instant::now() + Duration::from_secs(60);
        // In the middle of a layer, after some whole ones.
        while count(bench.path("store/layers")) < layers_first || count(bench.path("store/tmp")) == 0 {
            assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "it was over too soon");
            std::thread::sleep(Duration::from_micros(200));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(bench.store.list().unwrap().is_empty(), "half an image shows");
    }
    assert!(count(bench.path("store/tmp")) > 0, "nothing to clean: the test does not test");
    let store = Store::open(&bench.path("store")).unwrap();
    assert_eq!(count(bench.path("store/tmp")), 0);
    let image = store.load(&source, None).unwrap();
    assert_complete(image.layers());
}

#[test]
fn loading_and_removing_at_once_never_breaks_an_image_in_hand() {
    let bench = Bench::new();
    let build = Build::of([Layer::new().file("a", ""), Layer::new().file("b", "")]);
    let source = build.write(&bench.path("layout"));
    let end = Instant::now() + Duration::from_millis(700);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while Instant::now() < end {
                    let image = bench.store.load(&source, Some("app")).unwrap();
                    assert!(image.layers()[0].join("a").exists() && image.layers()[1].join("b").exists());
                }
            });
        }
        scope.spawn(|| {
            while Instant::now() < end {
                // Sometimes there is nothing to remove.
                let _ = bench.store.remove("app");
                Store::open(&bench.path("store")).unwrap();
            }
        });
    });
    drop(bench.store.load(&source, Some("app")).unwrap());
    for image in bench.store.list().unwrap() {
        let _ = bench.store.remove(&image.digest);
    }
    bench.assert_nothing_left();
}
