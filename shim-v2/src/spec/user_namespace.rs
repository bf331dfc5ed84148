//! A pod's user namespace (`hostUsers: false`): the guest is it.
//!
//! What such a namespace is for, that root of a container is nobody on the node, holds of every guest. So its containers are users of the
//! guest as they are, and the owners of their files too: containerd has the mount that makes the root map them, and the mounts of volumes,
//! and Hull leaves both out. See decision 12.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hull_sandbox::mount::FileSystem;
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};

use super::namespace;
use crate::error::{Error, Result};

/// Options of a mount for containerd, which map the owners of its files.
const MAPPINGS: [&str; 2] = ["uidmap=", "gidmap="];

/// Whether owners are to be mapped by whoever mounts the container's root, rather than having been changed on disk.
pub(crate) fn is_mapped<'a>(options: impl IntoIterator<Item = &'a String>) -> bool {
    options.into_iter().any(|option| MAPPINGS.iter().any(|mapping| option.starts_with(mapping)))
}

/// What is said of one whose snapshotter has changed the owners of the image's files.
pub(crate) fn changed_owners() -> Error {
    Error::Invalid(
        "the image's files have been given to the users of the pod's user namespace (hostUsers: false), which the guest does not have; \
         that is not needed with containerd 2, its overlayfs snapshotter and Linux 5.19"
            .into(),
    )
}

/// Takes the user namespace out of a specification, and all mapping of owners with it. A lone container's own whose files have been
/// given to its users stays, and is made in the guest.
///
/// # Errors
///
/// Fails for a pod's whose files have been given to its users, and where the writable layer cannot be given back.
pub(crate) fn absorb(spec: &mut Spec, rootfs: &mut [FileSystem]) -> Result<()> {
    let Some(user) = namespace(spec, LinuxNamespaceType::User) else { return Ok(()) };
    if !is_mapped(rootfs.iter().flat_map(|file_system| &file_system.options)) {
        return if user.path().is_some() { Err(changed_owners()) } else { Ok(()) };
    }
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let root = |mappings: &Option<Vec<LinuxIdMapping>>| {
        mappings.iter().flatten().find(|mapping| mapping.container_id() == 0).map(LinuxIdMapping::host_id)
    };
    let roots = (root(linux.uid_mappings()), root(linux.gid_mappings()));
    for file_system in rootfs {
        for upper in file_system.options.iter().filter_map(|option| option.strip_prefix("upperdir=")) {
            give_back(Path::new(upper), roots).map_err(Error::host(format!("cannot make {upper} root's")))?;
        }
        file_system.options.retain(|option| !is_mapped([option]));
    }
    linux.set_uid_mappings(None).set_gid_mappings(None);
    if let Some(namespaces) = linux.namespaces_mut() {
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::User);
    }
    for mount in spec.mounts_mut().iter_mut().flatten() {
        mount.set_uid_mappings(None).set_gid_mappings(None);
    }
    Ok(())
}

/// The directory that the container sees as `/` was made for the root of the user namespace.
fn give_back(directory: &Path, roots: (Option<u32>, Option<u32>)) -> std::io::Result<()> {
    let found = std::fs::symlink_metadata(directory)?;
    let uid = (Some(found.uid()) == roots.0).then_some(0);
    let gid = (Some(found.gid()) == roots.1).then_some(0);
    std::os::unix::fs::lchown(directory, uid, gid)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(user: Value) -> Spec {
        let ids = json!([{ "containerID": 0, "hostID": 70_000, "size": 65_536 }]);
        let spec = json!({
            "ociVersion": "1.2.0",
            "mounts": [{ "destination": "/v", "type": "bind", "source": "/srv", "uidMappings": ids, "gidMappings": ids }],
            "linux": { "namespaces": [{ "type": "mount" }, user], "uidMappings": ids, "gidMappings": ids },
        });
        serde_json::from_value(spec).unwrap()
    }

    fn overlay(options: &[&str]) -> [FileSystem; 1] {
        let options = options.iter().map(ToString::to_string).collect();
        [FileSystem { fstype: "overlay".into(), source: "overlay".into(), options }]
    }

    #[test]
    fn a_guest_takes_the_place_of_a_namespace_whose_owners_are_mapped() {
        let upper = tempfile::tempdir().unwrap();
        let upper_option = format!("upperdir={}", upper.path().display());
        for user in [json!({ "type": "user", "path": "/proc/7/ns/user" }), json!({ "type": "user" })] {
            let mut spec = spec(user);
            let mut rootfs =
                overlay(&["lowerdir=/a:/b", &upper_option, "uidmap=0:70000:65536", "gidmap=0:70000:65536"]);
            absorb(&mut spec, &mut rootfs).unwrap();
            assert_eq!(rootfs, overlay(&["lowerdir=/a:/b", &upper_option]));
            let spec = serde_json::to_value(spec).unwrap();
            assert_eq!(spec["linux"], json!({ "namespaces": [{ "type": "mount" }] }));
            assert_eq!(spec["mounts"], json!([{ "destination": "/v", "type": "bind", "source": "/srv" }]));
        }
    }

    #[test]
    fn files_that_were_given_away_are_refused_in_a_pod_and_left_to_a_lone_container() {
        let mut pods = spec(json!({ "type": "user", "path": "/proc/7/ns/user" }));
        let refused = absorb(&mut pods, &mut overlay(&["lowerdir=/a"])).unwrap_err();
        assert!(refused.to_string().contains("hostUsers"), "{refused}");
        let mut own = spec(json!({ "type": "user" }));
        let before = own.clone();
        absorb(&mut own, &mut overlay(&["lowerdir=/a"])).unwrap();
        assert_eq!(own, before);
    }
}
