//! What `hull run` may mount in a container, as podman spells it: `--volume`, `--mount`, `--tmpfs`, `--shm-size`.
//!
//! Everything is checked here, before a VM exists; only what an image or a file is can turn out later.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use hull_sandbox::disks::{DiskCache, DiskFile};
use hull_sandbox::share::{Caching, Owners, Volume};

use crate::Error;

/// Something to be mounted in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// In the container.
    pub destination: String,
    pub kind: Kind,
    /// For mount(2) in the guest.
    pub options: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file or directory of the host.
    Bind(Volume, Caching),
    /// Memory of the guest.
    Tmpfs,
    /// An image's files, which nobody can change.
    Image(String),
    /// A disk in `disks`, with a file system of this type.
    Disk { index: usize, fstype: String },
}

/// All mounts and disks of a container, in the order in which they are to be made.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mounts {
    pub mounts: Vec<Mount>,
    /// Raw files or block devices.
    pub disks: Vec<DiskFile>,
}

/// A virtio-blk device has a PCI slot, of which there are 32 for all devices.
const DISKS_MAX: usize = 16;
/// Longest serial number of a disk (virtio 1.3, section 5.2.6).
const SERIAL_BYTES_MAX: usize = 20;
/// Options of tmpfs(5) that take a value, besides the size.
const TMPFS_VALUES: [&str; 4] = ["mode", "nr_inodes", "nr_blocks", "uid"];
const FLAGS: [&str; 12] = [
    "exec",
    "noexec",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "strictatime",
];

impl Mounts {
    /// Reads all that the options say.
    pub(crate) fn parse(
        volumes: &[String],
        mounts: &[String],
        tmpfs: &[String],
        disks: &[String],
    ) -> Result<Self, Error> {
        let mut all = Self::default();
        for text in volumes {
            all.mounts.push(volume(text)?);
        }
        for text in tmpfs {
            all.mounts.push(memory(text)?);
        }
        for text in disks {
            all.add_disk(disk(text)?)?;
        }
        for text in mounts {
            all.mount(text)?;
        }
        let mut seen = HashSet::new();
        if let Some(twice) = all.mounts.iter().find(|mount| !seen.insert(normal(&mount.destination))) {
            return Err(format!("two mounts at {}; choose another place for one", twice.destination).into());
        }
        // What lies in another mount must come after it.
        all.mounts.sort_by_key(|mount| Path::new(&mount.destination).components().count());
        Ok(all)
    }

    /// The places of the images to be mounted.
    pub(crate) fn images(&self) -> impl Iterator<Item = &str> {
        self.mounts.iter().filter_map(|mount| match &mount.kind {
            Kind::Image(reference) => Some(reference.as_str()),
            _ => None,
        })
    }

    /// The policies other than the usual one that volumes want.
    pub(crate) fn caching(&self) -> Vec<Caching> {
        let wanted = |caching: &Caching| {
            self.mounts.iter().any(|mount| matches!(&mount.kind, Kind::Bind(_, wanted) if wanted == caching))
        };
        [Caching::Never, Caching::Always].into_iter().filter(wanted).collect()
    }

    /// Whether something takes the place of one of the usual mounts.
    pub(crate) fn replaces(&self, destination: &str) -> bool {
        self.mounts.iter().any(|mount| normal(&mount.destination) == destination)
    }

    fn add_disk(&mut self, disk: DiskFile) -> Result<usize, Error> {
        let DiskFile { path, read_only, cache, serial } = disk;
        let wrong = |why: String| Error::from(format!("the disk {} cannot be used: {why}", path.display()));
        let found = std::fs::canonicalize(&path).map_err(|error| wrong(error.to_string()))?;
        let kind = std::fs::metadata(&found).map_err(|error| wrong(error.to_string()))?.file_type();
        if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
            return Err(wrong("it is neither a file nor a block device; give a raw image".to_owned()));
        }
        if self.disks.len() == DISKS_MAX {
            return Err(format!("more than {DISKS_MAX} disks; a guest has no room for them").into());
        }
        // Two writers of one file, each with a cache of its own, destroy what is on it.
        if self.disks.iter().any(|other| other.path == found && !(other.read_only && read_only)) {
            return Err(wrong("it is given twice; give it once, or each time with ro".to_owned()));
        }
        self.disks.push(DiskFile { path: found, read_only, cache, serial });
        Ok(self.disks.len() - 1)
    }

    /// Reads `type=TYPE,KEY=VALUE,…`.
    fn mount(&mut self, text: &str) -> Result<(), Error> {
        let fields = Fields::parse(text)?;
        let source = fields.one(&["source", "src"])?;
        let target = fields.one(&["target", "dst", "destination"])?;
        let read_only = fields.read_only()?;
        let place = || place(target.ok_or_else(|| format!("{text} has no target; say where with target=PATH"))?);
        let needed = || source.ok_or_else(|| Error::from(format!("{text} has no source; say what with source=")));
        let kind = match fields.one(&["type"])? {
            Some("bind") => {
                fields.only(text, &["cache", "uid", "gid"])?;
                let caching = fields.one(&["cache"])?.map(caching).transpose()?.unwrap_or_default();
                let id = |name| fields.one(&[name])?.map(|value| id(name, value)).transpose();
                let owners = Owners { uid: id("uid")?, gid: id("gid")? };
                Kind::Bind(Volume { source: existing(needed()?)?, read_only, private: true, owners }, caching)
            }
            Some("tmpfs") => {
                fields.only(text, &["tmpfs-size", "tmpfs-mode"])?;
                if source.is_some() {
                    return Err(format!("{text}: a tmpfs has no source; leave it out").into());
                }
                let mut options = vec!["nosuid".to_owned(), "nodev".to_owned(), "noexec".to_owned()];
                if let Some(size) = fields.one(&["tmpfs-size"])? {
                    options.push(format!("size={}", bytes(size)?));
                }
                if let Some(mode) = fields.one(&["tmpfs-mode"])? {
                    options.push(format!("mode={}", octal(mode)?));
                }
                options.extend(read_only.then(|| "ro".to_owned()));
                self.mounts.push(Mount { destination: place()?, kind: Kind::Tmpfs, options });
                return Ok(());
            }
            Some("image") => {
                fields.only(text, &["rw", "readwrite"])?;
                if fields.one(&["rw", "readwrite"])?.is_some_and(|value| value != "false") {
                    return Err(format!("{text}: an image is mounted read-only; leave out readwrite").into());
                }
                let options = vec!["ro".to_owned()];
                let kind = Kind::Image(needed()?.to_owned());
                self.mounts.push(Mount { destination: place()?, kind, options });
                return Ok(());
            }
            Some("disk") => {
                fields.only(text, &["fstype", "cache", "serial"])?;
                let cache = fields.one(&["cache"])?.map(disk_cache).transpose()?.unwrap_or_default();
                let serial = fields.one(&["serial"])?.map(serial).transpose()?;
                let index = self.add_disk(DiskFile { path: needed()?.into(), read_only, cache, serial })?;
                if target.is_none() {
                    return Ok(());
                }
                Kind::Disk { index, fstype: fields.one(&["fstype"])?.unwrap_or("ext4").to_owned() }
            }
            Some(other) => return Err(format!("{other} is no type of mount; use bind, tmpfs, image or disk").into()),
            None => return Err(format!("{text} has no type; begin with type=bind, tmpfs, image or disk").into()),
        };
        let mut options = vec![access(read_only)];
        if read_only && matches!(kind, Kind::Disk { .. }) {
            // libcontainer sets "ro" on the mount alone, while the file system wants to write to the disk. What it does not know it hands on to
            // the file system, where the guest's kernel looks at the name of this option only.
            options.push("ro=1".to_owned());
        }
        self.mounts.push(Mount { destination: place()?, kind, options });
        Ok(())
    }
}

/// The `KEY=VALUE` pairs of a mount; a key may come without a value.
struct Fields<'a>(Vec<(&'a str, Option<&'a str>)>);

/// What all types of mount have.
const COMMON: [&str; 8] = ["type", "source", "src", "target", "dst", "destination", "ro", "readonly"];

impl<'a> Fields<'a> {
    fn parse(text: &'a str) -> Result<Self, Error> {
        let fields = text.split(',').map(|field| match field.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (field, None),
        });
        let fields: Vec<_> = fields.collect();
        match fields.iter().any(|(key, _)| key.is_empty()) {
            true => Err(format!("{text} is no mount; write type=TYPE,source=…,target=PATH").into()),
            false => Ok(Self(fields)),
        }
    }

    /// The value under any of these names, which must come once; empty for a key without one.
    fn one(&self, names: &[&str]) -> Result<Option<&'a str>, Error> {
        let mut found = self.0.iter().filter(|(key, _)| names.contains(key));
        match (found.next(), found.next()) {
            (_, Some((key, _))) => Err(format!("{key} is given twice; give it once").into()),
            (first, None) => Ok(first.map(|(_, value)| value.unwrap_or_default())),
        }
    }

    fn read_only(&self) -> Result<bool, Error> {
        match self.one(&["ro", "readonly"])? {
            None | Some("false") => Ok(false),
            Some("" | "true") => Ok(true),
            Some(other) => Err(format!("readonly={other} is neither true nor false").into()),
        }
    }

    fn only(&self, text: &str, known: &[&str]) -> Result<(), Error> {
        match self.0.iter().find(|(key, _)| !COMMON.contains(key) && !known.contains(key)) {
            None => Ok(()),
            Some((key, _)) => Err(format!("{text}: {key} is not known for this type of mount; leave it out").into()),
        }
    }
}

/// Reads `SRC:DST[:OPTION,…]`.
fn volume(text: &str) -> Result<Mount, Error> {
    let mut parts = text.split(':');
    let (Some(source), Some(destination), given, None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(format!("{text} is no volume; write SRC:DST or SRC:DST:ro").into());
    };
    let (mut read_only, mut cache, mut options) = (false, Caching::default(), Vec::new());
    let mut owners = Owners::default();
    for option in given.into_iter().flat_map(|given| given.split(',')) {
        match option.split_once('=') {
            None if option == "ro" => read_only = true,
            None if option == "rw" => read_only = false,
            // Labels are for hosts with SELinux to share, and the guest is none.
            None if matches!(option, "z" | "Z" | "bind" | "rbind" | "private" | "rprivate") => {}
            None if FLAGS.contains(&option) => options.push(option.to_owned()),
            Some(("cache", value)) => cache = caching(value)?,
            Some(("uid", value)) => owners.uid = Some(id("uid", value)?),
            Some(("gid", value)) => owners.gid = Some(id("gid", value)?),
            _ => {
                let known = "ro, rw, cache=…, uid=…, gid=…, noexec, nosuid or nodev";
                return Err(format!("{option} is no volume option; use {known}").into());
            }
        }
    }
    options.insert(0, access(read_only));
    let kind = Kind::Bind(Volume { source: existing(source)?, read_only, private: true, owners }, cache);
    Ok(Mount { destination: place(destination)?, kind, options })
}

/// Reads `FILE[:OPTION,…]`. A file's name may have colons as well: what follows the last one is options only if it begins with one.
pub(crate) fn disk(text: &str) -> Result<DiskFile, Error> {
    let given = text.rsplit_once(':').filter(|(_, given)| {
        let first = given.split(',').next().unwrap_or_default();
        matches!(first, "ro" | "rw") || first.starts_with("cache=") || first.starts_with("serial=")
    });
    let (path, given) = given.unwrap_or((text, ""));
    let mut disk = DiskFile { path: path.into(), read_only: false, cache: DiskCache::default(), serial: None };
    for option in given.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            None if option == "ro" => disk.read_only = true,
            None if option == "rw" => disk.read_only = false,
            Some(("cache", value)) => disk.cache = disk_cache(value)?,
            Some(("serial", value)) => disk.serial = Some(serial(value)?),
            _ => return Err(format!("{option} is no option of a disk; use ro, rw, cache=… or serial=…").into()),
        }
    }
    Ok(disk)
}

/// Reads `DST[:OPTION,…]`.
fn memory(text: &str) -> Result<Mount, Error> {
    let (destination, given) = text.split_once(':').unwrap_or((text, ""));
    // podman's and docker's; what is given comes later and wins.
    let mut options: Vec<String> = ["rw", "noexec", "nosuid", "nodev"].map(str::to_owned).to_vec();
    for option in given.split(',').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("size", size)) => options.push(format!("size={}", bytes(size)?)),
            Some(("mode", mode)) => options.push(format!("mode={}", octal(mode)?)),
            Some((key, value)) if key == "gid" || TMPFS_VALUES.contains(&key) => {
                value.parse::<u64>().map_err(|_| format!("{option} of {text} is no number"))?;
                options.push(option.to_owned());
            }
            // The image's files are never copied there.
            None if option == "notmpcopyup" => {}
            None if matches!(option, "ro" | "rw") || FLAGS.contains(&option) => options.push(option.to_owned()),
            _ => return Err(format!("{option} is no option of a tmpfs; use size=, mode=, uid=, gid=, ro, exec").into()),
        }
    }
    Ok(Mount { destination: place(destination)?, kind: Kind::Tmpfs, options })
}

/// Reads a size in bytes with an optional unit b, k, m, g or t; 0 is no limit, as for podman.
pub(crate) fn bytes(text: &str) -> Result<u64, Error> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &lower[digits.len()..] {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("{text} is no size; write a number with b, k, m, g or t").into()),
    };
    let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    number.ok_or_else(|| format!("{text} is no size; write a number with b, k, m, g or t").into())
}

fn octal(text: &str) -> Result<&str, Error> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(text),
        _ => Err(format!("{text} is no mode; write an octal number such as 1777").into()),
    }
}

fn caching(text: &str) -> Result<Caching, Error> {
    match text {
        "never" => Ok(Caching::Never),
        "auto" => Ok(Caching::Auto),
        "always" => Ok(Caching::Always),
        other => Err(format!("cache={other} is not known; use never, auto or always").into()),
    }
}

fn disk_cache(text: &str) -> Result<DiskCache, Error> {
    match text {
        "writeback" => Ok(DiskCache::Writeback),
        "none" => Ok(DiskCache::None),
        other => Err(format!("cache={other} is not known for a disk; use none or writeback").into()),
    }
}

/// A disk's serial number, by which a guest may name it in paths.
fn serial(text: &str) -> Result<String, Error> {
    let fits = (1..=SERIAL_BYTES_MAX).contains(&text.len());
    match fits && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/') {
        true => Ok(text.to_owned()),
        false => Err(format!("serial={text} is none; write 1 to {SERIAL_BYTES_MAX} letters, digits or signs").into()),
    }
}

/// A user or group of the host.
fn id(name: &str, text: &str) -> Result<u32, Error> {
    let number = text.parse().ok().filter(|id| *id != u32::MAX);
    number.ok_or_else(|| format!("{name}={text} is no user or group of the host; write its number").into())
}

fn access(read_only: bool) -> String {
    if read_only { "ro" } else { "rw" }.to_owned()
}

/// A place in the container.
fn place(destination: &str) -> Result<String, Error> {
    let path = Path::new(destination);
    let leads_out = path.components().any(|component| component == Component::ParentDir);
    if !destination.starts_with('/') || path.components().count() < 2 || leads_out {
        return Err(format!("the volume's place {destination} must be an absolute path below /, without ..").into());
    }
    Ok(destination.to_owned())
}

fn existing(source: &str) -> Result<PathBuf, Error> {
    std::fs::canonicalize(source).map_err(|error| format!("the volume source {source} cannot be used: {error}").into())
}

/// A path without doubled and trailing slashes.
fn normal(path: &str) -> String {
    Path::new(path).components().collect::<PathBuf>().display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(mounts: &[&str]) -> Result<Mounts, Error> {
        let mounts: Vec<String> = mounts.iter().map(ToString::to_string).collect();
        Mounts::parse(&[], &mounts, &[], &[])
    }

    fn bind(read_only: bool, caching: Caching) -> Kind {
        Kind::Bind(Volume { source: "/".into(), read_only, private: true, ..Default::default() }, caching)
    }

    #[test]
    fn volumes_have_two_or_three_parts() {
        let mount = volume("/:/data").unwrap();
        assert_eq!((mount.destination.as_str(), mount.kind), ("/data", bind(false, Caching::Auto)));
        let mount = volume("/:/data:ro,cache=never,noexec,z").unwrap();
        assert_eq!((mount.kind, mount.options), (bind(true, Caching::Never), vec!["ro".into(), "noexec".into()]));
        let Kind::Bind(bound, _) = volume("/:/data:uid=1000,gid=50").unwrap().kind else { panic!("a directory") };
        assert_eq!(bound.owners, Owners { uid: Some(1000), gid: Some(50) });
        for text in [
            "",
            "/",
            "/:data",
            "/:/",
            "/:///",
            "/:/a/../b",
            "/:/a:rx",
            "/:/a:ro:z",
            "/no/such/thing:/a",
            "/:/a:cache=x",
            "/:/a:uid=root",
            "/:/a:gid=4294967295",
            "/:/a:U",
            "/:/a:shared",
        ] {
            assert!(volume(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_tmpfs_has_podmans_defaults_and_checked_options() {
        let mount = memory("/t").unwrap();
        assert_eq!((mount.kind, mount.options.join(",")), (Kind::Tmpfs, "rw,noexec,nosuid,nodev".into()));
        let options = memory("/t:size=1m,mode=1777,exec,uid=3").unwrap().options;
        assert_eq!(options[4..], ["size=1048576", "mode=1777", "exec", "uid=3"]);
        for text in ["t", "/", "/t:size=x", "/t:mode=9", "/t:nosuch", "/t:uid=a", "/t:lowerdir=/", "/t:tmpcopyup"] {
            assert!(memory(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn mounts_are_told_apart_by_type() {
        let all = one(&[
            "type=bind,src=/,target=/b,readonly,cache=always",
            "type=tmpfs,dst=/t,tmpfs-size=2k,tmpfs-mode=700",
            "type=image,source=debian:12,destination=/i,rw=false",
        ])
        .unwrap();
        let kinds: Vec<_> = all.mounts.iter().map(|mount| mount.kind.clone()).collect();
        assert_eq!(kinds, [bind(true, Caching::Always), Kind::Tmpfs, Kind::Image("debian:12".into())]);
        assert_eq!(all.mounts[1].options[3..], ["size=2048", "mode=700"]);
        assert_eq!(all.images().collect::<Vec<_>>(), ["debian:12"]);
        for text in [
            "",
            "type=bind",
            "type=bind,src=/",
            "type=bind,dst=/a",
            "src=/,dst=/a",
            "type=volume,src=a,dst=/a",
            "type=bind,src=/,dst=/a,ro=x",
            "type=bind,src=/,source=/,dst=/a",
            "type=bind,src=/,dst=/a,tmpfs-size=1",
            "type=tmpfs,src=/,dst=/a",
            "type=image,src=a,dst=/a,rw",
            "type=bind,src=/,dst=/a,bind-propagation=shared",
            "type=disk,dst=/a",
            "type=disk,src=/,dst=/a",
            "type=bind,,src=/,dst=/a",
        ] {
            assert!(one(&[text]).is_err(), "{text:?}");
        }
    }

    #[test]
    fn no_two_mounts_share_a_place_and_outer_ones_come_first() {
        assert!(one(&["type=tmpfs,dst=/a/", "type=bind,src=/,dst=//a"]).is_err());
        let all = one(&["type=tmpfs,dst=/a/b/c", "type=tmpfs,dst=/a", "type=tmpfs,dst=/dev/shm/"]).unwrap();
        let order: Vec<_> = all.mounts.iter().map(|mount| mount.destination.as_str()).collect();
        assert_eq!(order, ["/a", "/dev/shm/", "/a/b/c"]);
        assert!(all.replaces("/dev/shm") && !all.replaces("/dev"));
    }

    #[test]
    fn a_disk_is_a_file_that_has_one_writer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let disks = |texts: &[String]| Mounts::parse(&[], &[], &[], texts);
        assert!(disks(&[format!("{path}:ro"), format!("{path}:ro")]).is_ok());
        assert!(disks(&[path.to_owned(), format!("{path}:ro")]).is_err());
        for wrong in ["/", "/dev/null", "/no/such/file"] {
            assert!(disks(&[wrong.to_owned()]).is_err(), "{wrong}");
        }
        let (first, second) =
            (format!("type=disk,src={path},dst=/d,ro"), format!("type=disk,src={path},ro,cache=none"));
        let all = one(&[&format!("{first},serial=data"), &second]).unwrap();
        assert_eq!((all.disks[0].serial.as_deref(), &all.disks[1].serial), (Some("data"), &None));
        assert_eq!([all.disks[0].cache, all.disks[1].cache], [DiskCache::Writeback, DiskCache::None]);
        assert!(one(&[&format!("type=disk,src={path},cache=auto")]).is_err());
        assert_eq!((all.disks.len(), all.mounts.len()), (2, 1));
        assert_eq!(all.mounts[0].kind, Kind::Disk { index: 0, fstype: "ext4".into() });
        assert_eq!(all.mounts[0].options, ["ro", "ro=1"]);
    }

    #[test]
    fn options_of_a_disk_follow_the_last_colon() {
        let cached = |path: &str, read_only| DiskFile {
            path: path.into(),
            read_only,
            cache: DiskCache::Writeback,
            serial: None,
        };
        for (text, expected) in [
            ("/a", cached("/a", false)),
            ("/a:ro", cached("/a", true)),
            ("/a:b", cached("/a:b", false)),
            ("/by-path/pci-0000:00:1f.2:ro,cache=writeback", cached("/by-path/pci-0000:00:1f.2", true)),
            ("/a:cache=none,rw", DiskFile { cache: DiskCache::None, ..cached("/a", false) }),
            ("/a:serial=data-1,ro", DiskFile { serial: Some("data-1".into()), ..cached("/a", true) }),
        ] {
            assert_eq!(disk(text).unwrap(), expected, "{text}");
        }
        for text in [
            "/a:ro,fast",
            "/a:cache=unsafe",
            "/a:cache=",
            "/a:ro,cache",
            "/a:serial=",
            "/a:serial=a/b",
            "/a:serial=123456789012345678901",
        ] {
            assert!(disk(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, size) in
            [("0", 0), ("5b", 5), ("64k", 65_536), ("64M", 67_108_864), ("1g", 1 << 30), ("2T", 2 << 40)]
        {
            assert_eq!(bytes(text).unwrap(), size, "{text}");
        }
        for text in ["", "k", "1p", "-1", "1.5g", "99999999999999999999", "18446744073709551615k"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
