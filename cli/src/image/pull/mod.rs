//! Pulling an image from a registry into the store.
//!
//! ```text
//! manifest ─▶ (index: this machine's manifest) ─▶ configuration ─▶ per layer, a few at a time:
//!
//!     wait for the blob's lock ─▶ layer there by now? ──────────────────────────▶ hold it
//!                                   └no─▶ download to blobs/<digest> ─▶ unpack ─▶ hold it, remove the blob
//! ```
//!
//! The file that a blob is downloaded to is its own lock. Of several pulls of one layer, in one process or many, one does
//! the work and the others wait; whoever was killed has left a file that the next pull goes on with. A pull that fails in any other
//! way removes what it has. Whoever holds a blob's lock never waits for another blob's, so no two pulls wait for each other.
//!
//! One thread moves all bytes; waiting for locks, reading back and unpacking have threads of their own.

mod credentials;
mod download;
mod reference;
mod registry;

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};
use reqwest::{StatusCode, Url};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::digest::Digest;
use super::lock::{Share, lock, still_there};
use super::record::{Name, Record};
use super::source::{INDEXES_DEEP_MAX, JSON_CAP, LayerBlob, SourceError, check_platform, oci, parse};
use super::store::Store;
use super::stream::Region;
use super::{Image, ImageError};
pub use credentials::docker_config;
use download::{Blob, download};
use reference::Wanted;
pub(crate) use reference::names_registry;
use registry::Registry;

/// As many connections as docker opens at a time; more gain little, and registries count them.
const LAYERS_AT_ONCE: usize = 3;

/// Why an image cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The reference does not say from where.
    #[error("`{}` names no registry: write where it is from, such as `registry.example/{}`", .0.escape_debug(), .0.escape_debug())]
    NoRegistry(String),
    /// The reference cannot be understood.
    #[error("`{}` is no reference to an image ({why}): write REGISTRY/NAME:TAG or REGISTRY/NAME@DIGEST", reference.escape_debug())]
    Reference {
        /// The text.
        reference: String,
        /// What is wrong with it.
        why: String,
    },
    /// The stored credentials cannot be used.
    #[error("{0}")]
    Credentials(String),
    /// The registry does not answer.
    #[error("cannot reach the registry {registry} ({why}): check its name, the network, and that it runs")]
    Unreachable {
        /// Host and port.
        registry: String,
        /// What failed.
        why: String,
    },
    /// The registry lets nobody, or this user not, see the image.
    #[error("the registry {registry} does not let {} pull {repository} ({status}): {}",
        if *.known { "this user" } else { "everybody" },
        if *.known { "check the repository's name and the user's rights, or log in again" }
        else { "check the name, or log in so that docker's config.json has a password" })]
    Denied {
        /// Host and port.
        registry: String,
        /// What it answered.
        status: StatusCode,
        /// What was asked for.
        repository: String,
        /// Whether there were credentials.
        known: bool,
    },
    /// The registry does not have it.
    #[error("the registry does not have {0} (404 Not Found): check the name and tag")]
    NotFound(String),
    /// The registry wants to be left alone for longer than a user would wait.
    #[error(
        "the registry {registry} refuses more requests ({status}): try again in {seconds} s, or log in where that raises the limit"
    )]
    Busy {
        /// Host and port.
        registry: String,
        /// What it answered.
        status: StatusCode,
        /// For how long, in seconds.
        seconds: u64,
    },
    /// The registry answers with a status that is no use.
    #[error("the registry {registry} fails ({status}): try again later, or ask whoever runs it")]
    Refused {
        /// Host and port.
        registry: String,
        /// What it answered.
        status: StatusCode,
    },
    /// The registry does not keep to the protocol.
    #[error("the registry {registry} makes no sense ({why}): it is no image registry, or a hostile one")]
    Nonsense {
        /// Host and port.
        registry: String,
        /// What is wrong.
        why: String,
    },
    /// A document is too large.
    #[error("{what} has {size} bytes or more, above the limit of {cap}: the registry is broken or hostile")]
    TooLarge {
        /// Which document.
        what: String,
        /// What is known of its size.
        size: u64,
        /// The limit.
        cap: u64,
    },
    /// The connection broke more often than it was worth trying.
    #[error(
        "the download of layer {digest} broke off at {have} of {size} bytes ({why}): check the network and pull again"
    )]
    Broken {
        /// The layer's blob.
        digest: Digest,
        /// How much had arrived.
        have: u64,
        /// How much there is.
        size: u64,
        /// What failed.
        why: String,
    },
    /// A blob is longer or shorter than the manifest says.
    #[error(
        "layer {digest} should have {expected} bytes, but the registry sends {found}: pull again, or have the image pushed again"
    )]
    WrongSize {
        /// The layer's blob.
        digest: Digest,
        /// What the manifest says.
        expected: u64,
        /// What is sent, as far as is known.
        found: u64,
    },
    /// Something is not what its digest says.
    #[error("{what} should have the digest {expected}, but has {found}: pull again, or have the image pushed again")]
    WrongDigest {
        /// What.
        what: String,
        /// The digest that it was asked for by.
        expected: Digest,
        /// The digest that it has.
        found: Digest,
    },
    /// The image's documents are unsuitable.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The store cannot take the image.
    #[error(transparent)]
    Store(#[from] ImageError),
}

impl PullError {
    fn unreachable(registry: &str, error: &reqwest::Error) -> Self {
        Self::Unreachable { registry: registry.to_owned(), why: reason(error) }
    }

    fn broken(blob: Blob, have: u64, error: &reqwest::Error) -> Self {
        Self::Broken { digest: blob.digest, have, size: blob.size, why: reason(error) }
    }
}

/// The innermost cause: the outer ones only say that a request failed.
fn reason(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "it does not answer in time".to_owned();
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// How much to put up with.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For a connection to be made.
    pub connect: Duration,
    /// For the next byte of an answer.
    pub idle: Duration,
    /// How often a request is made that fails for a reason that could pass.
    pub attempts: u32,
    /// Before the second attempt; twice as long before each further one.
    pub backoff: Duration,
    /// The longest wait that a registry may ask for before an attempt.
    pub longest_wait: Duration,
    /// For a credential helper to answer: it may ask its user for a password.
    pub helper: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(30),
            attempts: 4,
            backoff: Duration::from_millis(500),
            longest_wait: Duration::from_secs(60),
            helper: Duration::from_secs(60),
        }
    }
}

/// Who is told how a pull goes on. Calls come from several threads.
pub trait Progress: Send + Sync {
    /// A layer of this many compressed bytes is to be downloaded.
    fn starts(&self, layer: Digest, size: u64);
    /// So much of it is there.
    fn has(&self, layer: Digest, bytes: u64);
    /// It is complete, and is being unpacked.
    fn unpacks(&self, layer: Digest);
    /// The store has it, by this pull's work or another's.
    fn done(&self, layer: Digest);
}

/// A layer that the store may or may not have.
#[derive(Clone, Copy, Debug)]
struct Wish {
    blob: Blob,
    diff_id: Digest,
}

impl Store {
    /// Pulls an image for this machine from a registry, `REGISTRY/NAME[:TAG][@DIGEST]`, and names it so.
    ///
    /// Credentials come from a file as docker has it, such as [`docker_config`], if there is one. What the store has already is
    /// not fetched.
    ///
    /// # Errors
    ///
    /// Whatever fails is said by one line with cause and remedy; the store is then as it was.
    pub fn pull(
        &self,
        reference: &str,
        credentials: Option<PathBuf>,
        patience: Patience,
        progress: Arc<dyn Progress>,
    ) -> Result<Image, PullError> {
        let wanted = Wanted::parse(reference)?;
        let name = Name::parse(reference)?;
        self.make_directories()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(ImageError::io("start a thread for", self.root()))?;
        let pulled = runtime.block_on(self.fetch(wanted, credentials, patience, progress));
        // A thread may be waiting for another process's lock, which this one need not wait for any more.
        runtime.shutdown_background();
        let (record, holds) = pulled.inspect_err(|_| {
            // Layers that were complete belong to no image; what is wrong with others is for others to hear.
            let _ = self.collect_garbage();
        })?;
        self.publish(&record, std::slice::from_ref(&name))?;
        let _ = self.collect_garbage();
        Ok(self.image(record, Some(&name), holds))
    }

    async fn fetch(
        &self,
        wanted: Wanted,
        credentials: Option<PathBuf>,
        patience: Patience,
        progress: Arc<dyn Progress>,
    ) -> Result<(Record, Vec<File>), PullError> {
        let login = credentials::find(credentials, &wanted.credential_keys(), patience.helper).await?;
        let (reference, digest) = (wanted.manifest().to_owned(), wanted.digest());
        let registry = Arc::new(Registry::connect(wanted, login, patience).await?);
        let (manifest, manifest_digest) = find_manifest(&registry, &reference, digest).await?;
        let config_digest = oci::config_digest(&manifest)?;
        if let Some(known) = self.held(&config_digest)? {
            return Ok(known);
        }
        let config = registry.document(config_digest, "the image's configuration").await?;
        let config: ImageConfiguration = parse("the image's configuration", &config)?;
        check_platform(&config)?;
        let wishes: Vec<Wish> = oci::layers(&manifest, &config)?
            .into_iter()
            .map(|(blob, size, diff_id)| Wish { blob: Blob { digest: blob, size }, diff_id })
            .collect();
        let holds = self.obtain_all(&registry, &wishes, progress).await?;
        let diff_ids: Vec<Digest> = wishes.iter().map(|wish| wish.diff_id).collect();
        Ok((self.new_record(config_digest, Some(manifest_digest), &diff_ids, config), holds))
    }

    /// Has all layers in the store, and gives what keeps them there.
    async fn obtain_all(
        &self,
        registry: &Arc<Registry>,
        wishes: &[Wish],
        progress: Arc<dyn Progress>,
    ) -> Result<Vec<File>, PullError> {
        let mut holds = Vec::with_capacity(wishes.len());
        let mut missing = Vec::new();
        let mut seen = HashSet::new();
        for wish in wishes.iter().filter(|wish| seen.insert(wish.diff_id)) {
            match self.hold_layer(&wish.diff_id)? {
                Some(hold) => holds.push(hold),
                None => missing.push(*wish),
            }
        }
        for wish in &missing {
            progress.starts(wish.blob.digest, wish.blob.size);
        }
        let slots = Arc::new(Semaphore::new(LAYERS_AT_ONCE));
        let (cancel, cancelled) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for wish in missing {
            let (store, registry, progress) = (self.clone(), registry.clone(), progress.clone());
            let (slots, cancelled) = (slots.clone(), cancelled.clone());
            tasks.spawn(async move {
                let _slot = slots.acquire().await;
                store.obtain(&registry, wish, progress, cancelled).await
            });
        }
        // The others clean up after themselves, so they are told and waited for.
        let mut failed = None;
        while let Some(outcome) = tasks.join_next().await {
            match outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) {
                Ok(hold) => holds.extend(hold),
                Err(error) => {
                    failed.get_or_insert(error);
                    cancel.send_replace(true);
                }
            }
        }
        failed.map_or(Ok(holds), Err)
    }

    /// Has one layer in the store; gives nothing only when cancelled.
    async fn obtain(
        &self,
        registry: &Registry,
        wish: Wish,
        progress: Arc<dyn Progress>,
        mut cancelled: watch::Receiver<bool>,
    ) -> Result<Option<File>, PullError> {
        let path = self.blob_path(&wish.blob.digest);
        let locked = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || lock(&path, Share::Exclusive))
        };
        let file = tokio::select! {
            locked = locked => locked.map_err(io::Error::from).and_then(|file| file),
            _ = cancelled.wait_for(|cancelled| *cancelled) => return Ok(None),
        };
        let file = OwnBlob { file: Arc::new(file.map_err(ImageError::io("lock", &path))?), path };
        // Whoever had the lock may have done the work.
        if let Some(hold) = self.hold_layer(&wish.diff_id)? {
            progress.done(wish.blob.digest);
            return Ok(Some(hold));
        }
        let have = file.file.metadata().map_err(ImageError::io("examine", &file.path))?.len();
        if self.free_bytes()? < wish.blob.size.saturating_sub(have) {
            return Err(ImageError::DiskFull(self.root().to_owned()).into());
        }
        let local = |error| PullError::Store(ImageError::io("write", &file.path)(error));
        tokio::select! {
            downloaded = download(registry, wish.blob, file.file.clone(), &*progress, local) => downloaded?,
            _ = cancelled.wait_for(|cancelled| *cancelled) => return Ok(None),
        }
        progress.unpacks(wish.blob.digest);
        let store = self.clone();
        let unpacked = tokio::task::spawn_blocking(move || {
            let region = Region { file: file.file.clone(), offset: 0, length: wish.blob.size };
            // Its digest has just been verified.
            store.layer(&LayerBlob { diff_id: wish.diff_id, digest: None, region })
        });
        let hold = unpacked.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        progress.done(wish.blob.digest);
        Ok(Some(hold))
    }
}

/// A blob's file that is locked; removed with all that is in it.
struct OwnBlob {
    file: Arc<File>,
    path: PathBuf,
}

impl Drop for OwnBlob {
    fn drop(&mut self) {
        // Before the lock goes, so that whoever waits for it sees that the file has gone.
        if still_there(&self.file, &self.path).unwrap_or(false) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Follows indexes to the manifest for this machine.
async fn find_manifest(
    registry: &Registry,
    reference: &str,
    digest: Option<Digest>,
) -> Result<(ImageManifest, Digest), PullError> {
    let (mut reference, mut expected) = (reference.to_owned(), digest);
    for _ in 0..=INDEXES_DEEP_MAX {
        let (document, digest) = registry.manifest(&reference, expected).await?;
        match kind(&document)? {
            Kind::Manifest => return Ok((parse("the image's manifest", &document)?, digest)),
            Kind::Index => {
                let index: ImageIndex = parse("the image's index", &document)?;
                let next = oci::for_this_machine(&index)?;
                (reference, expected) = (next.to_string(), Some(next));
            }
        }
    }
    let (what, cap) = ("the depth of its indexes".to_owned(), INDEXES_DEEP_MAX as u64);
    Err(SourceError::TooLarge { what, size: cap + 1, cap }.into())
}

enum Kind {
    Manifest,
    Index,
}

/// Tells a manifest from an index by what it holds: both may come without a type.
fn kind(document: &[u8]) -> Result<Kind, PullError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Outline {
        media_type: Option<String>,
        config: Option<IgnoredAny>,
        manifests: Option<IgnoredAny>,
    }
    debug_assert!(document.len() as u64 <= JSON_CAP, "the caller reads no more");
    let outline: Outline = parse("the image's manifest", document)?;
    match (outline.config, outline.manifests) {
        (Some(_), None) => Ok(Kind::Manifest),
        (None, Some(_)) => Ok(Kind::Index),
        _ => {
            let media_type = outline.media_type.unwrap_or_else(|| "unknown".to_owned());
            Err(SourceError::MediaType { what: "the manifest", media_type }.into())
        }
    }
}

/// Whether a URL leads to this machine, by its address or as `localhost`.
fn is_loopback_url(url: &Url) -> bool {
    url.host_str().is_some_and(reference::is_loopback)
}
