//! The command line, as Go programs have it: one dash or two, a value behind a space or an equals sign.

/// What containerd passes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// containerd's own socket.
    pub(crate) address: String,
    pub(crate) bundle: String,
    pub(crate) debug: bool,
    pub(crate) version: bool,
    pub(crate) info: bool,
    /// `start`, `delete`, or nothing.
    pub(crate) action: String,
    /// The pod that the daemon is for; only `start` passes it.
    pub(crate) pod: String,
}

/// A word that is no flag, or a flag without its value.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FlagError {
    /// A flag that does not exist.
    #[error("there is no flag -{0}")]
    Unknown(String),
    /// A flag that needs a value.
    #[error("the flag -{0} needs a value")]
    NoValue(String),
}

/// Reads the command line, without the program's own name.
pub(crate) fn parse(args: impl IntoIterator<Item = String>) -> Result<Flags, FlagError> {
    let mut flags = Flags::default();
    let mut args = args.into_iter();
    while let Some(word) = args.next() {
        let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            flags.action = word;
            break;
        };
        let (name, given) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let switch = match name {
            "debug" => Some(&mut flags.debug),
            "v" | "version" => Some(&mut flags.version),
            "info" => Some(&mut flags.info),
            _ => None,
        };
        if let Some(switch) = switch {
            *switch = given.as_deref() != Some("false");
            continue;
        }
        let mut ignored = String::new();
        let target = match name {
            "namespace" => &mut flags.namespace,
            "id" => &mut flags.id,
            "address" => &mut flags.address,
            "bundle" => &mut flags.bundle,
            "pod" => &mut flags.pod,
            // The program that would publish events, which ttrpc does; a socket that would be inherited.
            "publish-binary" | "socket" => &mut ignored,
            _ => return Err(FlagError::Unknown(name.to_owned())),
        };
        *target = given.or_else(|| args.next()).ok_or_else(|| FlagError::NoValue(name.to_owned()))?;
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(line: &str) -> Result<Flags, FlagError> {
        parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn containerds_command_line_is_understood() {
        let flags =
            parsed("-namespace k8s.io -address /c.sock -publish-binary /c -id x -bundle /b -debug start").unwrap();
        assert_eq!((flags.namespace.as_str(), flags.id.as_str(), flags.action.as_str()), ("k8s.io", "x", "start"));
        assert_eq!((flags.address.as_str(), flags.bundle.as_str(), flags.debug), ("/c.sock", "/b", true));
        assert_eq!(parsed("--id=x delete").unwrap().id, "x");
        assert!(parsed("-v").unwrap().version && parsed("-info").unwrap().info);
        assert!(!parsed("-debug=false").unwrap().debug);
    }

    #[test]
    fn what_is_no_flag_is_named() {
        assert_eq!(parsed("-nope"), Err(FlagError::Unknown("nope".into())));
        assert_eq!(parsed("-id"), Err(FlagError::NoValue("id".into())));
    }

    proptest! {
        #[test]
        fn no_command_line_makes_the_parser_panic(args in proptest::collection::vec("\\PC*", 0..6)) {
            let _ = parse(args);
        }
    }
}
