//! OCI image layouts: index, perhaps indexes below it, manifest, configuration, layers.

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType};

use super::{Chosen, Details, LayerBlob, Rest, Source, SourceError, architecture_here, diff_ids, parse, platform_here};
use crate::image::digest::Digest;
use crate::image::stream::Region;

/// An index in an index is usual for images of several architectures; more is not.
pub(in crate::image) const INDEXES_DEEP_MAX: usize = 4;
/// Indexes that are read to find one image.
const INDEXES_MAX: usize = 64;

/// Docker's names for the same documents.
pub(in crate::image) const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(in crate::image) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_LAYERS: [&str; 5] = [
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// A whole name; containerd and docker write it.
const NAME_ANNOTATION: &str = "io.containerd.image.name";
/// A name, or only a tag.
const REF_ANNOTATION: &str = "org.opencontainers.image.ref.name";

pub(in crate::image) type Manifest = ImageManifest;

/// A manifest that an index leads to.
struct Candidate {
    descriptor: Descriptor,
    name: Option<String>,
    reference: Option<String>,
}

impl Candidate {
    /// Linux on this machine's architecture, or not said.
    fn fits(&self) -> bool {
        self.descriptor.platform().as_ref().is_none_or(|platform| {
            platform.os().to_string() == "linux" && platform.architecture().to_string() == architecture_here()
        })
    }

    /// A program built for a variant may need more than this machine has, so one without comes first.
    fn has_variant(&self) -> bool {
        self.descriptor.platform().as_ref().is_some_and(|platform| platform.variant().is_some())
    }

    fn is_called(&self, name: &str) -> bool {
        [&self.name, &self.reference].into_iter().any(|known| known.as_deref() == Some(name))
    }

    /// The whole name, if it has one.
    fn full_name(&self) -> Option<&String> {
        self.name.as_ref().or(self.reference.as_ref().filter(|text| text.contains([':', '/'])))
    }
}

pub(super) fn choose(source: &Source, name: Option<&str>) -> Result<Chosen, SourceError> {
    let index: ImageIndex = parse("index.json", &source.read_small("index.json")?)?;
    let mut walk = Walk { source, indexes: 0, found: Vec::new() };
    walk.index(&index, None, 0)?;
    let (mut fitting, others): (Vec<_>, Vec<_>) = walk.found.into_iter().partition(Candidate::fits);
    if let Some(name) = name.filter(|name| fitting.iter().any(|candidate| candidate.is_called(name))) {
        fitting.retain(|candidate| candidate.is_called(name));
    }
    // Stable, so the first of equals stays the first.
    fitting.sort_by_key(Candidate::has_variant);
    let Some(first) = fitting.first() else {
        return Err(match others.is_empty() {
            true => SourceError::MissingBlob("any image".to_owned()),
            false => SourceError::WrongPlatform { wanted: platform_here(), found: platforms(&others) },
        });
    };
    let digest = first.descriptor.digest().clone();
    let shown = |candidate: &Candidate| candidate.full_name().or(candidate.reference.as_ref()).cloned();
    let called = shown(first);
    if fitting.iter().any(|other| *other.descriptor.digest() != digest && shown(other) != called) {
        let names: Vec<_> = fitting.iter().filter_map(shown).take(20).collect();
        return Err(SourceError::Several { path: source.path.clone(), names: names.join(", ") });
    }
    let mut names: Vec<String> = Vec::new();
    for name in fitting.iter().filter(|other| *other.descriptor.digest() == digest).filter_map(Candidate::full_name) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let manifest: ImageManifest = parse("the image's manifest", &read(source, &first.descriptor, "the manifest")?)?;
    Ok(Chosen {
        digest: config_digest(&manifest)?,
        manifest: Some(digest_of(&first.descriptor)?),
        names,
        rest: Rest::Oci(Box::new(manifest)),
    })
}

pub(super) fn details(source: &Source, manifest: &Manifest) -> Result<Details, SourceError> {
    let config = parse("the image's configuration", &read(source, manifest.config(), "the configuration")?)?;
    let found = layers(manifest, &config)?.into_iter().zip(manifest.layers()).map(|((_, _, diff_id), descriptor)| {
        let (region, digest) = find(source, descriptor, "a layer")?;
        Ok(LayerBlob { diff_id, digest: Some(digest), region })
    });
    let layers = found.collect::<Result<_, SourceError>>()?;
    Ok(Details { config, layers })
}

/// The digest of the image's configuration, if it is one.
pub(in crate::image) fn config_digest(manifest: &Manifest) -> Result<Digest, SourceError> {
    match manifest.config().media_type() {
        MediaType::ImageConfig => {}
        MediaType::Other(other) if other == DOCKER_CONFIG => {}
        other => return Err(SourceError::MediaType { what: "the configuration", media_type: other.to_string() }),
    }
    digest_of(manifest.config())
}

/// Blob, compressed size in bytes and diff id of each layer, bottom first.
pub(in crate::image) fn layers(
    manifest: &Manifest,
    config: &ImageConfiguration,
) -> Result<Vec<(Digest, u64, Digest)>, SourceError> {
    let descriptors = manifest.layers();
    let diff_ids = diff_ids(config, descriptors.len())?;
    let described = descriptors.iter().zip(diff_ids).map(|(descriptor, diff_id)| {
        check_layer_type(descriptor.media_type())?;
        Ok((digest_of(descriptor)?, descriptor.size(), diff_id))
    });
    described.collect()
}

/// What of a registry's index is for this machine: a manifest, or if there is none an index.
pub(in crate::image) fn for_this_machine(index: &ImageIndex) -> Result<Digest, SourceError> {
    let candidate = |descriptor: &Descriptor| Candidate { name: None, reference: None, descriptor: descriptor.clone() };
    let images = index.manifests().iter().filter(|listed| kind(listed.media_type()).is_some()).map(candidate);
    let (mut fitting, others): (Vec<_>, Vec<_>) = images.partition(Candidate::fits);
    // Stable, so the first of equals stays the first.
    fitting.sort_by_key(|candidate| {
        (kind(candidate.descriptor.media_type()) == Some(Kind::Index), candidate.has_variant())
    });
    let Some(first) = fitting.first() else {
        return Err(SourceError::WrongPlatform { wanted: platform_here(), found: platforms(&others) });
    };
    digest_of(&first.descriptor)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Index,
    Manifest,
}

/// What of an image a descriptor leads to, if anything.
fn kind(media_type: &MediaType) -> Option<Kind> {
    match media_type {
        MediaType::ImageIndex => Some(Kind::Index),
        MediaType::ImageManifest => Some(Kind::Manifest),
        MediaType::Other(other) if other == DOCKER_INDEX => Some(Kind::Index),
        MediaType::Other(other) if other == DOCKER_MANIFEST => Some(Kind::Manifest),
        _ => None,
    }
}

/// Which compression a layer has is seen from its first bytes; its type only says that it is one.
fn check_layer_type(media_type: &MediaType) -> Result<(), SourceError> {
    use MediaType as M;
    match media_type {
        M::ImageLayer | M::ImageLayerGzip | M::ImageLayerZstd => Ok(()),
        M::ImageLayerNonDistributable | M::ImageLayerNonDistributableGzip | M::ImageLayerNonDistributableZstd => Ok(()),
        M::Other(other) if DOCKER_LAYERS.contains(&other.as_str()) => Ok(()),
        other => Err(SourceError::MediaType { what: "a layer", media_type: other.to_string() }),
    }
}

struct Walk<'a> {
    source: &'a Source,
    indexes: usize,
    found: Vec<Candidate>,
}

impl Walk<'_> {
    fn index(&mut self, index: &ImageIndex, parent: Option<&Candidate>, depth: usize) -> Result<(), SourceError> {
        self.indexes += 1;
        for (what, value, cap) in [
            ("the depth of its indexes", depth, INDEXES_DEEP_MAX),
            ("the number of its indexes", self.indexes, INDEXES_MAX),
        ] {
            if value > cap {
                return Err(SourceError::TooLarge { what: what.to_owned(), size: value as u64, cap: cap as u64 });
            }
        }
        for descriptor in index.manifests() {
            let annotation = |key| descriptor.annotations().as_ref().and_then(|all| all.get(key)).cloned();
            let inherited = |field: fn(&Candidate) -> &Option<String>| parent.and_then(|parent| field(parent).clone());
            let candidate = Candidate {
                name: annotation(NAME_ANNOTATION).or_else(|| inherited(|parent| &parent.name)),
                reference: annotation(REF_ANNOTATION).or_else(|| inherited(|parent| &parent.reference)),
                descriptor: descriptor.clone(),
            };
            match kind(descriptor.media_type()) {
                Some(Kind::Index) => self.nested(&candidate, depth)?,
                Some(Kind::Manifest) => self.found.push(candidate),
                // Whatever else an index lists is no image.
                None => {}
            }
        }
        Ok(())
    }

    fn nested(&mut self, candidate: &Candidate, depth: usize) -> Result<(), SourceError> {
        let index: ImageIndex = parse("an index", &read(self.source, &candidate.descriptor, "an index")?)?;
        self.index(&index, Some(candidate), depth + 1)
    }
}

fn platforms(candidates: &[Candidate]) -> String {
    let mut all: Vec<String> = candidates
        .iter()
        .filter_map(|candidate| candidate.descriptor.platform().as_ref())
        .map(|platform| format!("{}/{}", platform.os(), platform.architecture()))
        // Attestations are listed so.
        .filter(|platform| platform != "unknown/unknown")
        .collect();
    all.sort();
    all.dedup();
    all.truncate(20);
    if all.is_empty() { "no platform at all".to_owned() } else { all.join(", ") }
}

fn digest_of(descriptor: &Descriptor) -> Result<Digest, SourceError> {
    Ok(descriptor.digest().as_ref().parse()?)
}

/// A descriptor's blob, of the size that it says.
fn find(source: &Source, descriptor: &Descriptor, what: &str) -> Result<(Region, Digest), SourceError> {
    let digest = digest_of(descriptor)?;
    let name = format!("blobs/sha256/{}", digest.hex());
    let region = source.blobs.find(&name)?.ok_or_else(|| SourceError::MissingBlob(format!("{what}, {name}")))?;
    if region.length != descriptor.size() {
        return Err(SourceError::Mismatch {
            blob: format!("{what}, {digest}, does not have its size"),
            expected: format!("{} bytes", descriptor.size()),
            found: format!("{} bytes", region.length),
        });
    }
    Ok((region, digest))
}

/// Reads a document and verifies it.
fn read(source: &Source, descriptor: &Descriptor, what: &str) -> Result<Vec<u8>, SourceError> {
    if descriptor.size() > super::JSON_CAP {
        let (size, cap) = (descriptor.size(), super::JSON_CAP);
        return Err(SourceError::TooLarge { what: format!("the size of {what}"), size, cap });
    }
    let (region, expected) = find(source, descriptor, what)?;
    let bytes = region.read_all().map_err(|error| SourceError::Read { path: source.path.clone(), source: error })?;
    let found = Digest::of(&bytes);
    if found != expected {
        return Err(SourceError::Mismatch {
            blob: format!("{what} does not have its digest"),
            expected: expected.to_string(),
            found: found.to_string(),
        });
    }
    Ok(bytes)
}
