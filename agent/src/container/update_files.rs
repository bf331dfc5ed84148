//! Changes what one of a container's own file systems holds.

use std::path::Path;

use tokio::task::spawn_blocking;

use super::Container;
use crate::error::{Error, Result, Step};
use crate::files::{self, File};

impl Container {
    /// Makes the file system at a mount point, one of the container's, hold these files and no others.
    pub(crate) async fn update_files(&self, mount_point: &Path, files: Vec<File>) -> Result<()> {
        // Held while files are written, so that two updates do not mix and none writes to what is being unmounted.
        let _operation = self.operation.lock().await;
        if !self.lock().mounted.iter().any(|mounted| mounted.path() == mount_point) {
            return Err(Error::NotFound(format!("file system {} of container {}", mount_point.display(), self.id)));
        }
        let root = mount_point.to_owned();
        spawn_blocking(move || files::update(&root, &files)).await.step("write files").flatten()
    }
}
