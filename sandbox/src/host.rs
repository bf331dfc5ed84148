//! Where Hull's own files are on this host.

use std::path::{Path, PathBuf};

/// The VMM's place below the prefix that Hull is installed under.
pub const VMM: &str = "libexec/hull/hull-vmm";
/// The guest kernel's place below the prefix.
pub const KERNEL: &str = "share/hull/vmlinux";
/// The guest image's place below the prefix.
pub const IMAGE: &str = "share/hull/guest.img";
/// Names another VMM.
pub const VMM_VARIABLE: &str = "HULL_VMM";
/// Names another guest kernel.
pub const KERNEL_VARIABLE: &str = "HULL_KERNEL";
/// Names another guest image.
pub const IMAGE_VARIABLE: &str = "HULL_IMAGE";

/// Files that the host's administrator has named in place of the installed ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// The VMM's binary.
    pub vmm: Option<PathBuf>,
    /// The guest kernel.
    pub kernel: Option<PathBuf>,
    /// The guest image.
    pub image: Option<PathBuf>,
}

/// The files and directories that Hull uses on a host.
#[derive(Clone, Debug)]
pub struct Host {
    /// The VMM's binary.
    pub vmm: PathBuf,
    /// The guest kernel, an uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// The guest image, an initial RAM file system with the agent in it.
    pub image: PathBuf,
    /// Holds one directory per sandbox, gone after a reboot.
    pub state_dir: PathBuf,
    /// Holds what may grow: images and the writable layers of containers.
    pub data_dir: PathBuf,
}

/// A file that Hull needs is not there.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The running program's own path is unknown.
    #[error("cannot find out where hull is installed: {0}; is /proc mounted?")]
    OwnPath(#[source] std::io::Error),
    /// An installed file is missing.
    #[error("{what} is missing at {path}; install Hull again or name another with {variable}")]
    Missing {
        /// Which file.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// The environment variable that overrides the place.
        variable: &'static str,
    },
}

impl Host {
    /// Finds Hull's files beside the running program (`PREFIX/bin/hull` has `PREFIX/libexec/hull` and
    /// `PREFIX/share/hull`), or where `HULL_VMM`, `HULL_KERNEL`, `HULL_IMAGE`, `HULL_STATE_DIR` and `HULL_DATA_DIR` say.
    ///
    /// # Errors
    ///
    /// Fails where the program's own path cannot be read. Whether the files exist is asked by [`Host::check`].
    pub fn discover() -> Result<Self, HostError> {
        let program = std::env::current_exe().map_err(HostError::OwnPath)?;
        let prefix = program.parent().and_then(Path::parent).unwrap_or(Path::new("/usr/local"));
        let place = |variable: &str, default: PathBuf| std::env::var_os(variable).map_or(default, PathBuf::from);
        Ok(Self {
            vmm: place(VMM_VARIABLE, prefix.join(VMM)),
            kernel: place(KERNEL_VARIABLE, prefix.join(KERNEL)),
            image: place(IMAGE_VARIABLE, prefix.join(IMAGE)),
            state_dir: place("HULL_STATE_DIR", "/run/hull".into()),
            data_dir: place("HULL_DATA_DIR", "/var/lib/hull".into()),
        })
    }

    /// Takes the files that were named, except for those that the environment names otherwise.
    #[must_use]
    pub fn with(mut self, places: Places) -> Self {
        let named = [
            (&mut self.vmm, places.vmm, VMM_VARIABLE),
            (&mut self.kernel, places.kernel, KERNEL_VARIABLE),
            (&mut self.image, places.image, IMAGE_VARIABLE),
        ];
        for (path, place, variable) in named {
            if let (Some(place), None) = (place, std::env::var_os(variable)) {
                *path = place;
            }
        }
        self
    }

    /// Asks whether what a sandbox needs is installed.
    ///
    /// # Errors
    ///
    /// Names the first file that is missing.
    pub fn check(&self) -> Result<(), HostError> {
        let files = [
            ("the virtual machine monitor", &self.vmm, VMM_VARIABLE),
            ("the guest kernel", &self.kernel, KERNEL_VARIABLE),
            ("the guest image", &self.image, IMAGE_VARIABLE),
        ];
        for (what, path, variable) in files {
            if !path.is_file() {
                return Err(HostError::Missing { what, path: path.clone(), variable });
            }
        }
        Ok(())
    }
}
