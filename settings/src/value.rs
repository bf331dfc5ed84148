//! What a setting can be. Each type takes what is right and says what is wrong, so that nobody has to check again.

use std::path::{Path, PathBuf};

use hull_sandbox::disks::DiskCache;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest words for a kernel: its command line has 2,048 bytes, of which Hull needs some 200 and a pod may want some too.
const MAX_KERNEL_PARAMS_BYTES: usize = 1024;
/// Most patterns of annotations; there are fewer annotations.
const MAX_PATTERNS: usize = 64;

/// Kata's prefix of the annotations that say how a pod's machine is to be.
pub const HYPERVISOR: &str = "io.katacontainers.config.hypervisor.";
/// The annotations that have a meaning here, without their prefix.
pub const ANNOTATIONS: [&str; 6] = [
    "default_vcpus",
    "default_memory",
    "default_maxvcpus",
    "default_maxmemory",
    "block_device_cache_direct",
    "kernel_params",
];

/// A whole number from `MIN` to `MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Number<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Number<MIN, MAX> {
    /// A number that is known when the program is built.
    pub(crate) const fn fixed(number: u64) -> Self {
        assert!(MIN <= number && number <= MAX);
        Self(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Number<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        match u64::try_from(number) {
            Ok(number) if (MIN..=MAX).contains(&number) => Ok(Self(number)),
            _ => Err(D::Error::custom(format!("{number} is out of range; it may be {MIN} to {MAX}"))),
        }
    }
}

/// A file of the installation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where `make install` puts it, below the prefix of the program that runs.
    Installed(&'static str),
    /// Anywhere else.
    At(PathBuf),
}

impl Place {
    /// The path, where one was named.
    #[must_use]
    pub fn named(&self) -> Option<&Path> {
        match self {
            Self::Installed(_) => None,
            Self::At(path) => Some(path),
        }
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Installed(place) => Path::new("/usr/local").join(place).serialize(serializer),
            Self::At(path) => path.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let path = PathBuf::deserialize(deserializer)?;
        if path.is_absolute() && !path.to_string_lossy().contains('\0') {
            Ok(Self::At(path))
        } else {
            Err(D::Error::custom(format!("{path:?} is no absolute path; start it with /")))
        }
    }
}

/// Words for a kernel's command line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct KernelParams(String);

impl KernelParams {
    /// The words, or nothing.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for KernelParams {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let words = String::deserialize(deserializer)?;
        if words.len() > MAX_KERNEL_PARAMS_BYTES {
            let length = words.len();
            return Err(D::Error::custom(format!(
                "{length} bytes are too many; {MAX_KERNEL_PARAMS_BYTES} may be there"
            )));
        }
        match words.chars().find(|letter| !matches!(letter, ' '..='~')) {
            Some(letter) => Err(D::Error::custom(format!("{letter:?} cannot stand on a kernel's command line"))),
            None => Ok(Self(words)),
        }
    }
}

/// What becomes of a pod that wants namespaces of the host, which its machine does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "String")]
pub enum HostNamespaces {
    /// It does not start.
    Refuse,
    /// It starts with its machine's own.
    Ignore,
}

/// Whether the host's page cache has what block volumes hold, as well as their guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "String")]
pub enum BlockCache {
    /// It has.
    Writeback,
    /// It has not (`O_DIRECT`).
    None,
}

/// The network of `hull run` where nothing says which.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RunNetwork {
    /// The first of those that the host has.
    Auto,
    /// This one, as `--net` takes it.
    Fixed(String),
}

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", try_from = "String")]
#[allow(missing_docs)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

impl TryFrom<String> for HostNamespaces {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        choose(&text, [("refuse", Self::Refuse), ("ignore", Self::Ignore)])
    }
}

impl TryFrom<String> for BlockCache {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        choose(&text, [("writeback", Self::Writeback), ("none", Self::None)])
    }
}

impl From<BlockCache> for DiskCache {
    fn from(cache: BlockCache) -> Self {
        match cache {
            BlockCache::Writeback => Self::Writeback,
            BlockCache::None => Self::None,
        }
    }
}

impl TryFrom<String> for RunNetwork {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.strip_prefix("cni:") {
            Some(name) if !name.is_empty() => Ok(Self::Fixed(text)),
            _ => {
                let fixed = || Self::Fixed(text.clone());
                choose(&text, [("auto", Self::Auto), ("none", fixed()), ("user", fixed()), ("cni:NAME", fixed())])
            }
        }
    }
}

impl From<RunNetwork> for String {
    fn from(network: RunNetwork) -> Self {
        match network {
            RunNetwork::Auto => "auto".to_owned(),
            RunNetwork::Fixed(text) => text,
        }
    }
}

impl TryFrom<String> for Level {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        choose(&text, [("error", Self::Error), ("warn", Self::Warn), ("info", Self::Info), ("debug", Self::Debug)])
    }
}

/// The value that a word stands for.
fn choose<T, const N: usize>(text: &str, choices: [(&str, T); N]) -> Result<T, String> {
    let words = choices.each_ref().map(|(word, _)| *word);
    let chosen = choices.into_iter().find(|(word, _)| *word == text);
    chosen.map(|(_, value)| value).ok_or_else(|| {
        let hint = crate::nearest::hint(text, words);
        format!("{text:?} is not among {}{hint}", words.join(", "))
    })
}

/// The annotations that pods may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Allowed(Vec<String>);

impl Allowed {
    /// Patterns that are known when the program is built.
    pub(crate) fn fixed(patterns: &[&str]) -> Self {
        Self(patterns.iter().map(|&pattern| pattern.to_owned()).collect())
    }

    /// Whether pods may use the annotation `key`, which is without its prefix.
    #[must_use]
    pub fn allows(&self, key: &str) -> bool {
        self.0.iter().any(|pattern| matches(pattern.strip_prefix(HYPERVISOR).unwrap_or(pattern), key))
    }
}

impl<'de> Deserialize<'de> for Allowed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let patterns = Vec::<String>::deserialize(deserializer)?;
        if patterns.len() > MAX_PATTERNS {
            return Err(D::Error::custom(format!("more than {MAX_PATTERNS} patterns")));
        }
        for pattern in &patterns {
            let key = pattern.strip_prefix(HYPERVISOR).unwrap_or(pattern);
            if !ANNOTATIONS.iter().any(|known| matches(key, known)) {
                let hint = crate::nearest::hint(key, ANNOTATIONS);
                return Err(D::Error::custom(format!(
                    "{pattern:?} is no annotation that has a meaning here{hint}; there are {}",
                    ANNOTATIONS.join(", ")
                )));
            }
        }
        Ok(Self(patterns))
    }
}

/// Whether `text` is as `pattern` says, in which `*` stands for any letters or none.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(start) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let end = parts.pop().unwrap_or_default();
    // What stands between two stars is taken at its first place: that leaves the most for what follows.
    for part in parts {
        match text.split_once(part) {
            Some((_, behind)) => text = behind,
            None => return false,
        }
    }
    text.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_letters() {
        for (pattern, text) in
            [("*", ""), ("*", "a"), ("a*", "a"), ("a*c", "abc"), ("*b*", "abc"), ("a*b*c", "aXbYbZc")]
        {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [("", "a"), ("a", ""), ("a*a", "a"), ("*b", "abc"), ("a*c*", "ab"), ("a*bc*c", "abc")] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }

    #[test]
    fn annotations_are_allowed_by_short_or_whole_name() {
        let allowed = Allowed::fixed(&["default_v*", "io.katacontainers.config.hypervisor.kernel_params"]);
        assert!(allowed.allows("default_vcpus") && allowed.allows("kernel_params"));
        assert!(!allowed.allows("default_memory") && !allowed.allows(""));
    }
}
