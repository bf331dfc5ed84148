//! The name that was probably meant.

/// Longest name that is compared: no real one comes near, and the work grows with the square.
const MAX_BYTES: usize = 64;
/// Shortest part of a name that points to it.
const MIN_PART_BYTES: usize = 4;

/// `; did you mean …?` with the nearest of `names`, or nothing where none is near.
pub(crate) fn hint<S: AsRef<str>>(name: &str, names: impl IntoIterator<Item = S>) -> String {
    if name.len() > MAX_BYTES {
        return String::new();
    }
    let distances = names.into_iter().map(|known| {
        // Part of a name is a slip too, however much is missing.
        let is_part = name.len() >= MIN_PART_BYTES && known.as_ref().contains(name);
        (if is_part { 1 } else { distance(name, known.as_ref()) }, known)
    });
    let nearest = distances.min_by_key(|(distance, _)| *distance);
    match nearest {
        // Half of the letters may be wrong, which is more than people get wrong.
        Some((distance, known)) if distance <= name.chars().count().max(4) / 2 => {
            format!("; did you mean {}?", known.as_ref())
        }
        _ => String::new(),
    }
}

/// How many letters are to be added, taken away or changed to make one text into the other.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (above, letter) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = above + 1;
        for (column, other) in to.iter().enumerate() {
            let change = diagonal + usize::from(letter != *other);
            diagonal = row[column + 1];
            row[column + 1] = change.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_that_differ_are_counted() {
        for (from, to, count) in
            [("", "", 0), ("", "ab", 2), ("ab", "", 2), ("kitten", "sitting", 3), ("abc", "abc", 0)]
        {
            assert_eq!(distance(from, to), count, "{from} {to}");
        }
    }

    #[test]
    fn a_slip_is_understood_and_nonsense_is_not() {
        let names = ["default_vcpus", "default_memory_mib"];
        assert_eq!(hint("default_cpus", names), "; did you mean default_vcpus?");
        assert_eq!(hint("default_memory", names), "; did you mean default_memory_mib?");
        assert_eq!(hint("vcpus", names), "; did you mean default_vcpus?");
        assert_eq!(hint("xyz", names), "");
        assert_eq!(hint(&"d".repeat(100_000), names), "");
    }
}
