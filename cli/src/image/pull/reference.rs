//! What to pull: a registry, a repository in it, and a tag or digest.

use std::net::IpAddr;

use oci_spec::distribution::Reference;

use super::PullError;
use crate::image::digest::Digest;

/// A reference that names its registry.
///
/// There is no registry that is meant when none is named: which one that would be is for the node's owner to say.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    reference: Reference,
    digest: Option<Digest>,
}

impl Wanted {
    pub(super) fn parse(text: &str) -> Result<Self, PullError> {
        let bad = |why: String| PullError::Reference { reference: text.chars().take(300).collect(), why };
        if !names_registry(text) {
            return Err(PullError::NoRegistry(text.chars().take(300).collect()));
        }
        let reference: Reference = text.parse().map_err(|error| bad(format!("{error}")))?;
        let digest = reference.digest().map(str::parse).transpose().map_err(|error| bad(format!("{error}")))?;
        Ok(Self { reference, digest })
    }

    /// Host and perhaps port, for a URL.
    pub(super) fn host(&self) -> &str {
        self.reference.resolve_registry()
    }

    /// The names under which credentials for the registry may be kept.
    pub(super) fn credential_keys(&self) -> [&str; 2] {
        [self.reference.registry(), self.reference.resolve_registry()]
    }

    /// The `<name>` of the distribution specification.
    pub(super) fn repository(&self) -> &str {
        self.reference.repository()
    }

    /// The `<reference>` of the distribution specification, "Pulling manifests": a digest if one was given, else a tag.
    pub(super) fn manifest(&self) -> &str {
        self.reference.digest().or(self.reference.tag()).unwrap_or("latest")
    }

    /// What the manifest's digest must be, if the reference says so.
    pub(super) fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// Whether the registry is on this machine, so that nobody is between it and us.
    pub(super) fn is_loopback(&self) -> bool {
        is_loopback(self.host())
    }
}

/// Whether text begins with a registry's host: with a dot or a port, or `localhost`, as docker tells them from
/// repositories.
pub(crate) fn names_registry(text: &str) -> bool {
    text.split_once('/')
        .is_some_and(|(host, _)| (host.contains(['.', ':']) && !host.starts_with('.')) || host == "localhost")
}

/// Whether a host, perhaps with a port, is a loopback address. A name other than `localhost` could be anywhere.
pub(super) fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_must_be_named() {
        for text in ["debian", "debian:12", "library/debian:12", "", "./a/b", "/a"] {
            assert!(matches!(Wanted::parse(text), Err(PullError::NoRegistry(_))), "{text:?}");
        }
    }

    #[test]
    fn tags_and_digests_are_told_apart() {
        let digest = Digest::of(b"x");
        let wanted = Wanted::parse("registry.example:5000/a/b").unwrap();
        assert_eq!((wanted.host(), wanted.repository()), ("registry.example:5000", "a/b"));
        assert_eq!((wanted.manifest(), wanted.digest()), ("latest", None));
        let wanted = Wanted::parse(&format!("registry.example/a@{digest}")).unwrap();
        assert_eq!((wanted.manifest(), wanted.digest()), (digest.to_string().as_str(), Some(digest)));
    }

    #[test]
    fn references_cannot_leave_their_place_in_a_url() {
        for text in
            ["r.example/../x", "r.example/a?b", "r.example/a#b", "r.example/a b", "r.example/A", "u@r.example/a"]
        {
            assert!(Wanted::parse(text).is_err(), "{text:?}");
        }
        assert!(Wanted::parse("r.example/a@sha512:00").is_err());
    }

    #[test]
    fn only_addresses_of_this_machine_are_loopback() {
        for host in ["127.0.0.1", "127.9.9.9:5000", "[::1]:5000", "localhost", "localhost:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["registry.example", "10.0.0.1:5000", "localhost.example", "127.0.0.1.example:80", "[::2]"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
