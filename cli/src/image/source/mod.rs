//! What an image is loaded from: an OCI layout or a docker archive, in a directory or a tar archive.
//!
//! The content decides, not the name: with an `index.json` it is an OCI layout (docker's newer archives are both, and
//! the layout says more), with a `manifest.json` alone it is a docker archive.

mod blobs;
mod docker;
pub(super) mod oci;

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;
use rustix::fs::OFlags;
use serde::de::DeserializeOwned;

use super::digest::{Digest, DigestError};
use super::stream::{Format, Region};
use super::tar::TarError;
use blobs::Blobs;
pub(super) use oci::{DOCKER_INDEX, DOCKER_MANIFEST, INDEXES_DEEP_MAX};

/// Index, manifest and configuration: the limit that registries have, too.
pub(super) const JSON_CAP: u64 = 4 << 20;
/// Overlayfs takes 500 layers, docker makes at most 127.
const LAYERS_MAX: usize = 128;

/// Why a file or directory cannot be loaded as an image.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// There is nothing at the path.
    #[error("there is no {}: give an OCI layout directory or archive, or a docker archive", .0.display())]
    Missing(PathBuf),
    /// What is at the path is something else.
    #[error("{} is not an image but {found}: give an OCI layout directory or archive, or a docker archive", path.display())]
    NotAnImage {
        /// The path.
        path: PathBuf,
        /// What was found there.
        found: String,
    },
    /// A file that the image speaks of is not there.
    #[error("the image lacks {0}, which it speaks of: copy or build it again")]
    MissingBlob(String),
    /// A blob is not what its descriptor says.
    #[error("{blob}: expected {expected}, found {found}: the image is damaged, so copy or build it again")]
    Mismatch {
        /// The blob.
        blob: String,
        /// What its descriptor says.
        expected: String,
        /// What it is.
        found: String,
    },
    /// Something is larger or more than this store takes.
    #[error("{what} is {size}, above the limit of {cap}: the image is damaged or hostile")]
    TooLarge {
        /// What.
        what: String,
        /// Its size.
        size: u64,
        /// The limit.
        cap: u64,
    },
    /// A document cannot be understood.
    #[error("{blob} is no valid image document ({source}): copy or build the image again")]
    Json {
        /// The document.
        blob: String,
        /// Why not.
        source: serde_json::Error,
    },
    /// A digest cannot be understood.
    #[error(transparent)]
    Digest(#[from] DigestError),
    /// There is no variant of the image for this machine.
    #[error("the image is for {found}, but this machine is {wanted}: load an image that includes {wanted}")]
    WrongPlatform {
        /// This machine.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// Several images, and nothing to choose by.
    #[error("{} holds several images ({names}): load it under one of these names", path.display())]
    Several {
        /// The path.
        path: PathBuf,
        /// Their names.
        names: String,
    },
    /// A type that no image has.
    #[error("{what} has the media type `{}`, which is not supported: build the image as an ordinary container image", media_type.escape_debug())]
    MediaType {
        /// What has it.
        what: &'static str,
        /// The type.
        media_type: String,
    },
    /// Manifest and configuration disagree.
    #[error("the image has {layers} layers but {diff_ids} diff ids: copy or build it again")]
    LayerCount {
        /// How many layers the manifest lists.
        layers: usize,
        /// How many the configuration lists.
        diff_ids: usize,
    },
    /// The archive around the image is damaged.
    #[error("{}: {source}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong with it.
        source: TarError,
    },
    /// A system call failed.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// What could not be read.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A layer that can be read.
#[derive(Debug)]
pub(super) struct LayerBlob {
    /// The digest of its uncompressed archive.
    pub(super) diff_id: Digest,
    /// The digest of the blob, where the source has one.
    pub(super) digest: Option<Digest>,
    pub(super) region: Region,
}

/// The one image that was meant, read as far as it takes to recognise it.
pub(super) struct Chosen {
    /// The digest of its configuration, by which the store knows it.
    pub(super) digest: Digest,
    pub(super) manifest: Option<Digest>,
    /// What the source calls it.
    pub(super) names: Vec<String>,
    rest: Rest,
}

enum Rest {
    Oci(Box<oci::Manifest>),
    Docker(docker::Item, Vec<u8>),
}

/// All that is needed to unpack and record an image.
pub(super) struct Details {
    pub(super) config: ImageConfiguration,
    /// Bottom first.
    pub(super) layers: Vec<LayerBlob>,
}

/// A place that holds images.
pub(super) struct Source {
    path: PathBuf,
    blobs: Blobs,
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self, SourceError> {
        let read = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => SourceError::Missing(path.to_owned()),
            _ => SourceError::Read { path: path.to_owned(), source },
        };
        let not = |found: String| SourceError::NotAnImage { path: path.to_owned(), found };
        let kind = std::fs::metadata(path).map_err(read)?.file_type();
        let blobs = if kind.is_dir() {
            Blobs::Directory(path.to_owned())
        } else {
            let file = open_source(path)?;
            let region = Region { length: file.metadata().map_err(read)?.len(), file: Arc::new(file), offset: 0 };
            let start = Region { length: region.length.min(512), ..region.clone() }.read_all().map_err(read)?;
            if let Some(found) = what_else(&start) {
                return Err(not(found));
            }
            Blobs::archive(region).map_err(|source| match source {
                TarError::Header(0) => not("a file of another kind".to_owned()),
                source => SourceError::Archive { path: path.to_owned(), source },
            })?
        };
        let source = Self { path: path.to_owned(), blobs };
        if !source.blobs.has("index.json")? && !source.blobs.has("manifest.json")? {
            let what = if kind.is_dir() { "a directory" } else { "a tar archive" };
            return Err(not(format!("{what} without index.json or manifest.json")));
        }
        Ok(source)
    }

    /// Whether there is something at `path` that could be opened as a source.
    pub(super) fn looks_like_one(path: &Path) -> bool {
        path.is_file() || path.join("index.json").is_file() || path.join("manifest.json").is_file()
    }

    /// Finds the image for this machine; `name` chooses among several.
    pub(super) fn choose(&self, name: Option<&str>) -> Result<Chosen, SourceError> {
        match self.blobs.has("index.json")? {
            true => oci::choose(self, name),
            false => docker::choose(self, name),
        }
    }

    /// Reads the rest of what [`Source::choose`] found.
    pub(super) fn details(&self, chosen: &Chosen) -> Result<Details, SourceError> {
        let details = match &chosen.rest {
            Rest::Oci(manifest) => oci::details(self, manifest)?,
            Rest::Docker(item, config) => docker::details(self, item, config)?,
        };
        check_platform(&details.config)?;
        Ok(details)
    }

    /// Reads a whole small file.
    fn read_small(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        let region = self.blobs.find(name)?.ok_or_else(|| SourceError::MissingBlob(name.to_owned()))?;
        if region.length > JSON_CAP {
            return Err(SourceError::TooLarge { what: name.to_owned(), size: region.length, cap: JSON_CAP });
        }
        region.read_all().map_err(|source| SourceError::Read { path: self.path.join(name), source })
    }
}

/// Whether an image is for this machine, whatever an index says of it.
pub(super) fn check_platform(config: &ImageConfiguration) -> Result<(), SourceError> {
    let (os, architecture) = (config.os().to_string(), config.architecture().to_string());
    if (os.as_str(), architecture.as_str()) != ("linux", architecture_here()) {
        return Err(SourceError::WrongPlatform { wanted: platform_here(), found: format!("{os}/{architecture}") });
    }
    Ok(())
}

pub(super) fn parse<T: DeserializeOwned>(blob: &str, json: &[u8]) -> Result<T, SourceError> {
    serde_json::from_slice(json).map_err(|source| SourceError::Json { blob: blob.to_owned(), source })
}

/// The layers' diff ids, if there are as many as layers and not too many.
fn diff_ids(config: &ImageConfiguration, layers: usize) -> Result<Vec<Digest>, SourceError> {
    let diff_ids = config.rootfs().diff_ids();
    if diff_ids.len() != layers {
        return Err(SourceError::LayerCount { layers, diff_ids: diff_ids.len() });
    }
    if layers > LAYERS_MAX {
        let what = "the number of layers".to_owned();
        return Err(SourceError::TooLarge { what, size: layers as u64, cap: LAYERS_MAX as u64 });
    }
    Ok(diff_ids.iter().map(|id| id.parse()).collect::<Result<_, _>>()?)
}

/// Opens a file that an image is to come from.
pub(super) fn open_source(path: &Path) -> Result<File, SourceError> {
    let read = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => SourceError::Missing(path.to_owned()),
        _ => SourceError::Read { path: path.to_owned(), source },
    };
    let kind = std::fs::metadata(path).map_err(read)?.file_type();
    let found = match () {
        () if kind.is_file() => return open_regular(path).map_err(read),
        () if kind.is_dir() => "a directory",
        () => "a special file",
    };
    Err(SourceError::NotAnImage { path: path.to_owned(), found: found.to_owned() })
}

/// Opens a file without waiting for anything: it could have become a FIFO.
fn open_regular(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

/// What a file is that begins so, if that is known and no tar archive.
fn what_else(start: &[u8]) -> Option<String> {
    let compressed = |name: &str, tool: &str| format!("compressed with {name} as a whole (decompress it with {tool})");
    Some(match (Format::of(start), start) {
        (_, []) => "an empty file".to_owned(),
        (Format::Gzip, _) => compressed("gzip", "gunzip"),
        (Format::Zstd, _) => compressed("zstd", "unzstd"),
        (Format::Other(name), _) => compressed(name, name),
        (_, [0x7f, b'E', b'L', b'F', ..]) => "a program".to_owned(),
        (_, [b'{' | b'[', ..]) => "a JSON document".to_owned(),
        (_, [b'#', b'!', ..]) => "a script".to_owned(),
        _ => return None,
    })
}

/// This machine's architecture as images spell it.
pub(super) fn architecture_here() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn platform_here() -> String {
    format!("linux/{}", architecture_here())
}
