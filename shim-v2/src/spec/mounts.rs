//! Where a container's mounts come from in the guest.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use hull_sandbox::share::Volume;
use oci_spec::runtime::Mount;

use crate::error::{Error, Result};

/// A part of the host's tree that a container needs in the guest.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    /// The number of the mount among the container's.
    pub(crate) index: usize,
    pub(crate) volume: Volume,
}

/// File systems of the kernel: what the guest's own kernel shows there is what is meant.
const OF_THE_KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Where System V's and POSIX's shared memory is.
const SHARED_MEMORY: &str = "/dev/shm";

/// Has a container that shares its pod's IPC namespace see the pod's shared memory. containerd mounts that from the node, but with the
/// sandboxer `shim` leaves it at a file system of the container's own.
pub(super) fn share_memory(mounts: &mut [Mount]) {
    let own =
        |mount: &&mut Mount| mount.destination() == Path::new(SHARED_MEMORY) && mount.typ().as_deref() == Some("tmpfs");
    for mount in mounts.iter_mut().filter(own) {
        let mut options = mount.options().clone().unwrap_or_default();
        // Size and mode are those of the pod's.
        options.retain(|option| !option.contains('='));
        options.push("rbind".into());
        mount.set_typ(Some("bind".into()));
        mount.set_source(Some(SHARED_MEMORY.into()));
        mount.set_options(Some(options));
    }
}

/// Whether a file system of the node's is the one that containerd (`…/sandboxes/ID/shm`) or CRI-O (`…/userdata/shm`) makes for the shared
/// memory of a pod. What else is mounted there is a volume.
fn is_shared_memory(source: &Path) -> bool {
    let above: Vec<&OsStr> = source.iter().rev().take(3).collect();
    match above[..] {
        [shm, id, sandboxes] => shm == "shm" && (sandboxes == "sandboxes" || id == "userdata"),
        _ => false,
    }
}

/// Gives every mount whose source is on the host one in the guest.
pub(super) fn translate(mounts: &mut [Mount], place: &mut impl FnMut(&Placed) -> Result<String>) -> Result<()> {
    for (index, mount) in mounts.iter_mut().enumerate() {
        let options = mount.options().clone().unwrap_or_default();
        let is_bind = mount.typ().as_deref() == Some("bind")
            || options.iter().any(|option| option == "bind" || option == "rbind");
        if !is_bind {
            continue;
        }
        let destination = mount.destination().display().to_string();
        let Some(source) = mount.source().clone() else {
            return Err(Error::Invalid(format!("the mount at {destination} has no source")));
        };
        if !source.is_absolute() {
            return Err(Error::Invalid(format!(
                "the source {} of the mount at {destination} is not absolute",
                source.display()
            )));
        }
        if mount.destination() == Path::new(SHARED_MEMORY) && is_shared_memory(&source) {
            // What shares it is in the guest.
            mount.set_source(Some(SHARED_MEMORY.into()));
            continue;
        }
        if OF_THE_KERNEL.iter().any(|dir| source.starts_with(dir)) {
            tracing::info!("the mount at {destination} shows the guest's {}", source.display());
            continue;
        }
        let has = |names: [&str; 2]| options.iter().any(|option| names.contains(&option.as_str()));
        // In the guest there are no mounts but those that the host makes, so it is here that they are kept away.
        let (read_only, private) = (has(["ro", "rro"]), has(["private", "rprivate"]));
        let placed = Placed { index, volume: Volume { source, read_only, private, ..Default::default() } };
        mount.set_source(Some(PathBuf::from(place(&placed)?)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn sources(mounts: &Value) -> Vec<String> {
        let mut mounts: Vec<Mount> = serde_json::from_value(mounts.clone()).unwrap();
        translate(&mut mounts, &mut |placed| {
            let Volume { read_only, private, .. } = placed.volume;
            let (read_only, private) = (if read_only { "/ro" } else { "" }, if private { "/private" } else { "" });
            Ok(format!("/share/{}{read_only}{private}", placed.index))
        })
        .unwrap();
        mounts.iter().map(|mount| mount.source().clone().unwrap_or_default().display().to_string()).collect()
    }

    #[test]
    fn only_what_is_on_the_host_is_brought_into_the_guest() {
        let mounts = json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/etc/hosts", "type": "bind", "source": "/var/lib/hosts", "options": ["rbind", "ro"] },
            { "destination": "/data", "type": "none", "source": "/srv", "options": ["rbind"] },
            { "destination": "/dev/shm", "type": "bind", "source": "/run/containerd/cri/sandboxes/1/shm", "options": ["rbind"] },
            { "destination": "/host/sys", "type": "bind", "source": "/sys/fs", "options": ["rbind"] },
            { "destination": "/own", "type": "bind", "source": "/srv", "options": ["rbind", "rprivate", "rw"] },
            { "destination": "/later", "type": "bind", "source": "/srv", "options": ["rbind", "rslave", "rro"] },
        ]);
        let expected = ["proc", "/share/1/ro", "/share/2", "/dev/shm", "/sys/fs", "/share/5/private", "/share/6/ro"];
        assert_eq!(sources(&mounts), expected);
    }

    #[test]
    fn a_volume_in_the_place_of_shared_memory_is_a_volume() {
        for source in
            ["/k/pods/u/volumes/kubernetes.io~empty-dir/shm", "/data/shm", "/k/pods/u/volume-subpaths/shm/main/0"]
        {
            let mounts = json!([{ "destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind"] }]);
            assert_eq!(sources(&mounts), ["/share/0"], "{source}");
        }
    }

    #[test]
    fn shared_memory_is_the_pods_and_others_mounts_stay() {
        let mounts = json!([
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "mode=1777", "size=65536k"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
        ]);
        let mut mounts: Vec<Mount> = serde_json::from_value(mounts).unwrap();
        let other = mounts[1].clone();
        share_memory(&mut mounts);
        let expected =
            json!({ "destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["nosuid", "rbind"] });
        assert_eq!(serde_json::to_value(&mounts[0]).unwrap(), expected);
        assert_eq!(mounts[1], other);
    }

    #[test]
    fn a_source_must_be_there_and_absolute() {
        for mount in [
            json!({ "destination": "/a", "type": "bind" }),
            json!({ "destination": "/a", "type": "bind", "source": "relative" }),
        ] {
            let mut mounts: Vec<Mount> = vec![serde_json::from_value(mount).unwrap()];
            let error = translate(&mut mounts, &mut |_| Ok(String::new())).unwrap_err();
            assert!(error.to_string().contains("/a"), "{error}");
        }
    }
}
