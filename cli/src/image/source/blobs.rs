//! The files of an image: in a directory, or found in a tar archive without unpacking it.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::{SourceError, open_regular};
use crate::image::stream::{Region, Seeking};
use crate::image::tar::{Kind, Reader, TarError};

/// An image has three files per layer at most, and a few more.
const FILES_MAX: usize = 100_000;
/// Links from link to link; docker's archives have them one deep.
const LINKS_MAX: usize = 8;

pub(super) enum Blobs {
    Directory(PathBuf),
    Archive { region: Region, files: HashMap<String, Member> },
}

pub(super) enum Member {
    File { offset: u64, length: u64 },
    Link(String),
}

impl Blobs {
    /// Reads the headers of an archive.
    pub(super) fn archive(region: Region) -> Result<Self, TarError> {
        let mut archive = Reader::new(Seeking::new(region.clone()));
        let mut files = HashMap::new();
        while let Some(entry) = archive.next()? {
            // A name that is no text is none that a document could speak of.
            let Some(name) = std::str::from_utf8(&entry.name).ok().and_then(|name| lexical("", name)) else { continue };
            let link = || std::str::from_utf8(&entry.link).ok();
            let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
            let member = match entry.kind {
                Kind::Regular if entry.sparse.is_none() => {
                    Some(Member::File { offset: archive.position(), length: entry.size })
                }
                Kind::Symlink => link().and_then(|target| lexical(directory, target)).map(Member::Link),
                Kind::HardLink => link().and_then(|target| lexical("", target)).map(Member::Link),
                _ => None,
            };
            if let Some(member) = member {
                files.insert(name, member);
            }
            if files.len() > FILES_MAX {
                let what = "number of files";
                return Err(TarError::TooLong { what, size: files.len() as u64, cap: FILES_MAX as u64 });
            }
        }
        Ok(Self::Archive { region, files })
    }

    pub(super) fn has(&self, name: &str) -> Result<bool, SourceError> {
        Ok(self.find(name)?.is_some())
    }

    /// The file with this name, which must not lead out of the image.
    pub(super) fn find(&self, name: &str) -> Result<Option<Region>, SourceError> {
        let Some(mut name) = lexical("", name).filter(|_| !name.starts_with('/')) else {
            return Err(SourceError::MissingBlob(format!("a file inside it called {}", name.escape_debug())));
        };
        match self {
            Self::Directory(path) => {
                let path = path.join(name);
                let opened = open_regular(&path).and_then(|file| {
                    let length = file.metadata()?.len();
                    Ok(Region { file: Arc::new(file), offset: 0, length })
                });
                match opened {
                    Ok(region) => Ok(Some(region)),
                    Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                        Ok(None)
                    }
                    Err(source) => Err(SourceError::Read { path, source }),
                }
            }
            Self::Archive { region, files } => {
                for _ in 0..LINKS_MAX {
                    match files.get(&name) {
                        Some(Member::File { offset, length }) => {
                            // Only what is there is read, so a size that lies is found to be short.
                            let length = (*length).min(region.length.saturating_sub(*offset));
                            return Ok(Some(Region { file: region.file.clone(), offset: *offset, length }));
                        }
                        Some(Member::Link(target)) => name.clone_from(target),
                        None => return Ok(None),
                    }
                }
                Ok(None)
            }
        }
    }
}

/// `name` in `directory` as a plain relative path; none if it leads out.
fn lexical(directory: &str, name: &str) -> Option<String> {
    let mut components: Vec<&str> = Vec::new();
    for component in directory.split('/').chain(name.split('/')) {
        match component {
            "" | "." => {}
            ".." => drop(components.pop()?),
            _ => components.push(component),
        }
    }
    (!components.is_empty()).then(|| components.join("/"))
}

#[cfg(test)]
mod tests {
    use super::lexical;

    #[test]
    fn names_stay_inside() {
        assert_eq!(lexical("a", "../b/layer.tar").as_deref(), Some("b/layer.tar"));
        assert_eq!(lexical("", "./index.json").as_deref(), Some("index.json"));
        assert_eq!(lexical("", "../index.json"), None);
        assert_eq!(lexical("a", "../../x"), None);
    }
}
