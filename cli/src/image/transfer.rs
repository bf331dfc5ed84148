//! Images made of an archive of files, and images written out as OCI archives.
//!
//! The store keeps no compressed layers, so what is written out is packed anew: the image has the same files and the same
//! configuration, but digests of its own. They depend on nothing else, so writing it out again, here or where the archive was loaded, gives the
//! same bytes.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use oci_spec::image::{ImageConfiguration, RootFsBuilder};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use super::pack::{PackError, header, pack, padding};
use super::record::Name;
use super::source::{LayerBlob, architecture_here, open_source, parse};
use super::store::Store;
use super::stream::{Region, content_digest};
use super::{Image, ImageError};

/// Why an image cannot be written out.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// There is no such image, or the store is unusable.
    #[error(transparent)]
    Store(#[from] ImageError),
    /// A layer cannot be packed.
    #[error("layer {layer}: {source}")]
    Layer {
        /// The directory.
        layer: String,
        /// Why not.
        source: PackError,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {source}: choose a place with room that may be written to", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Store {
    /// Makes an image of one layer from an archive of a root file system, plain or compressed, and names it.
    ///
    /// # Errors
    ///
    /// Fails where the file is no archive, has what no layer may have, or does not fit the disk.
    pub fn import(&self, archive: &Path, name: &str) -> Result<Image, ImageError> {
        let name = Name::parse(name)?;
        let file = open_source(archive)?;
        let length = file.metadata().map_err(ImageError::io("examine", archive))?.len();
        let region = Region { file: Arc::new(file), offset: 0, length };
        self.make_directories()?;
        let diff_id =
            content_digest(&region).map_err(|error| ImageError::Archive { path: archive.to_owned(), source: error })?;
        let config = json!({
            "created": rfc3339(SystemTime::now()),
            "architecture": architecture_here(), "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": [diff_id] },
            "history": [{ "created_by": "hull image import" }],
        });
        let bytes = config.to_string().into_bytes();
        let config: ImageConfiguration = parse("the new image's configuration", &bytes)?;
        let hold = self.layer(&LayerBlob { diff_id, digest: None, region }).inspect_err(|_| {
            let _ = self.collect_garbage();
        })?;
        let record = self.new_record(Digest::of(&bytes), None, &[diff_id], config);
        self.publish(&record, std::slice::from_ref(&name))?;
        let _ = self.collect_garbage();
        Ok(self.image(record, Some(&name), vec![hold]))
    }

    /// Writes an image as an OCI archive, and gives the digest that it has there. The file appears when it is complete.
    ///
    /// # Errors
    ///
    /// Fails where there is no such image or the file cannot be written.
    pub fn export(&self, reference: &str, path: &Path) -> Result<Digest, ExportError> {
        let image = self.find_stored(reference)?;
        let write = |source| ExportError::Write { path: path.to_owned(), source };
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut file = tempfile::Builder::new()
            .prefix(".hull-export-")
            .permissions(std::fs::Permissions::from_mode(0o644))
            .tempfile_in(directory)
            .map_err(write)?;
        let digest = export_to(&image, file.as_file_mut(), path)?;
        file.persist(path).map_err(|error| write(error.error))?;
        Ok(digest)
    }
}

fn export_to(image: &Image, file: &mut File, path: &Path) -> Result<Digest, ExportError> {
    let write = |source| ExportError::Write { path: path.to_owned(), source };
    let mut archive = Archive { file };
    archive.add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).map_err(write)?;
    let mut layers = Vec::new();
    for layer in image.layers() {
        let failed = |source| match source {
            PackError::Write(source) => write(source),
            source => ExportError::Layer { layer: layer.display().to_string(), source },
        };
        let root: OwnedFd = File::open(layer).map_err(ImageError::io("open", layer))?.into();
        layers.push(archive.add_layer(&root).map_err(failed)?);
    }
    let mut config = image.config().clone();
    let diff_ids: Vec<String> = layers.iter().map(|(digest, _)| digest.to_string()).collect();
    // Layers that do not matter are not there, so the history may not fit any more.
    let told = config.history().iter().flatten().filter(|entry| entry.empty_layer() != Some(true)).count();
    if told != diff_ids.len() {
        config.set_history(None);
    }
    let rootfs = RootFsBuilder::default().typ("layers").diff_ids(diff_ids).build();
    config.set_rootfs(rootfs.map_err(|error| write(io::Error::other(error)))?);
    let descriptor = |media_type: &str, digest: &Digest, size: u64| json!({ "mediaType": format!("application/vnd.oci.image.{media_type}"), "digest": digest, "size": size });
    let config = serde_json::to_vec(&config).map_err(|error| write(error.into()))?;
    let config_digest = archive.add_blob(&config).map_err(write)?;
    let layers: Vec<_> = layers.iter().map(|(digest, size)| descriptor("layer.v1.tar", digest, *size)).collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", &config_digest, config.len() as u64), "layers": layers,
    });
    let manifest = manifest.to_string().into_bytes();
    let manifest_digest = archive.add_blob(&manifest).map_err(write)?;
    let mut listed = descriptor("manifest.v1+json", &manifest_digest, manifest.len() as u64);
    if image.name() != image.digest().to_string() {
        listed["annotations"] = json!({
            "io.containerd.image.name": image.name(), "org.opencontainers.image.ref.name": image.name(),
        });
    }
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [listed],
    });
    archive.add("index.json", index.to_string().as_bytes()).map_err(write)?;
    archive.finish().map_err(write)?;
    Ok(config_digest)
}

/// The archive around an image.
struct Archive<'a> {
    file: &'a mut File,
}

impl Archive<'_> {
    fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        self.file.write_all(&header(b'0', name.as_bytes(), b"", content.len() as u64, |_| {}))?;
        self.file.write_all(content)?;
        self.file.write_all(&[0; 512][..padding(content.len() as u64)])
    }

    fn add_blob(&mut self, content: &[u8]) -> io::Result<Digest> {
        let digest = Digest::of(content);
        self.add(&blob_name(&digest), content)?;
        Ok(digest)
    }

    /// Packs a layer. Its digest and size are known afterwards, so its header is written last.
    fn add_layer(&mut self, layer: &OwnedFd) -> Result<(Digest, u64), PackError> {
        let start = self.file.stream_position().map_err(PackError::Write)?;
        self.file.write_all(&[0; 512]).map_err(PackError::Write)?;
        let (digest, size) = pack_hashed(layer, self.file)?;
        self.finish_layer(start, &digest, size).map_err(PackError::Write)?;
        Ok((digest, size))
    }

    fn finish_layer(&mut self, start: u64, digest: &Digest, size: u64) -> io::Result<u64> {
        self.file.write_all(&[0; 512][..padding(size)])?;
        let end = self.file.stream_position()?;
        self.file.seek(SeekFrom::Start(start))?;
        self.file.write_all(&header(b'0', blob_name(digest).as_bytes(), b"", size, |_| {}))?;
        self.file.seek(SeekFrom::Start(end))
    }

    fn finish(self) -> io::Result<()> {
        self.file.write_all(&[0; 1024])
    }
}

fn pack_hashed(layer: &OwnedFd, file: &mut File) -> Result<(Digest, u64), PackError> {
    let inner = BufWriter::with_capacity(256 << 10, file);
    let mut hashed = Hashed { inner, hasher: Sha256::new(), size: 0 };
    pack(layer, &mut hashed)?;
    hashed.flush().map_err(PackError::Write)?;
    Ok((Digest::finish(hashed.hasher), hashed.size))
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

struct Hashed<W> {
    inner: W,
    hasher: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A time in UTC as RFC 3339 has it, in whole seconds.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year:04}-{month:02}-{:02}T{:02}:{:02}:{:02}Z", days + 1, rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_have_a_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
