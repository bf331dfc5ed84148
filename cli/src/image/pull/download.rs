//! A blob's way from the registry to a file, verified as it goes by.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::sync::Arc;

use reqwest::header::CONTENT_RANGE;
use reqwest::{Response, StatusCode};
use sha2::{Digest as _, Sha256};

use super::registry::Registry;
use super::{Progress, PullError};
use crate::image::digest::Digest;

/// A layer's blob, as the manifest describes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blob {
    pub(super) digest: Digest,
    /// In bytes.
    pub(super) size: u64,
}

/// What of a blob is in its file.
struct Partial {
    file: Arc<File>,
    have: u64,
    hasher: Sha256,
    /// Some of it was written by a process that has died, so it may be anything.
    inherited: bool,
}

impl Partial {
    /// Takes up what an earlier pull has left in the file.
    fn open(file: Arc<File>, size: u64) -> io::Result<Self> {
        let mut partial = Self { file, have: 0, hasher: Sha256::new(), inherited: false };
        if partial.file.metadata()?.len() > size {
            partial.restart()?;
            return Ok(partial);
        }
        let mut buffer = vec![0; 256 << 10];
        loop {
            match (&*partial.file).read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    partial.hasher.update(&buffer[..n]);
                    partial.have += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        partial.inherited = partial.have > 0;
        Ok(partial)
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        (&*self.file).rewind()?;
        (self.have, self.hasher, self.inherited) = (0, Sha256::new(), false);
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // Into the page cache; a thread for it would cost more than it saves.
        (&*self.file).write_all(bytes)?;
        self.hasher.update(bytes);
        self.have += bytes.len() as u64;
        Ok(())
    }
}

/// Fills the file with the blob, going on where an earlier pull ended. `local` makes an error of one of this machine's.
pub(super) async fn download(
    registry: &Registry,
    blob: Blob,
    file: Arc<File>,
    progress: &dyn Progress,
    local: impl Fn(io::Error) -> PullError,
) -> Result<(), PullError> {
    // Reading back gigabytes takes a while, in which other layers can arrive.
    let opened = tokio::task::spawn_blocking(move || Partial::open(file, blob.size)).await;
    let mut partial = opened.map_err(io::Error::from).and_then(|partial| partial).map_err(&local)?;
    progress.has(blob.digest, partial.have);
    let mut attempt = 0;
    loop {
        if partial.have < blob.size {
            let response = registry.blob(blob.digest, partial.have).await?;
            if !continues(&response, partial.have) {
                if partial.have == 0 && response.status() != StatusCode::OK {
                    return Err(PullError::Refused { registry: registry.host().to_owned(), status: response.status() });
                }
                partial.restart().map_err(&local)?;
                progress.has(blob.digest, 0);
                if response.status() != StatusCode::OK {
                    continue;
                }
            }
            match receive(response, blob, &mut partial, progress, &local).await? {
                Ok(()) => {}
                Err(_) if attempt + 1 < registry.attempts() => {
                    registry.pause(attempt).await;
                    attempt += 1;
                    continue;
                }
                Err(source) => return Err(PullError::broken(blob, partial.have, &source)),
            }
        }
        let found = Digest::finish(std::mem::take(&mut partial.hasher));
        if found == blob.digest {
            return Ok(());
        }
        if !partial.inherited {
            let what = "a layer".to_owned();
            return Err(PullError::WrongDigest { what, expected: blob.digest, found });
        }
        // A power failure may have left a file of zeros.
        partial.restart().map_err(&local)?;
        progress.has(blob.digest, 0);
    }
}

/// Whether an answer goes on from this byte (RFC 9110, 14.4); a server that does not know ranges gives all.
fn continues(response: &Response, from: u64) -> bool {
    if response.status() == StatusCode::OK {
        return from == 0;
    }
    let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
    let start = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok());
    response.status() == StatusCode::PARTIAL_CONTENT && from > 0 && start == Some(from)
}

/// Takes in one answer; the inner error is the connection's, after which it is worth to try again.
async fn receive(
    mut response: Response,
    blob: Blob,
    partial: &mut Partial,
    progress: &dyn Progress,
    local: &impl Fn(io::Error) -> PullError,
) -> Result<reqwest::Result<()>, PullError> {
    let wrong = |found| PullError::WrongSize { digest: blob.digest, expected: blob.size, found };
    if let Some(length) = response.content_length() {
        let total = partial.have.saturating_add(length);
        if total != blob.size {
            return Err(wrong(total));
        }
    }
    loop {
        match response.chunk().await {
            Ok(Some(bytes)) => {
                let total = partial.have.saturating_add(bytes.len() as u64);
                if total > blob.size {
                    return Err(wrong(total));
                }
                partial.append(&bytes).map_err(local)?;
                progress.has(blob.digest, partial.have);
            }
            Ok(None) if partial.have == blob.size => return Ok(Ok(())),
            Ok(None) => return Err(wrong(partial.have)),
            Err(error) => return Ok(Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_pull_left_is_taken_up_unless_it_is_too_much() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"abc").unwrap();
        file.rewind().unwrap();
        let partial = Partial::open(Arc::new(file.try_clone().unwrap()), 3).unwrap();
        assert_eq!((partial.have, partial.inherited), (3, true));
        assert_eq!(Digest::finish(partial.hasher), Digest::of(b"abc"));
        file.rewind().unwrap();
        let mut partial = Partial::open(Arc::new(file), 2).unwrap();
        assert_eq!((partial.have, partial.inherited), (0, false));
        partial.append(b"xy").unwrap();
        assert_eq!(partial.file.metadata().unwrap().len(), 2);
    }
}
