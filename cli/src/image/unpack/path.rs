//! Names in layers: checked, and taken apart into a directory and a last component.
//!
//! This is the first of two walls. The second, in [`super::tree`], is the kernel's: every path is resolved
//! with the layer's directory as its root, so that even a name that slipped through here stays inside.

use crate::image::tar::PATH_MAX;

const COMPONENT_MAX: usize = 255;
/// Deeper trees than anybody builds are a way to make removal slow.
const DEPTH_MAX: usize = 512;

/// Why a name may not be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It begins with a slash.
    #[error("is absolute")]
    Absolute,
    /// It has a `..` component.
    #[error("leads out of the layer with `..`")]
    Parent,
    /// It, or one of its components, is longer than the kernel allows, or too deep.
    #[error("is too long")]
    TooLong,
    /// It holds a byte that no path can.
    #[error("holds a NUL byte")]
    Nul,
}

/// `name` without empty and `.` components; empty for the layer's root.
pub(super) fn normalise(name: &[u8]) -> Result<Vec<u8>, PathError> {
    if name.starts_with(b"/") {
        return Err(PathError::Absolute);
    }
    if name.len() > PATH_MAX {
        return Err(PathError::TooLong);
    }
    if name.contains(&0) {
        return Err(PathError::Nul);
    }
    let mut path = Vec::with_capacity(name.len());
    let mut depth = 0;
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err(PathError::Parent),
            _ if component.len() > COMPONENT_MAX => return Err(PathError::TooLong),
            _ => {}
        }
        depth += 1;
        if depth > DEPTH_MAX {
            return Err(PathError::TooLong);
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(component);
    }
    Ok(path)
}

/// Directory and last component of a normalised path.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// Where a symbolic link in `directory` leads, `..` stopping at the root as it does for the kernel.
pub(super) fn follow(directory: &[u8], target: &[u8]) -> Vec<u8> {
    let start = if target.starts_with(b"/") { b"" } else { directory };
    let mut components: Vec<&[u8]> = Vec::new();
    for component in start.split(|byte| *byte == b'/').chain(target.split(|byte| *byte == b'/')) {
        match component {
            b"" | b"." => {}
            b".." => drop(components.pop()),
            _ => components.push(component),
        }
    }
    components.join(&b'/')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_one_place_become_one_path() {
        for name in ["a/b", "./a/b", "a//b/", "a/./b", "./a/././/b/."] {
            assert_eq!(normalise(name.as_bytes()).unwrap(), b"a/b", "{name}");
        }
        for name in ["", ".", "./", ".//."] {
            assert_eq!(normalise(name.as_bytes()).unwrap(), b"", "{name}");
        }
    }

    #[test]
    fn names_that_leave_are_refused() {
        assert_eq!(normalise(b"/etc/passwd"), Err(PathError::Absolute));
        for name in ["..", "../x", "a/../../x", "a/..", "./..", "a/b/../c"] {
            assert_eq!(normalise(name.as_bytes()), Err(PathError::Parent), "{name}");
        }
        assert_eq!(normalise(b"..a/b..").unwrap(), b"..a/b..");
        assert_eq!(normalise(&[b'a'; 256]), Err(PathError::TooLong));
        assert_eq!(normalise(&b"a/".repeat(513)), Err(PathError::TooLong));
        assert_eq!(normalise(b"a\0b"), Err(PathError::Nul));
    }

    #[test]
    fn links_stop_at_the_root() {
        assert_eq!(follow(b"a/b", b"../../../../etc"), b"etc");
        assert_eq!(follow(b"a/b", b"/etc/./x"), b"etc/x");
        assert_eq!(follow(b"a/b", b"../c"), b"a/c");
    }

    fn hostile_name() -> impl Strategy<Value = Vec<u8>> {
        let component = prop_oneof![
            Just(b"..".to_vec()),
            Just(b".".to_vec()),
            Just(Vec::new()),
            Just(b"a".to_vec()),
            proptest::collection::vec(any::<u8>(), 0..6),
        ];
        proptest::collection::vec(component, 0..12).prop_map(|components| components.join(&b'/'))
    }

    proptest! {
        #[test]
        fn what_is_accepted_stays_below_the_root(name in hostile_name()) {
            if let Ok(path) = normalise(&name) {
                prop_assert!(!path.starts_with(b"/") && !path.ends_with(b"/"));
                let plain = |c: &[u8]| !c.is_empty() && c != b"." && c != b"..";
                prop_assert!(path.is_empty() || path.split(|byte| *byte == b'/').all(plain));
                prop_assert_eq!(normalise(&path), Ok(path));
            }
        }

        #[test]
        fn links_lead_below_the_root(directory in hostile_name(), target in hostile_name()) {
            let path = follow(&directory, &target);
            prop_assert!(path.is_empty() || path.split(|byte| *byte == b'/').all(|c| !c.is_empty() && c != b".."));
        }
    }
}
