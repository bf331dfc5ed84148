//! The kernel's command line.

/// The value of the last `name=value`; values may be quoted, as the kernel allows it.
pub(super) fn value<'a>(cmdline: &'a str, name: &str) -> Option<&'a str> {
    cmdline
        .split_whitespace()
        .rev()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .map(|value| value.trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_value_counts() {
        let cmdline = "quiet hull.log=info panic=1 hull.logs=x hull.log=\"debug\"\n";
        assert_eq!(value(cmdline, "hull.log"), Some("debug"));
        assert_eq!(value(cmdline, "quiet"), None);
        assert_eq!(value(cmdline, "hull"), None);
    }

    proptest! {
        #[test]
        fn no_command_line_makes_the_parser_panic(cmdline in "\\PC*", name in "[a-z.]{0,8}") {
            let _ = value(&cmdline, &name);
        }
    }
}
