//! One file of settings: what it says is put over what has been said before.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::keys::{Refusal, Settings};
use crate::nearest::hint;
use crate::origin::Origin;
use crate::{Problem, Problems};

/// Largest file: thousands of times what all keys take.
const MAX_BYTES: u64 = 256 * 1024;

/// Reads a file that must be one.
pub(crate) fn read(path: &Path) -> Result<String, Problem> {
    let wrong = |message: String| Problem { path: path.to_owned(), line: None, message };
    // A FIFO without a writer is not to be waited for.
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(|error| wrong(error.to_string()))?;
    if !file.metadata().map_err(|error| wrong(error.to_string()))?.is_file() {
        return Err(wrong("is no file".to_owned()));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| wrong(error.to_string()))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(wrong(format!("has more than {MAX_BYTES} bytes")));
    }
    String::from_utf8(bytes).map_err(|error| {
        let line =
            error.as_bytes().iter().take(error.utf8_error().valid_up_to()).filter(|byte| **byte == b'\n').count();
        Problem { path: path.to_owned(), line: Some(line + 1), message: "is not UTF-8".to_owned() }
    })
}

/// Puts what `text` says over `settings`, and notes what is wrong in it.
pub(crate) fn apply(settings: &mut Settings, path: &Path, text: &str, problems: &mut Problems) {
    let line_of = |offset: usize| text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1;
    let before = problems.0.len();
    let mut note = |offset: Option<usize>, message: String| {
        problems.0.push(Problem { path: path.to_owned(), line: offset.map(line_of), message });
    };
    let parsed = match DeTable::parse(text) {
        Ok(parsed) => parsed.into_inner(),
        Err(error) => return note(error.span().map(|span| span.start), one_line(error.message())),
    };
    for (table, value) in parsed {
        let start = table.span().start;
        let table = table.into_inner();
        let known = Settings::TABLES.iter().any(|(name, _)| *name == table);
        let keys = match value.into_inner() {
            DeValue::Table(keys) if known => keys,
            _ if known => {
                note(Some(start), format!("{table} is a table: write [{table}], and its keys below it"));
                continue;
            }
            value => {
                note(Some(start), unknown_at_top(&table, matches!(value, DeValue::Table(_))));
                continue;
            }
        };
        for (key, value) in keys {
            let start = key.span().start;
            let key = key.into_inner();
            let origin = Origin::File { path: path.to_owned(), line: line_of(start) };
            let place = value.span().start;
            match settings.set(&table, &key, Spanned::new(value.span(), value.into_inner()), origin) {
                Ok(()) => {}
                Err(Refusal::Unknown) => note(Some(start), unknown_in(&table, &key)),
                Err(Refusal::Value(error)) => {
                    let place = error.span().map_or(place, |span| span.start);
                    note(Some(place), format!("{table}.{key}: {}", one_line(error.message())));
                }
            }
        }
    }
    // The parser has its own order.
    problems.0[before..].sort_by_key(|problem| problem.line);
}

fn unknown_at_top(name: &str, is_table: bool) -> String {
    let tables = Settings::TABLES.iter().map(|(name, _)| *name);
    match Settings::KEYS.iter().find(|(_, key)| *key == name) {
        Some((table, key)) => format!("unknown key {key} outside of any table; did you mean {table}.{key}?"),
        None if is_table => format!("unknown table [{}]{}", shown(name), hint(name, tables)),
        None => {
            let keys = Settings::KEYS.iter().map(|(table, key)| format!("{table}.{key}"));
            format!("unknown key {}{}", shown(name), hint(name, keys.chain(tables.map(str::to_owned))))
        }
    }
}

fn unknown_in(table: &str, key: &str) -> String {
    let elsewhere = Settings::KEYS.iter().find(|(_, known)| *known == key);
    let known = Settings::KEYS.iter().filter(|(known, _)| *known == table).map(|(_, key)| *key);
    let hint = match elsewhere {
        Some((table, key)) => format!("; did you mean {table}.{key}?"),
        None => hint(key, known),
    };
    format!("unknown key {table}.{}{hint}", shown(key))
}

/// A name from a file as a message may show it.
fn shown(name: &str) -> String {
    const MAX_CHARS: usize = 64;
    let mut shown: String = name.chars().take(MAX_CHARS).flat_map(char::escape_debug).collect();
    if name.chars().nth(MAX_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

fn one_line(message: &str) -> String {
    message.lines().map(str::trim).collect::<Vec<_>>().join("; ")
}
