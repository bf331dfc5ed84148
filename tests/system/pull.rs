//! Images from a registry.

use std::path::Path;

use fixture::registry::{ADDRESS, Registry};
use fixture::terminal::Terminal;
use fixture::{busybox, hull};

/// One test for all: there is one address.
#[test]
fn an_image_is_pulled_from_a_registry_and_run() {
    let registry = Registry::start();
    registry.push(Path::new(&busybox()), "hull/busybox", "test");
    let reference = format!("{ADDRESS}/hull/busybox:test");

    hull(["run", "--rm", &reference, "true"]).run().failed(&[&format!("`hull image pull {reference}`")]);
    hull(["image", "pull", &format!("{ADDRESS}/hull/other")]).run().failed(&["404"]);
    hull(["image", "pull", "hull/busybox:test"]).run().failed(&["names no registry"]);

    // Whoever sits at a terminal is shown a bar for each layer that comes; with a store of its own, all do.
    let store = tempfile::tempdir().unwrap();
    let store = store.path().to_str().unwrap();
    let mut terminal = Terminal::run_with(&[("HULL_DATA_DIR", store)], ["image", "pull", &reference]);
    terminal.wait_for(" / ");
    terminal.wait_for("done");
    assert_eq!(terminal.finish(), 0);
    let digest = hull(["image", "pull", "--quiet", &reference]).run().ok();
    let listed = hull(["image", "ls", "--json"]).run().ok();
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let ours = listed.as_array().unwrap().iter().find(|image| image["name"] == reference.as_str()).unwrap();
    assert_eq!(ours["digest"], digest.as_str());

    // The registry is not needed any more.
    drop(registry);
    let said = hull(["run", "--rm", "--memory", "128", &reference, "sh", "-c", "echo from a registry"]).run();
    assert_eq!(said.ok(), "from a registry");
    hull(["image", "rm", &reference]).run().ok();
    hull(["run", "--rm", &reference, "true"]).run().failed(&["no image"]);
}
