//! What the store writes down of an image, and the names by which images are found.

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::ImageError;
use super::digest::Digest;

/// An image as the store records it, in `images/<digest>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) digest: Digest,
    /// The manifest that it was first loaded by, if there was one.
    pub(super) manifest: Option<Digest>,
    /// What its layers take unpacked.
    pub(super) size_bytes: u64,
    pub(super) created: Option<String>,
    /// Diff ids of the layers that matter, bottom first.
    pub(super) layers: Vec<Digest>,
    pub(super) config: ImageConfiguration,
}

/// A row of [`Store::list`](super::Store::list): an image under one of its names.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// The name, or none for an image that only its digest finds.
    pub name: Option<String>,
    /// The digest of the image's configuration.
    pub digest: String,
    /// The digest of the manifest that it was first loaded by.
    pub manifest: Option<String>,
    /// What its layers take unpacked, layers shared with other images included.
    pub size_bytes: u64,
    /// When it was built, as it says itself.
    pub created: Option<String>,
    /// The layers' diff ids, bottom first.
    pub layers: Vec<String>,
    /// The image's configuration.
    pub config: ImageConfiguration,
}

impl Listed {
    pub(super) fn new(name: Option<String>, record: Record) -> Self {
        Self {
            name,
            digest: record.digest.to_string(),
            manifest: record.manifest.map(|digest| digest.to_string()),
            size_bytes: record.size_bytes,
            created: record.created,
            layers: record.layers.iter().map(Digest::to_string).collect(),
            config: record.config,
        }
    }
}

/// A file's name has room for this much with every slash escaped.
const NAME_MAX: usize = 250;
const DEFAULT_TAG: &str = ":latest";

/// A checked image name that has a tag.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name(String);

impl Name {
    /// Reads a name as a user or an image gives it; without a tag it gets `latest`.
    ///
    /// One that ends in `@` and a digest needs no tag: what is pulled so is called so.
    pub(super) fn parse(text: &str) -> Result<Self, ImageError> {
        let whole = text;
        let digest = text.rsplit_once('@').filter(|(_, digest)| digest.parse::<Digest>().is_ok());
        let text = digest.map_or(text, |(front, _)| front);
        let bad = |why| ImageError::Name { name: text.chars().take(NAME_MAX).collect(), why };
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
        if text.is_empty() {
            return Err(bad("is empty"));
        }
        if !text.chars().all(plain) {
            return Err(bad("has characters other than letters, digits and `._-/:`"));
        }
        if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err(bad("does not begin with a letter or digit"));
        }
        if text.split(['/', ':']).any(|part| part.is_empty() || part == "." || part == "..") {
            return Err(bad("has an empty part"));
        }
        let last = text.rsplit('/').next().unwrap_or_default();
        let complete = last.contains(':') || digest.is_some();
        let name = Self(if complete { whole.to_owned() } else { format!("{text}{DEFAULT_TAG}") });
        match name.file_name().len() {
            0..=NAME_MAX => Ok(name),
            _ => Err(bad("is too long")),
        }
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as one component of a path.
    pub(super) fn file_name(&self) -> String {
        self.0.replace('/', "%2F")
    }

    pub(super) fn from_file_name(name: &str) -> Option<Self> {
        Self::parse(&name.replace("%2F", "/")).ok()
    }

    /// Whether the name is `other` with something in front, such as where it was copied from.
    pub(super) fn ends_with(&self, other: &Self) -> bool {
        self.0.strip_suffix(&other.0).is_some_and(|front| front.ends_with('/'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_tag_gets_one() {
        let pinned = format!("r.example/app@{}", Digest::of(b""));
        for (given, kept) in [
            ("debian", "debian:latest"),
            ("debian:12", "debian:12"),
            ("library/debian", "library/debian:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("localhost:5000/app:v1", "localhost:5000/app:v1"),
            (&pinned, &pinned),
        ] {
            let name = Name::parse(given).unwrap();
            assert_eq!(name.as_str(), kept);
            assert_eq!(Name::from_file_name(&name.file_name()), Some(name));
        }
    }

    #[test]
    fn names_cannot_be_paths_or_options() {
        let long = "a".repeat(300);
        for bad in
            ["", "/etc", "../x", "a/../b", "a//b", "a:", ":a", "-v", ".x", "a b", "a%2Fb", "a\n", "a@sha256:0", &long]
        {
            assert!(Name::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_short_name_finds_a_longer_one() {
        let long = Name::parse("example.org/library/debian:12").unwrap();
        assert!(long.ends_with(&Name::parse("debian:12").unwrap()));
        assert!(long.ends_with(&Name::parse("library/debian:12").unwrap()));
        assert!(!long.ends_with(&Name::parse("ian:12").unwrap()));
    }
}
