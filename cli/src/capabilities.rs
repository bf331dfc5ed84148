//! What of root's rights a container has, as docker's and podman's `--cap-add` and `--cap-drop` spell it (capabilities(7)).

use std::collections::BTreeSet;

/// Those of Linux 6.12, by number.
const ALL: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// docker's and podman's defaults; of `CAP_NET_RAW`, which ping needs in many images, only docker's.
const USUAL: [&str; 12] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// What is added to a container's capabilities, or taken from them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    All,
    One(&'static str),
}

/// Reads a name, in any case and with or without `CAP_`, or `ALL`.
pub(crate) fn parse(text: &str) -> Result<Named, String> {
    let upper = text.to_ascii_uppercase();
    if upper == "ALL" {
        return Ok(Named::All);
    }
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let known = ALL.iter().find(|name| name.strip_prefix("CAP_") == Some(short));
    known
        .map(|name| Named::One(name))
        .ok_or_else(|| format!("{text} is no capability; write one of capabilities(7), such as NET_ADMIN, or ALL"))
}

/// The capabilities of a container, by name.
///
/// # Errors
///
/// When one is both added and taken away.
pub(crate) fn held(add: &[Named], drop: &[Named]) -> Result<Vec<&'static str>, String> {
    if let Some(both) = add.iter().find(|name| drop.contains(name)) {
        let name = match both {
            Named::All => "ALL",
            Named::One(name) => name,
        };
        return Err(format!("{name} is both added and dropped; leave one out"));
    }
    let mut held: BTreeSet<&str> = match (add.contains(&Named::All), drop.contains(&Named::All)) {
        (true, _) => ALL.into_iter().collect(),
        (false, true) => BTreeSet::new(),
        (false, false) => USUAL.into_iter().collect(),
    };
    for name in add {
        if let Named::One(name) = name {
            held.insert(name);
        }
    }
    for name in drop {
        if let Named::One(name) = name {
            held.remove(name);
        }
    }
    Ok(held.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(texts: &[&str]) -> Vec<Named> {
        texts.iter().map(|text| parse(text).unwrap()).collect()
    }

    fn with(add: &[&str], drop: &[&str]) -> Result<Vec<&'static str>, String> {
        held(&names(add), &names(drop))
    }

    #[test]
    fn a_name_is_taken_in_any_spelling() {
        for text in ["mknod", "MKNOD", "cap_mknod", "CAP_MKNOD"] {
            assert_eq!(parse(text), Ok(Named::One("CAP_MKNOD")));
        }
        assert_eq!(parse("all"), Ok(Named::All));
        for text in ["", "CAP_", "NET", "mknod "] {
            assert!(parse(text).unwrap_err().contains("capabilities(7)"), "{text}");
        }
    }

    #[test]
    fn what_is_added_comes_to_the_usual_and_what_is_dropped_goes() {
        assert_eq!(with(&[], &[]).unwrap(), USUAL);
        let changed = with(&["mknod"], &["net_raw"]).unwrap();
        assert_eq!(changed.len(), USUAL.len());
        assert!(changed.contains(&"CAP_MKNOD") && !changed.contains(&"CAP_NET_RAW"));
        assert_eq!(with(&["mknod"], &["all"]).unwrap(), ["CAP_MKNOD"]);
        assert_eq!(with(&["all"], &["sys_module"]).unwrap().len(), ALL.len() - 1);
        assert_eq!(with(&[], &["bpf"]).unwrap(), USUAL);
        assert!(with(&["mknod"], &["MKNOD"]).unwrap_err().contains("CAP_MKNOD"));
        assert!(with(&["all"], &["all"]).unwrap_err().contains("ALL"));
    }
}
