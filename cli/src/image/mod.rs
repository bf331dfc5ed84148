//! The local image store.
//!
//! An image comes from a file, an OCI layout or a docker archive, and is unpacked once: every layer becomes a directory
//! that overlayfs takes as a lower layer, named by the digest of its content and shared by all images that have
//! it. Running a container mounts layers and never copies them.
//!
//! ```text
//! <root>/
//!   images/<config digest>.json    what an image is: its configuration and its layers
//!   names/<escaped name>           a symbolic link whose target is a config digest
//!   layers/<diff id>/              a layer, for overlayfs
//!   blobs/<blob digest>            a compressed layer that is being pulled; locked by whoever pulls it
//!   uses/<diff id>                 locked while somebody unpacks, uses or removes the layer; holds its size
//!   tmp/<pid>-<n>/                 what is being made or removed; locked by its process
//!   lock                           held to change images and names
//! ```
//!
//! There is no daemon: any number of processes use the store at once, and any of them may die at any moment. All that
//! others can see appears by a rename; `lock.rs` has the order of locks. Nothing is synced to the disk, so a
//! power failure shortly after a load may leave damaged layers, which `hull image rm` removes.
//!
//! An image's *digest* here is that of its configuration, which names all its content, however the layers are
//! compressed, and which docker archives have, too.

mod digest;
mod lock;
mod lookup;
mod pack;
pub mod pull;
mod record;
mod remove;
mod source;
mod staging;
mod store;
mod stream;
mod tar;
mod transfer;
mod unpack;
pub mod user;

use std::io;
use std::path::{Path, PathBuf};

pub use digest::{Digest, DigestError};
pub use lock::Hold;
use oci_spec::image::{Config, ImageConfiguration};
pub use pack::PackError;
pub use record::Listed;
pub use source::SourceError;
pub use store::{Freed, Store};
pub use stream::StreamError;
pub use tar::TarError;
pub use transfer::ExportError;
pub use unpack::{PathError, UnpackError};

/// Where the store is unless the user says otherwise.
pub const DEFAULT_ROOT: &str = "/var/lib/hull";

/// Why the store cannot do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Nothing has this name, digest or path.
    #[error("no image `{}`: `hull image ls` lists what there is, {} adds to it", .0.escape_debug(), adding(.0))]
    NoSuchImage(String),
    /// Several images could be meant.
    #[error("`{reference}` could be any of {candidates}: give more of the name or digest")]
    Ambiguous {
        /// What was asked for.
        reference: String,
        /// What it could be.
        candidates: String,
    },
    /// Text that cannot be an image's name.
    #[error("`{}` is not a name for an image, for it {why}: use one such as `debian:12`", name.escape_debug())]
    Name {
        /// The text.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The image to be loaded is damaged, unsuitable or none.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A layer cannot be unpacked.
    #[error("layer {diff_id}: {source}")]
    Layer {
        /// The layer.
        diff_id: Digest,
        /// Why not.
        source: UnpackError,
    },
    /// An archive of files cannot be read.
    #[error("{}: {source}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong with it.
        source: StreamError,
    },
    /// The store belongs to somebody else.
    #[error("may not use the image store {}: run as root, or choose another store", .0.display())]
    Permission(PathBuf),
    /// There is no room for even a record.
    #[error("the disk of the image store {} is full: remove images or use a larger disk", .0.display())]
    DiskFull(PathBuf),
    /// A record was damaged.
    #[error("{} is damaged ({source}): remove the file and load the image again", path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A system call failed.
    #[error("cannot {step} {}: {source}", path.display())]
    Io {
        /// What failed.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How an image that a user has asked for gets into the store.
fn adding(reference: &str) -> String {
    match pull::names_registry(reference) {
        true => format!("`hull image pull {}`", reference.escape_debug()),
        false => "`hull image load PATH` or `hull image pull REGISTRY/NAME:TAG`".to_owned(),
    }
}

impl ImageError {
    fn io(step: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Self::Permission(path.to_owned()),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull(path.to_owned()),
            _ => Self::Io { step, path: path.to_owned(), source },
        }
    }
}

/// An image in the store. Its layers stay there for as long as this, or a [`Hold`] of it, lives.
#[derive(Clone, Debug)]
pub struct Image {
    digest: Digest,
    name: String,
    size_bytes: u64,
    config: ImageConfiguration,
    layers: Vec<PathBuf>,
    hold: Hold,
}

impl Image {
    /// The digest of the image's configuration.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The name that the image was found or loaded by; its digest if it has none.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What its layers take unpacked.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The whole configuration.
    pub fn config(&self) -> &ImageConfiguration {
        &self.config
    }

    /// The layers' directories, bottom first: overlayfs wants them the other way round. No directory comes twice.
    pub fn layers(&self) -> &[PathBuf] {
        &self.layers
    }

    /// Something to keep while the layers are in use.
    pub fn hold(&self) -> Hold {
        self.hold.clone()
    }

    /// What every program of the image is started through.
    pub fn entrypoint(&self) -> &[String] {
        self.list(Config::entrypoint)
    }

    /// The program, or the entrypoint's arguments, unless the user gives others.
    pub fn cmd(&self) -> &[String] {
        self.list(Config::cmd)
    }

    /// The environment, `NAME=value` each.
    pub fn env(&self) -> &[String] {
        self.list(Config::env)
    }

    /// The ports that the image says it listens on, such as `80/tcp`.
    pub fn exposed_ports(&self) -> &[String] {
        self.list(Config::exposed_ports)
    }

    /// The directories that the image wants volumes for.
    pub fn volumes(&self) -> &[String] {
        self.list(Config::volumes)
    }

    /// The user to run as, for [`user::resolve`].
    pub fn user(&self) -> Option<&str> {
        self.text(Config::user)
    }

    /// The directory to start in.
    pub fn workdir(&self) -> Option<&str> {
        self.text(Config::working_dir)
    }

    /// The signal that asks the program to end, by name or number.
    pub fn stop_signal(&self) -> Option<&str> {
        self.text(Config::stop_signal)
    }

    fn list(&self, field: fn(&Config) -> &Option<Vec<String>>) -> &[String] {
        self.config.config().as_ref().and_then(|config| field(config).as_deref()).unwrap_or_default()
    }

    fn text(&self, field: fn(&Config) -> &Option<String>) -> Option<&str> {
        self.config.config().as_ref().and_then(|config| field(config).as_deref()).filter(|text| !text.is_empty())
    }
}
