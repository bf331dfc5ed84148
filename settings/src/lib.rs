//! The settings of a node: `/etc/hull/config.toml`, then `/etc/hull/config.d/*.toml` in the order of their names, the later
//! winning key by key.
//!
//! ```text
//! files ──read──▶ text ──parse──▶ tables ──set──▶ Settings: strong types, each with its origin
//! ```
//!
//! [`keys`](Settings) declares every key once: types, defaults, documentation and the example file are made from that. A
//! file that is wrong in anything is refused as a whole, with everything that is wrong in it, so that a slip is found when
//! it is made and not when a pod comes out smaller than it should.
#![forbid(unsafe_code)]

mod example;
mod file;
mod keys;
mod nearest;
mod origin;
mod value;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use hull_sandbox::host::{Host, Places};

pub use example::example;
pub use keys::{Described, Guest, Log, MemoryMib, OverheadMib, Paths, Pod, Run, Seconds, Settings, SpareVcpus, Vcpus};
pub use origin::{Origin, Setting};
pub use value::{
    ANNOTATIONS, Allowed, BlockCache, HYPERVISOR, HostNamespaces, KernelParams, Level, Number, Place, RunNetwork,
};

/// Where the files are, unless this variable of the environment says otherwise.
pub const DIR: &str = "/etc/hull";
/// Names another directory than [`DIR`].
pub const DIR_VARIABLE: &str = "HULL_CONFIG_DIR";
/// Most drop-ins: more is not a configuration but an accident.
const MAX_DROP_INS: usize = 256;

/// Something that is wrong in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1, where it is of one.
    pub line: Option<usize>,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        self.line.map_or(Ok(()), |line| write!(f, ":{line}"))?;
        write!(f, ": {}", self.message)
    }
}

/// Everything that is wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, problem) in self.0.iter().enumerate() {
            write!(f, "{}{problem}", if number == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// The directory that the files are in.
#[must_use]
pub fn dir() -> PathBuf {
    std::env::var_os(DIR_VARIABLE).map_or_else(|| DIR.into(), PathBuf::from)
}

/// The files of a directory that are read, in the order in which they are.
///
/// # Errors
///
/// Fails where a directory cannot be read; one that does not exist has no files.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>, Problems> {
    let mut files = Vec::new();
    let main = dir.join("config.toml");
    // A link to nowhere is a mistake, and found when it is read.
    if main.symlink_metadata().is_ok() {
        files.push(main);
    }
    let drop_ins = dir.join("config.d");
    let wrong = |message: String| Problems(vec![Problem { path: drop_ins.clone(), line: None, message }]);
    let entries = match std::fs::read_dir(&drop_ins) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(files),
        Err(error) => return Err(wrong(error.to_string())),
    };
    let mut found = BTreeSet::new();
    for entry in entries {
        let name = PathBuf::from(entry.map_err(|error| wrong(error.to_string()))?.file_name());
        let hidden = name.as_os_str().as_encoded_bytes().starts_with(b".");
        if name.extension() == Some(OsStr::new("toml")) && !hidden {
            found.insert(drop_ins.join(name));
        }
        if found.len() > MAX_DROP_INS {
            return Err(wrong(format!("has more than {MAX_DROP_INS} files")));
        }
    }
    files.extend(found);
    Ok(files)
}

impl Settings {
    /// Reads the settings that are in force on this node.
    ///
    /// # Errors
    ///
    /// Tells everything that is wrong in the files.
    pub fn load() -> Result<Self, Problems> {
        Self::read(&files(&dir())?)
    }

    /// Reads files, the later winning.
    ///
    /// # Errors
    ///
    /// Tells everything that is wrong in them.
    pub fn read(files: &[PathBuf]) -> Result<Self, Problems> {
        let (mut settings, mut problems) = (Self::default(), Problems::default());
        for path in files {
            match file::read(path) {
                Ok(text) => file::apply(&mut settings, path, &text, &mut problems),
                Err(problem) => problems.0.push(problem),
            }
        }
        if problems.0.is_empty() {
            settings.agree(&mut problems);
        }
        if problems.0.is_empty() { Ok(settings) } else { Err(problems) }
    }

    /// Notes values that are right by themselves and wrong together.
    fn agree(&self, problems: &mut Problems) {
        let (guest, pod) = (&self.guest, &self.pod);
        let pairs = [
            (
                "vcpus",
                (guest.default_vcpus.value.get(), &guest.default_vcpus.origin),
                (pod.max_vcpus.value.get(), &pod.max_vcpus.origin),
            ),
            (
                "memory_mib",
                (guest.default_memory_mib.value.get(), &guest.default_memory_mib.origin),
                (pod.max_memory_mib.value.get(), &pod.max_memory_mib.origin),
            ),
        ];
        for (what, (default, from), (max, max_from)) in pairs {
            // Whichever was set is to blame; the defaults agree.
            let set = [max_from, from].into_iter().find_map(|origin| match origin {
                Origin::File { path, line } => Some((path.clone(), *line)),
                _ => None,
            });
            if let (true, Some((path, line))) = (default > max, set) {
                let message =
                    format!("guest.default_{what} ({default}, {from}) is above pod.max_{what} ({max}, {max_from})");
                problems.0.push(Problem { path, line: Some(line), message });
            }
        }
    }

    /// Where Hull's files are: what the environment names, else what is set, else what is installed.
    #[must_use]
    pub fn host(&self, discovered: Host) -> Host {
        let named = |place: &Setting<Place>| place.value.named().map(Path::to_owned);
        discovered.with(Places {
            vmm: named(&self.paths.vmm),
            kernel: named(&self.paths.kernel),
            image: named(&self.paths.image),
        })
    }

    /// All keys with what is in force on `host`, which [`Settings::host`] has made.
    #[must_use]
    pub fn in_force(&self, host: &Host) -> Vec<Described> {
        let mut all = self.describe();
        for (key, path, variable) in
            [("vmm", &host.vmm, host::VMM), ("kernel", &host.kernel, host::KERNEL), ("image", &host.image, host::IMAGE)]
        {
            let Some(entry) = all.iter_mut().find(|entry| (entry.table, entry.key) == ("paths", key)) else { continue };
            entry.value = path.to_string_lossy().into();
            if std::env::var_os(variable).is_some() {
                entry.origin = Origin::Environment(variable);
            }
        }
        all
    }
}

/// The variables that name a file of the installation.
mod host {
    pub(super) use hull_sandbox::host::{IMAGE_VARIABLE as IMAGE, KERNEL_VARIABLE as KERNEL, VMM_VARIABLE as VMM};
}

#[cfg(test)]
mod tests;
