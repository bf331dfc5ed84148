//! Whom a program runs as: the image's or the user's choice, looked up in the image's own files.

use std::io;
use std::path::PathBuf;

use hull_sandbox::user;
pub use hull_sandbox::user::User;

use super::lookup;

/// Why a user cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The image does not know it.
    #[error(transparent)]
    Lookup(#[from] user::UserError),
    /// The image's files cannot be read.
    #[error("cannot read {path} of the container: {source}")]
    Read {
        /// The file.
        path: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Looks up `NAME`, `UID`, `NAME:GROUP` or `UID:GID` in the layers, bottom first; nothing is root.
pub fn resolve(spec: &str, layers: &[PathBuf]) -> Result<User, UserError> {
    Ok(user::resolve(spec, &read(layers, "/etc/passwd")?, &read(layers, "/etc/group")?)?)
}

fn read(layers: &[PathBuf], path: &'static str) -> Result<Vec<u8>, UserError> {
    let content =
        lookup::read(layers, path, user::MAX_FILE_BYTES).map_err(|source| UserError::Read { path, source })?;
    Ok(content.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_own_files_count() {
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        std::fs::write(etc.join("passwd"), "web:x:33:44:Web:/var/www:/bin/false\n").unwrap();
        std::fs::write(etc.join("group"), "log:x:4:web\n").unwrap();
        let layers = [dir.path().to_owned()];
        let web = User { uid: 33, gid: 44, additional_gids: vec![4], home: "/var/www".to_owned() };
        assert_eq!(resolve("web", &layers).unwrap(), web);
        assert!(resolve("nobody", &layers).unwrap_err().to_string().contains("`nobody`"));
    }

    #[test]
    fn an_image_without_files_has_numbers_only() {
        let dir = tempfile::tempdir().unwrap();
        let layers = [dir.path().to_owned()];
        assert_eq!(resolve("", &layers).unwrap().home, "/");
        assert!(resolve("root", &layers).is_err());
        let user = User { uid: 5, gid: 6, additional_gids: Vec::new(), home: "/".to_owned() };
        assert_eq!(resolve("5:6", &[]).unwrap(), user);
    }
}
