//! Which containers are of one pod, by the annotations of whoever speaks CRI.

use super::*;

#[test]
fn grouping_follows_the_annotations_of_containerd_and_of_cri_o() {
    run(async {
        let (shim, _) = Shim::shared().await;
        let bundle = shim.bundle("grouped", &["/bin/sh", "-c", "cat /proc/sys/kernel/random/boot_id"]);
        let told = async |annotations: Value| {
            let out = bundle.join("out");
            std::fs::write(&out, "").unwrap();
            change(&bundle, |spec| spec["annotations"] = annotations);
            let stdout = format!("file://{}", out.display());
            let request = CreateTaskRequest { stdout, ..create("grouped", &bundle) };
            shim.tasks().create(patience(), &request).await?;
            shim.start_task("grouped", "").await.unwrap();
            shim.wait_task("grouped", "").await;
            shim.delete_task("grouped", "").await.unwrap();
            Ok(std::fs::read_to_string(out).unwrap())
        };
        let cri = |kind: &str, id: &str| json!({ "io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": id });
        let cri_o = |kind: &str, id: &str| json!({ "io.kubernetes.cri-o.ContainerType": kind, "io.kubernetes.cri-o.SandboxID": id });
        let first = told(cri("container", "shared")).await.unwrap();
        assert_eq!(first.len(), 37, "{first:?}");
        assert_eq!(told(cri_o("container", "shared")).await.unwrap(), first, "the same machine");
        for other in [cri("container", "another"), cri_o("container", "another")] {
            let (code, message) = refused(told(other).await);
            assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
        }
        // Whatever is not a member of a pod would be a machine, and this shim has one.
        for first in [cri("sandbox", "shared"), cri_o("sandbox", "shared"), json!({})] {
            let (code, message) = refused(told(first).await);
            assert_eq!(code, Code::ALREADY_EXISTS, "{message}");
        }
    });
}
