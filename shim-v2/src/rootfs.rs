//! Roots of containers that snapshotters hand over as disks, which the guest mounts: the host's kernel never reads what is on them.
//!
//! | snapshotter | mounts |
//! |---|---|
//! | devmapper, blockfile | one, of a block device or a raw file |
//! | erofs, since containerd 2.2 | a raw file for each layer, top first, then an overlay that names them by templates; with a size for what is written, a raw file for that before them all |
//!
//! Everything else, erofs of older versions included, is mounted on the host.

use hull_sandbox::mount::FileSystem;
use hull_sandbox::root::{Base, Disk, Root, Writes};

use crate::error::{Error, Result};

/// What containerd is to leave to Hull, by the annotation `containerd.io/runtime-allow-mounts` of `-info`. Formatting the file for what is
/// written is not among it: containerd does that.
pub(crate) const ALLOWED: &str = "erofs,format/*,mkdir/*";

/// The file systems of disks that the guest's kernel has, and whether nothing can be written to them.
const DISKS: [(&str, bool); 4] = [("ext4", false), ("xfs", false), ("erofs", true), ("squashfs", true)];

/// What the guest's kernel would do of itself, and whoever reads the disk afterwards to commit it does not know of: files without their
/// contents, directories under other names, and a tie to these very layers.
const PLAIN: [(&str, &str); 3] = [("metacopy=", "off"), ("redirect_dir=", "off"), ("index=", "off")];

/// Takes mounts for a root on disks, if that is what they are.
///
/// # Errors
///
/// Names what cannot be done in the guest.
pub(crate) fn on_disks(mounts: &[FileSystem]) -> Result<Option<Root>> {
    match mounts {
        [single] if is_disk(single) => {
            let base = Base::Disks(vec![disk(single)?]);
            Ok(Some(Root { base, writes: Writes::Base, options: Vec::new() }))
        }
        [disks @ .., last] => match template(&last.fstype) {
            Some("overlay") if !disks.is_empty() && disks.iter().all(is_disk) => overlay(disks, last).map(Some),
            Some("bind") if !disks.is_empty() && disks.iter().all(is_disk) => view(disks, last).map(Some),
            Some(_) => Err(not_understood(last)),
            None => Ok(None),
        },
        [] => Ok(None),
    }
}

/// The type behind what containerd would do first, if there is any of that.
fn template(fstype: &str) -> Option<&str> {
    let mut rest = fstype;
    while let Some(inner) = ["format/", "mkdir/", "mkfs/"].iter().find_map(|before| rest.strip_prefix(before)) {
        rest = inner;
    }
    (rest.len() < fstype.len()).then_some(rest)
}

fn is_disk(mount: &FileSystem) -> bool {
    DISKS.iter().any(|(fstype, _)| *fstype == mount.fstype)
}

fn disk(mount: &FileSystem) -> Result<Disk> {
    let mut read_only = DISKS.iter().any(|(fstype, read_only)| *fstype == mount.fstype && *read_only);
    let mut options = Vec::new();
    for option in mount.options.iter().flat_map(|options| options.split(',')) {
        match option.split_once('=') {
            Some(("X-containerd.dmverity", _)) => tracing::warn!("{} is not verified by dm-verity", mount.source),
            Some(("device", _)) => {
                return Err(Error::Invalid(format!(
                    "the layers in {} are merged (device=), which the guest cannot have; switch that off in containerd's erofs snapshotter",
                    mount.source
                )));
            }
            _ if option == "ro" => read_only = true,
            // A disk is what a loop device would be, and the rest is for mount(8) and containerd.
            _ if matches!(option, "" | "loop" | "rw") || option.starts_with("X-") || option.starts_with("x-") => {}
            _ => options.push(option.to_owned()),
        }
    }
    Ok(Disk { path: mount.source.clone().into(), fstype: mount.fstype.clone(), options, read_only })
}

/// An overlay of disks, whose options name them by their places.
fn overlay(disks: &[FileSystem], last: &FileSystem) -> Result<Root> {
    let (mut lower, mut upper, mut work, mut options) = (Vec::new(), None, None, Vec::new());
    for option in &last.options {
        match option.split_once('=') {
            Some(("lowerdir", value)) => lower = places(value).ok_or_else(|| not_understood(last))?,
            Some(("upperdir", value)) => upper = Some(value),
            Some(("workdir", value)) => work = Some(value),
            _ if matches!(option.as_str(), "ro" | "rw") || option.starts_with("X-") => {}
            _ => options.push(option.clone()),
        }
    }
    // The list has the top first.
    let lower = lower.iter().rev().map(|place| disks.get(*place).ok_or_else(|| not_understood(last)));
    let lower = lower.map(|mount| Ok(Disk { read_only: true, ..disk(mount?)? })).collect::<Result<Vec<_>>>()?;
    if lower.is_empty() {
        return Err(not_understood(last));
    }
    let writes = match upper {
        None => Writes::Base,
        Some(upper) if !upper.starts_with("{{") => {
            tracing::info!("what is written to the root is kept in the guest's memory and not in {upper}");
            Writes::Memory
        }
        Some(upper) => {
            let at = |text: &str, name: &str| place(text).and_then(|(at, rest)| (rest == name).then_some(at));
            let (upper, work) = (at(upper, "/upper"), work.and_then(|work| at(work, "/work")));
            let writable = upper.filter(|upper| work == Some(*upper)).and_then(|upper| disks.get(upper));
            let writable = disk(writable.ok_or_else(|| not_understood(last))?)?;
            let missing = |(name, _): &(&str, &str)| !options.iter().any(|option| option.starts_with(name));
            let plain = PLAIN.iter().filter(|pair| missing(pair)).map(|(name, value)| format!("{name}{value}"));
            options.extend(plain.collect::<Vec<_>>());
            Writes::Disk(writable)
        }
    };
    Ok(Root { base: Base::Disks(lower), writes, options })
}

/// One of the disks, as it is.
fn view(disks: &[FileSystem], last: &FileSystem) -> Result<Root> {
    let shown = place(&last.source).filter(|(_, rest)| rest.is_empty()).and_then(|(at, _)| disks.get(at));
    let shown = Disk { read_only: true, ..disk(shown.ok_or_else(|| not_understood(last))?)? };
    Ok(Root { base: Base::Disks(vec![shown]), writes: Writes::Base, options: Vec::new() })
}

fn not_understood(mount: &FileSystem) -> Error {
    Error::Invalid(format!(
        "the mount {} of the container's root ({}) is not one that Hull knows; use another snapshotter for it, such as overlayfs",
        mount.fstype,
        mount.options.join(",")
    ))
}

/// Reads `{{ mount N }}` and what comes behind it.
fn place(text: &str) -> Option<(usize, &str)> {
    let (words, rest) = text.strip_prefix("{{")?.split_once("}}")?;
    match words.split_whitespace().collect::<Vec<_>>()[..] {
        ["mount", at] => Some((at.parse().ok()?, rest)),
        _ => None,
    }
}

/// Reads `{{ mount N }}`, or `{{ overlay FIRST LAST }}`, which may count down.
fn places(text: &str) -> Option<Vec<usize>> {
    if let Some((at, "")) = place(text) {
        return Some(vec![at]);
    }
    let (words, "") = text.strip_prefix("{{")?.split_once("}}")? else { return None };
    let ["overlay", first, last] = words.split_whitespace().collect::<Vec<_>>()[..] else { return None };
    let (first, last): (u8, u8) = (first.parse().ok()?, last.parse().ok()?);
    let places = |from: u8, to: u8| (from..=to).map(usize::from);
    Some(if first <= last { places(first, last).collect() } else { places(last, first).rev().collect() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mount(fstype: &str, source: &str, options: &[&str]) -> FileSystem {
        let options = options.iter().map(ToString::to_string).collect();
        FileSystem { fstype: fstype.into(), source: source.into(), options }
    }

    fn layer(name: &str) -> FileSystem {
        mount("erofs", name, &["ro", "loop"])
    }

    fn of(mounts: &[FileSystem]) -> Root {
        on_disks(mounts).unwrap().unwrap()
    }

    fn names(root: &Root) -> Vec<String> {
        match &root.base {
            Base::Disks(disks) => disks.iter().map(|disk| disk.path.display().to_string()).collect(),
            Base::Host(_) => Vec::new(),
        }
    }

    #[test]
    fn one_mount_of_a_disk_is_the_root() {
        let root = of(&[mount("ext4", "/snapshots/7", &["loop", "rw", "discard"])]);
        let disk = Disk {
            path: "/snapshots/7".into(),
            fstype: "ext4".into(),
            options: vec!["discard".into()],
            read_only: false,
        };
        assert_eq!(root, Root { base: Base::Disks(vec![disk]), writes: Writes::Base, options: Vec::new() });
        for (mount, read_only) in [
            (mount("xfs", "/dev/mapper/a", &["nouuid"]), false),
            (mount("ext4", "/dev/mapper/a", &["nodev,ro"]), true),
            (mount("erofs", "/layer", &[]), true),
        ] {
            let Base::Disks(disks) = of(&[mount]).base else { panic!("no disks") };
            assert_eq!(disks[0].read_only, read_only);
        }
    }

    #[test]
    fn what_is_no_disk_is_the_hosts_to_mount() {
        for mounts in [
            vec![],
            vec![mount("bind", "/dir", &["rbind", "rw"])],
            vec![mount("overlay", "overlay", &["lowerdir=/a:/b", "upperdir=/u", "workdir=/w"])],
            vec![mount("btrfs", "/dev/a", &[])],
        ] {
            assert_eq!(on_disks(&mounts).unwrap(), None, "{mounts:?}");
        }
    }

    #[test]
    fn layers_below_a_directory_of_the_host_are_written_to_in_memory() {
        let options = ["workdir=/s/4/work", "upperdir=/s/4/fs", "lowerdir={{ overlay 0 1 }}", "index=off"];
        let root = of(&[layer("top"), layer("bottom"), mount("format/mkdir/overlay", "overlay", &options)]);
        assert_eq!(names(&root), ["bottom", "top"]);
        assert_eq!((root.writes, root.options), (Writes::Memory, vec!["index=off".to_owned()]));
        let options = ["workdir=/s/4/work", "upperdir=/s/4/fs", "lowerdir={{ mount 0 }}"];
        assert_eq!(names(&of(&[layer("only"), mount("format/mkdir/overlay", "overlay", &options)])), ["only"]);
    }

    #[test]
    fn a_disk_for_what_is_written_is_used() {
        let options = [
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 2 }}",
            "index=on",
        ];
        let writable = mount("ext4", "rw", &["X-containerd.mkfs.size=1", "rw", "loop"]);
        let last = mount("format/mkdir/overlay", "overlay", &options);
        let root = of(&[writable, layer("top"), layer("bottom"), last]);
        assert_eq!(names(&root), ["bottom", "top"]);
        let Writes::Disk(disk) = root.writes else { panic!("{:?}", root.writes) };
        assert_eq!((disk.path.to_str(), disk.read_only, disk.options.len()), (Some("rw"), false, 0));
        // It is read by others afterwards, so it is to hold all that was written, in the plainest form that is not asked otherwise.
        assert_eq!(root.options, ["index=on", "metacopy=off", "redirect_dir=off"]);
    }

    #[test]
    fn a_view_shows_one_layer_or_all_and_takes_no_changes() {
        let shown = of(&[layer("merged"), mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"])]);
        assert_eq!((names(&shown), shown.writes), (vec!["merged".to_owned()], Writes::Base));
        let all = of(&[
            layer("top"),
            layer("bottom"),
            mount("format/mkdir/overlay", "overlay", &["lowerdir={{ overlay 0 1 }}"]),
        ]);
        assert_eq!((names(&all), all.writes), (vec!["bottom".to_owned(), "top".to_owned()], Writes::Base));
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        let overlay = |options: &[&str]| mount("format/mkdir/overlay", "overlay", options);
        for mounts in [
            vec![layer("a"), overlay(&["lowerdir={{ overlay 0 5 }}"])],
            vec![layer("a"), overlay(&["lowerdir={{ source 0 }}"])],
            vec![layer("a"), overlay(&[])],
            vec![
                layer("a"),
                overlay(&["lowerdir={{ mount 0 }}", "upperdir={{ mount 0 }}/up", "workdir={{ mount 0 }}/work"]),
            ],
            vec![
                layer("a"),
                overlay(&["lowerdir={{ mount 0 }}", "upperdir={{ mount 9 }}/upper", "workdir={{ mount 9 }}/work"]),
            ],
            vec![layer("a"), mount("format/bind", "{{ mount 0 }}/upper", &["rbind"])],
            vec![mount("bind", "/a", &[]), overlay(&["lowerdir={{ mount 0 }}"])],
            vec![mount("mkfs/ext4", "/a", &[])],
        ] {
            let error = on_disks(&mounts).unwrap_err();
            assert!(error.to_string().contains(&mounts.last().unwrap().fstype), "{error}");
        }
        let merged = mount("erofs", "/fsmeta", &["ro", "loop", "device=/layer"]);
        assert!(on_disks(&[merged]).unwrap_err().to_string().contains("merged"));
    }

    proptest! {
        #[test]
        fn no_template_makes_the_reader_panic(text in "\\PC*", numbers in "\\{\\{ overlay [0-9]{1,9} [0-9]{1,9} \\}\\}") {
            let _ = (place(&text), places(&text), places(&numbers));
        }
    }
}
