//! `hull disk`: disks of running containers.

use std::path::{Path, PathBuf};

use hull_sandbox::control::{Control, Request, Response};
use hull_sandbox::disks::disk_name;
use hull_sandbox::host::Host;

use crate::args::Disk;
use crate::{Error, Outcome, spec};

pub(super) fn run(args: &Disk, host: &Host) -> Outcome {
    let Disk::Resize { container, disk } = args;
    let registry = super::registry(host);
    let record = super::find_running(&registry, container)?;
    let id = disk_name(find(&record.disks, disk)?);
    let mut control = Control::connect(&registry.dir(&record.id).join("control.sock"))?;
    match control.call(&Request::ResizeDisk { id })? {
        Response::Resized { size_bytes } => println!("{size_bytes}"),
        other => {
            return Err(format!(
                "the virtual machine monitor answers {other:?}; are all parts of Hull of one version?"
            )
            .into());
        }
    }
    Ok(0)
}

/// Which of a container's disks somebody means: a file or device of the host, or one of the guest's nodes.
fn find(disks: &[PathBuf], disk: &str) -> Result<usize, Error> {
    let mut indices = 0..disks.len();
    let is_named = |index: &usize| {
        let node = spec::disk_node(*index);
        node == disk || node.strip_prefix("/dev/") == Some(disk)
    };
    let found = std::fs::canonicalize(disk).unwrap_or_else(|_| Path::new(disk).to_owned());
    indices.clone().find(is_named).or_else(|| indices.find(|index| disks[*index] == found)).ok_or_else(|| {
        let names =
            disks.iter().enumerate().map(|(index, path)| format!("{} ({})", spec::disk_node(index), path.display()));
        let names: Vec<_> = names.collect();
        let has = if names.is_empty() { "none from --disk or --mount type=disk".to_owned() } else { names.join(", ") };
        format!("the container has no disk {disk}; it has {has}").into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_file_and_by_its_name_in_the_guest() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = std::fs::canonicalize(file.path()).unwrap();
        let disks = ["/dev/gone".into(), path];
        let found = |disk: &str| find(&disks, disk);
        assert_eq!((found("vda").unwrap(), found("/dev/vdb").unwrap(), found("/dev/gone").unwrap()), (0, 1, 0));
        assert_eq!(found(file.path().to_str().unwrap()).unwrap(), 1);
        for wrong in ["vdc", "/dev/vdc", "", "/"] {
            let error = found(wrong).unwrap_err().to_string();
            assert!(error.contains("/dev/vda (/dev/gone)"), "{error}");
        }
    }
}
