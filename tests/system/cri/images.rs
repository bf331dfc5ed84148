//! Images that the kubelet has pulled.

use std::path::Path;

use fixture::cri::{Pod, cri, handlers};
use fixture::netns::host;
use fixture::registry::{ADDRESS, Registry};

#[test]
fn an_image_that_cri_pulls_from_a_registry_runs() {
    let registry = Registry::start();
    registry.push(Path::new(&fixture::busybox()), "hull/busybox", "cri");
    let reference = format!("{ADDRESS}/hull/busybox:cri");
    let unknown = cri().pull(&format!("{ADDRESS}/hull/unknown:cri")).unwrap_err();
    assert!(unknown.message().contains("hull/unknown:cri"), "{unknown}");
    cri().pull(&reference).unwrap();
    // It is not needed any more.
    drop(registry);
    let pod = Pod::start(handlers()[0], |_| {});
    let container = pod.run("pulled", "echo runs; exec sleep 1000", |config| {
        config.image.mut_or_insert_default().image.clone_from(&reference);
    });
    container.logs("stdout F runs");
    assert_eq!(container.exec("cat /etc/group"), "root:x:0:\nnogroup:x:65534:");
    pod.end();
    // Not by RemoveImage, which takes all other names of the same image along.
    host(&format!("ctr -n k8s.io image rm {reference}"));
}
