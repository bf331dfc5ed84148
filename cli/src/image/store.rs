//! The store itself: loading, finding, listing and removing images.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use oci_spec::image::ImageConfiguration;

use super::digest::Digest;
use super::lock::{Hold, Share, lock, try_lock};
use super::record::{Listed, Name, Record};
use super::source::{Chosen, LayerBlob, Source};
use super::staging::{Staging, sweep};
use super::stream::with_content;
use super::tar::Reader;
use super::unpack::{UnpackError, unpack};
use super::{Image, ImageError};

/// Fewer digits of a digest than this are taken for a name.
const DIGEST_PREFIX_MIN: usize = 4;
/// Left free for others when the disk runs full.
const RESERVE_BYTES: u64 = 16 << 20;
/// Candidates that an error lists.
const SHOWN: usize = 5;

/// A directory of images. It is made when the first image is loaded.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// Something that [`Store::prune`] has removed.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Freed {
    /// `layer` or `blob`, a compressed layer that was not pulled to its end.
    pub kind: &'static str,
    /// Its digest.
    pub digest: String,
    /// What it took.
    pub size_bytes: u64,
}

/// What to call an image that is loaded.
enum Naming<'a> {
    Given(&'a str),
    AsTheSourceSays,
    /// Loaded to be run, not to be found.
    None,
}

impl Store {
    /// Opens the store at `root` and removes what processes that died have left in it.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        let root = std::path::absolute(root).map_err(ImageError::io("find", root))?;
        let store = Self { root };
        // Whoever may not write may still look.
        match sweep(&store.at("tmp")) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            other => other.map_err(ImageError::io("clean", &store.at("tmp")))?,
        }
        Ok(store)
    }

    /// Loads an image from an OCI layout directory or archive, or a docker archive.
    ///
    /// It gets the name `name`, or without one all names that the source gives it; a name that another image has
    /// moves. Layers that the store has already are not read.
    pub fn load(&self, source: &Path, name: Option<&str>) -> Result<Image, ImageError> {
        self.load_as(source, name.map_or(Naming::AsTheSourceSays, Naming::Given))
    }

    /// Finds an image by path, name or digest, and loads it if it is a path.
    ///
    /// What begins with `/` or `.` is a path. Everything else is, in this order: a name in the store, its tag `latest` if
    /// it has none; a path that exists; the end of one name in the store (`debian` for
    /// `mirror.example/library/debian:latest`); four or more digits of one digest, with or without `sha256:`.
    pub fn resolve(&self, reference: &str) -> Result<Image, ImageError> {
        let path = Path::new(reference);
        if reference.starts_with(['/', '.']) {
            return self.load_as(path, Naming::None);
        }
        let missing = || ImageError::NoSuchImage(reference.to_owned());
        if let Some((name, digest)) = self.named(reference) {
            return self.get(&digest, Some(&name))?.ok_or_else(missing);
        }
        if Source::looks_like_one(path) {
            return self.load_as(path, Naming::None);
        }
        self.find_stored(reference)
    }

    /// Finds an image that is in the store, by name or digest as [`Store::resolve`] does.
    pub(super) fn find_stored(&self, reference: &str) -> Result<Image, ImageError> {
        let (name, digest) = match self.named(reference) {
            Some((name, digest)) => (Some(name), digest),
            None => self.find(reference)?,
        };
        self.get(&digest, name.as_ref())?.ok_or_else(|| ImageError::NoSuchImage(reference.to_owned()))
    }

    /// All images, once for each of their names, those without one last.
    pub fn list(&self) -> Result<Vec<Listed>, ImageError> {
        let names = self.names()?;
        let mut images: Vec<Listed> = Vec::new();
        for digest in self.digests()? {
            // It may just have been removed.
            let Some(record) = self.record(&digest)? else { continue };
            let known = names.iter().filter(|(_, named)| *named == digest).map(|(name, _)| name.as_str().to_owned());
            let known: Vec<String> = known.collect();
            match known.is_empty() {
                true => images.push(Listed::new(None, record)),
                false => images.extend(known.into_iter().map(|name| Listed::new(Some(name), record.clone()))),
            }
        }
        images.sort_by(|a, b| (a.name.is_none(), &a.name, &a.digest).cmp(&(b.name.is_none(), &b.name, &b.digest)));
        Ok(images)
    }

    /// Removes a name, or an image with all its names if a digest is given.
    ///
    /// An image without names goes, and so do layers that no image and no [`Hold`] needs. The layers of an image
    /// that is in use go with the first removal or load after its use ends.
    pub fn remove(&self, reference: &str) -> Result<(), ImageError> {
        let change = self.change(reference)?;
        let (name, digest) = match self.named(reference) {
            Some((name, digest)) => (Some(name), digest),
            None => self.find(reference)?,
        };
        let mut others = self.names()?;
        others.retain(|(other, named)| *named == digest && name.as_ref() != Some(other));
        let doomed: Vec<Name> = match name {
            Some(name) if !others.is_empty() => vec![name],
            name => {
                remove_file(&self.image_path(&digest))?;
                others.into_iter().map(|(other, _)| other).chain(name).collect()
            }
        };
        for name in doomed {
            remove_file(&self.at("names").join(name.file_name()))?;
        }
        drop(change);
        self.collect_garbage()
    }

    /// Removes layers that no image and no [`Hold`] needs.
    pub fn collect_garbage(&self) -> Result<(), ImageError> {
        self.remove_layers().map(drop)
    }

    /// Removes all that nobody needs: layers that no image and no [`Hold`] needs, and what pulls that died have left, which
    /// another pull of the same image could have gone on with.
    pub fn prune(&self) -> Result<Vec<Freed>, ImageError> {
        // There is no store yet, so there is nothing to remove.
        if !self.root.exists() {
            return Ok(Vec::new());
        }
        self.make_directories()?;
        let mut freed = self.remove_layers()?;
        for blob in digests_in(&self.at("blobs"), "")? {
            let path = self.blob_path(&blob);
            // Whoever has the lock is pulling it.
            let Some(file) = try_lock(&path).map_err(ImageError::io("lock", &path))? else { continue };
            let size_bytes = file.metadata().map_err(ImageError::io("examine", &path))?.len();
            remove_file(&path)?;
            freed.push(Freed { kind: "blob", digest: blob.to_string(), size_bytes });
        }
        Ok(freed)
    }

    fn remove_layers(&self) -> Result<Vec<Freed>, ImageError> {
        let change = self.change("")?;
        let mut needed = HashSet::new();
        for digest in self.digests()? {
            needed.extend(self.record(&digest)?.map(|record| record.layers).unwrap_or_default());
        }
        let (mut doomed, mut freed) = (Vec::new(), Vec::new());
        let known: HashSet<Digest> =
            digests_in(&self.at("layers"), "")?.chain(digests_in(&self.at("uses"), "")?).collect();
        for diff_id in known.difference(&needed) {
            let use_path = self.use_path(diff_id);
            let locked = try_lock(&use_path).map_err(ImageError::io("lock", &use_path))?;
            let Some(_lock) = locked else { continue };
            let (layer, staging) = (self.layer_path(diff_id), self.staging()?);
            match fs::rename(&layer, staging.join("layer")) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => {
                    other.map_err(ImageError::io("remove", &layer))?;
                    let size_bytes = self.layer_bytes(diff_id);
                    freed.push(Freed { kind: "layer", digest: diff_id.to_string(), size_bytes });
                }
            }
            remove_file(&use_path)?;
            doomed.push(staging);
        }
        // The slow part needs no lock.
        drop(change);
        drop(doomed);
        Ok(freed)
    }

    fn load_as(&self, path: &Path, naming: Naming<'_>) -> Result<Image, ImageError> {
        let (wanted, given) = match naming {
            Naming::Given(name) => (Some(name), Some(Name::parse(name)?)),
            Naming::AsTheSourceSays | Naming::None => (None, None),
        };
        let source = Source::open(path)?;
        let chosen = source.choose(wanted)?;
        let names: Vec<Name> = match naming {
            Naming::AsTheSourceSays => chosen.names.iter().filter_map(|name| Name::parse(name).ok()).collect(),
            Naming::Given(_) | Naming::None => given.into_iter().collect(),
        };
        self.make_directories()?;
        let known = self.held(&chosen.digest)?;
        let is_new = known.is_none();
        let (record, holds) = match known {
            Some(known) => known,
            None => self.unpack_all(&source, &chosen).inspect_err(|_| {
                // What was unpacked before belongs to no image; what is wrong with that is for others to hear.
                let _ = self.collect_garbage();
            })?,
        };
        self.publish(&record, &names)?;
        if is_new {
            // The image is there, so what is wrong with others is for those to hear who use or remove them.
            let _ = self.collect_garbage();
        }
        Ok(self.image(record, names.first(), holds))
    }

    fn unpack_all(&self, source: &Source, chosen: &Chosen) -> Result<(Record, Vec<File>), ImageError> {
        let details = source.details(chosen)?;
        let holds = details.layers.iter().map(|blob| self.layer(blob)).collect::<Result<Vec<_>, _>>()?;
        let diff_ids: Vec<Digest> = details.layers.iter().map(|blob| blob.diff_id).collect();
        Ok((self.new_record(chosen.digest, chosen.manifest, &diff_ids, details.config), holds))
    }

    /// The record of an image whose layers are all there.
    pub(super) fn new_record(
        &self,
        digest: Digest,
        manifest: Option<Digest>,
        diff_ids: &[Digest],
        config: ImageConfiguration,
    ) -> Record {
        Record {
            digest,
            manifest,
            size_bytes: diff_ids.iter().collect::<HashSet<_>>().into_iter().map(|id| self.layer_bytes(id)).sum(),
            created: config.created().clone(),
            layers: self.effective_layers(diff_ids),
            config,
        }
    }

    /// The recorded image, if all its layers are there.
    fn get(&self, digest: &Digest, name: Option<&Name>) -> Result<Option<Image>, ImageError> {
        Ok(self.held(digest)?.map(|(record, holds)| self.image(record, name, holds)))
    }

    /// The record of an image whose layers are all there, and what keeps them there.
    pub(super) fn held(&self, digest: &Digest) -> Result<Option<(Record, Vec<File>)>, ImageError> {
        let Some(record) = self.record(digest)? else { return Ok(None) };
        let holds = record.layers.iter().map(|diff_id| self.hold_layer(diff_id));
        let holds = holds.collect::<Result<Option<Vec<_>>, _>>()?;
        Ok(holds.map(|holds| (record, holds)))
    }

    pub(super) fn image(&self, record: Record, name: Option<&Name>, holds: Vec<File>) -> Image {
        Image {
            digest: record.digest,
            name: name.map_or_else(|| record.digest.to_string(), |name| name.as_str().to_owned()),
            size_bytes: record.size_bytes,
            layers: record.layers.iter().map(|diff_id| self.layer_path(diff_id)).collect(),
            config: record.config,
            hold: Hold::new(holds),
        }
    }

    /// A shared lock on a layer, if it is there.
    pub(super) fn hold_layer(&self, diff_id: &Digest) -> Result<Option<File>, ImageError> {
        let path = self.use_path(diff_id);
        let hold = lock(&path, Share::Shared).map_err(ImageError::io("lock", &path))?;
        Ok(self.layer_path(diff_id).exists().then_some(hold))
    }

    /// A shared lock on a layer that is there, at the latest once this returns.
    pub(super) fn layer(&self, blob: &LayerBlob) -> Result<File, ImageError> {
        if let Some(hold) = self.hold_layer(&blob.diff_id)? {
            return Ok(hold);
        }
        // Those who want to unpack stand in line here and not at the layer's own lock: who waits for that exclusively waits as long
        // as a container lives, and who only tries it can be kept from it forever by others that look whether the layer is there.
        let turn_path = self.at("unpacking").join(blob.diff_id.hex());
        let _turn = lock(&turn_path, Share::Exclusive).map_err(ImageError::io("lock", &turn_path))?;
        let hold = self.layer_in_turn(blob);
        remove_file(&turn_path)?;
        hold
    }

    fn layer_in_turn(&self, blob: &LayerBlob) -> Result<File, ImageError> {
        let path = self.use_path(&blob.diff_id);
        // Shared is enough: only who removes layers takes it exclusively.
        let mut hold = lock(&path, Share::Shared).map_err(ImageError::io("lock", &path))?;
        if !self.layer_path(&blob.diff_id).exists() {
            self.unpack(blob, &mut hold)?;
        }
        Ok(hold)
    }

    fn unpack(&self, blob: &LayerBlob, use_file: &mut File) -> Result<(), ImageError> {
        let staging = self.staging()?;
        let path = staging.join("layer");
        let layer = |source| ImageError::Layer { diff_id: blob.diff_id, source };
        let made = DirBuilder::new().mode(0o755).create(&path).and_then(|()| File::open(&path));
        let root = made.map_err(ImageError::io("make", &path))?;
        let free = self.free_bytes()?;
        if free < blob.region.length {
            return Err(layer(UnpackError::DiskFull));
        }
        let bytes = with_content(&blob.region, blob.digest, blob.diff_id, free, |content| {
            let mut archive = Reader::new(content);
            let bytes = unpack(&mut archive, root.into())?;
            Ok::<_, UnpackError>((bytes, archive.finish()?))
        })
        .map_err(layer)?;
        let size = use_file.set_len(0).and_then(|()| use_file.write_all(bytes.to_string().as_bytes()));
        size.map_err(ImageError::io("write", &self.use_path(&blob.diff_id)))?;
        fs::rename(&path, self.layer_path(&blob.diff_id))
            .map_err(ImageError::io("put a layer into", &self.at("layers")))
    }

    fn layer_bytes(&self, diff_id: &Digest) -> u64 {
        fs::read_to_string(self.use_path(diff_id)).ok().and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    /// The layers as overlayfs wants them: none twice, and none below one that hides everything.
    ///
    /// Of two equal layers the lower adds nothing: all it has, the upper has. Overlayfs ignores that a layer's root is
    /// opaque.
    fn effective_layers(&self, diff_ids: &[Digest]) -> Vec<Digest> {
        let mut layers: Vec<Digest> = Vec::with_capacity(diff_ids.len());
        for diff_id in diff_ids.iter().rev() {
            if layers.contains(diff_id) {
                continue;
            }
            layers.push(*diff_id);
            if super::unpack::is_opaque(&self.layer_path(diff_id)) {
                break;
            }
        }
        layers.reverse();
        layers
    }

    fn record(&self, digest: &Digest) -> Result<Option<Record>, ImageError> {
        let path = self.image_path(digest);
        match fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map(Some).map_err(|source| ImageError::Record { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ImageError::io("read", &path)(error)),
        }
    }

    /// Makes an image that is held visible under these names, whoever may have removed it meanwhile.
    pub(super) fn publish(&self, record: &Record, names: &[Name]) -> Result<(), ImageError> {
        let path = self.image_path(&record.digest);
        let is_named = |name: &Name| self.lookup(name) == Some(record.digest);
        if path.exists() && names.iter().all(is_named) {
            return Ok(());
        }
        let staging = self.staging()?;
        let _change = self.change("")?;
        if !path.exists() {
            let json =
                serde_json::to_vec(record).map_err(|source| ImageError::Record { path: path.clone(), source })?;
            let file = staging.join("record");
            let written = fs::write(&file, json).and_then(|()| fs::rename(file, &path));
            written.map_err(ImageError::io("write", &path))?;
        }
        for name in names.iter().filter(|name| !is_named(name)) {
            let (link, path) = (staging.join("name"), self.at("names").join(name.file_name()));
            let written = symlink(record.digest.hex(), &link).and_then(|()| fs::rename(link, &path));
            written.map_err(ImageError::io("write", &path))?;
        }
        Ok(())
    }

    /// What has just this name.
    fn named(&self, reference: &str) -> Option<(Name, Digest)> {
        let name = Name::parse(reference).ok()?;
        let digest = self.lookup(&name)?;
        Some((name, digest))
    }

    fn lookup(&self, name: &Name) -> Option<Digest> {
        let target = fs::read_link(self.at("names").join(name.file_name())).ok()?;
        Digest::from_hex(target.to_str()?)
    }

    fn names(&self) -> Result<Vec<(Name, Digest)>, ImageError> {
        let names = file_names(&self.at("names"))?.filter_map(|file| Name::from_file_name(&file));
        Ok(names.filter_map(|name| self.lookup(&name).map(|digest| (name, digest))).collect())
    }

    fn digests(&self) -> Result<impl Iterator<Item = Digest> + use<>, ImageError> {
        digests_in(&self.at("images"), ".json")
    }

    /// Finds the one image whose name ends, or whose digest begins, like this. A name comes with it if that was it.
    fn find(&self, reference: &str) -> Result<(Option<Name>, Digest), ImageError> {
        let mut found: Vec<(Option<Name>, Digest)> = Vec::new();
        if let Ok(end) = Name::parse(reference) {
            let names = self.names()?.into_iter().filter(|(name, _)| name.ends_with(&end));
            found.extend(names.map(|(name, digest)| (Some(name), digest)));
        }
        let digits = reference.strip_prefix("sha256:").unwrap_or(reference);
        if found.is_empty() && digits.len() >= DIGEST_PREFIX_MIN {
            found
                .extend(self.digests()?.filter(|digest| digest.hex().starts_with(digits)).map(|digest| (None, digest)));
        }
        if found.len() > 1 {
            let shown = |(name, digest): &(Option<Name>, Digest)| {
                name.as_ref().map_or_else(|| digest.to_string(), |name| name.as_str().to_owned())
            };
            let candidates = found.iter().take(SHOWN).map(shown).collect::<Vec<_>>().join(", ");
            return Err(ImageError::Ambiguous { reference: reference.to_owned(), candidates });
        }
        found.pop().ok_or_else(|| ImageError::NoSuchImage(reference.to_owned()))
    }

    /// The right to change images and names. `reference` is what cannot be found if there is no store.
    fn change(&self, reference: &str) -> Result<File, ImageError> {
        let path = self.at("lock");
        lock(&path, Share::Exclusive).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ImageError::NoSuchImage(reference.to_owned()),
            _ => ImageError::io("lock", &path)(error),
        })
    }

    fn staging(&self) -> Result<Staging, ImageError> {
        Staging::new(&self.at("tmp")).map_err(ImageError::io("make a directory in", &self.at("tmp")))
    }

    /// Layers hold other people's setuid programs, so nobody but the owner gets near them.
    pub(super) fn make_directories(&self) -> Result<(), ImageError> {
        let make = |path: &Path, mode, recursive| match DirBuilder::new().mode(mode).recursive(recursive).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(ImageError::io("make", path)),
        };
        if let Some(parent) = self.root.parent() {
            make(parent, 0o755, true)?;
        }
        make(&self.root, 0o711, false)?;
        ["images", "names", "layers", "uses", "unpacking", "blobs", "tmp"]
            .iter()
            .try_for_each(|name| make(&self.at(name), 0o700, false))
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// What may still be written to the store's disk, in bytes.
    pub(super) fn free_bytes(&self) -> Result<u64, ImageError> {
        let free = rustix::fs::statvfs(&self.root).map_err(io::Error::from);
        let free = free.map_err(ImageError::io("examine", &self.root))?;
        Ok(free.f_bavail.saturating_mul(free.f_frsize).saturating_sub(RESERVE_BYTES))
    }

    /// Where a compressed layer is while it is pulled.
    pub(super) fn blob_path(&self, blob: &Digest) -> PathBuf {
        self.at("blobs").join(blob.hex())
    }

    fn image_path(&self, digest: &Digest) -> PathBuf {
        self.at("images").join(format!("{}.json", digest.hex()))
    }

    fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.at("layers").join(diff_id.hex())
    }

    fn use_path(&self, diff_id: &Digest) -> PathBuf {
        self.at("uses").join(diff_id.hex())
    }
}

/// The names in a directory that are text; nothing if there is no directory.
fn file_names(directory: &Path) -> Result<impl Iterator<Item = String> + use<>, ImageError> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        other => Some(other.map_err(ImageError::io("list", directory))?),
    };
    Ok(entries.into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok()))
}

fn digests_in(directory: &Path, suffix: &'static str) -> Result<impl Iterator<Item = Digest> + use<>, ImageError> {
    Ok(file_names(directory)?.filter_map(move |file| Digest::from_hex(file.strip_suffix(suffix)?)))
}

fn remove_file(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(ImageError::io("remove", path)),
    }
}
