//! The file that explains every key, made from the keys.

use std::fmt::Write;

use crate::keys::Settings;

/// A file in which every key stands with what it means and what it is unless told, commented out.
#[must_use]
pub fn example() -> String {
    let mut text = String::from(
        "# The settings of a node that runs Hull, each with its default. This is an example: what is to differ goes to\n\
         # /etc/hull/config.toml, or to files /etc/hull/config.d/NAME.toml, which are read after it in the order of their\n\
         # names. The last one that sets a key wins. `hull config show` prints what is in force and where it comes from,\n\
         # `hull config check` what is wrong. New settings are for new pods.\n",
    );
    for (table, doc) in Settings::TABLES {
        // Writing to a String does not fail.
        let _ = write!(text, "\n{}[{table}]\n", comment(doc));
        for key in Settings::default().describe().iter().filter(|key| key.table == *table) {
            let _ = write!(text, "\n{}#{} = {}\n", comment(key.doc), key.key, key.value);
        }
    }
    text
}

fn comment(lines: &[&str]) -> String {
    lines.iter().map(|line| format!("#{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Problems, file};

    /// `HULL_WRITE_EXAMPLE=1 cargo test -p hull-settings` brings the file up to date.
    #[test]
    fn the_installed_example_is_what_the_keys_say() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config.example.toml");
        if std::env::var_os("HULL_WRITE_EXAMPLE").is_some() {
            std::fs::write(&path, example()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), example());
    }

    #[test]
    fn with_its_keys_uncommented_the_example_says_the_defaults() {
        let text: String = example()
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(key) if !key.starts_with(' ') => format!("{key}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        let (mut settings, mut problems) = (Settings::default(), Problems::default());
        file::apply(&mut settings, Path::new("e"), &text, &mut problems);
        assert!(problems.0.is_empty(), "{problems}");
        for (said, default) in settings.describe().iter().zip(Settings::default().describe()) {
            assert_eq!(said.value, default.value);
            assert_ne!(said.origin, default.origin, "{} is not in the example", said.key);
        }
    }

    #[test]
    fn every_key_is_in_the_documentation() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        let text = std::fs::read_to_string(path).unwrap();
        for (table, key) in Settings::KEYS {
            assert!(text.contains(&format!("`{table}.{key}`")), "{table}.{key}");
        }
    }
}
