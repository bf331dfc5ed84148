//! Images that the kubelet has pulled.

use std::path::Path;

use fixture::cri::{Pod, cri, handler_and_runc};
use fixture::netns::host;
use fixture::registry::{ADDRESS, Registry};

#[test]
fn an_image_that_cri_pulls_from_a_registry_runs_and_is_stopped_by_its_own_signal() {
    let registry = Registry::start();
    let layout = fixture::image::with_config(Path::new(&fixture::busybox()), |config| {
        config["StopSignal"] = "SIGUSR1".into();
    });
    registry.push(layout.path(), "hull/busybox", "cri");
    let reference = format!("{ADDRESS}/hull/busybox:cri");
    let unknown = cri().pull(&format!("{ADDRESS}/hull/unknown:cri")).unwrap_err();
    assert!(unknown.message().contains("hull/unknown:cri"), "{unknown}");
    cri().pull(&reference).unwrap();
    // It is not needed any more.
    drop(registry);
    for handler in handler_and_runc() {
        let pod = Pod::start(handler, |_| {});
        let script = "trap 'echo asked; exit 7' USR1; trap 'exit 8' TERM; echo runs; while :; do sleep 0.1; done";
        let container = pod.run("pulled", script, |config| {
            config.image.mut_or_insert_default().image.clone_from(&reference);
        });
        container.logs("stdout F runs");
        assert_eq!(container.exec("cat /etc/group"), "root:x:0:\nnogroup:x:65534:", "{handler}");
        container.stop(60);
        assert_eq!(container.ended().exit_code, 7, "{handler}");
        assert_eq!(container.log_lines(), ["stdout F runs", "stdout F asked"], "{handler}");
        pod.end();
    }
    // Not by RemoveImage, which takes all other names of the same image along.
    host(&format!("ctr -n k8s.io image rm {reference}"));
}
