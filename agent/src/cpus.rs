//! Brings CPUs online and takes them offline. All that the guest may ever have exist from the start.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result, Step};

const DIRECTORY: &str = "/sys/devices/system/cpu";

/// Has `count` CPUs online, or as near as there are CPUs. Answers how many are.
pub(crate) fn set_online(count: u32) -> Result<u32> {
    set_online_in(Path::new(DIRECTORY), count)
}

/// How many CPUs are online.
pub(crate) fn online() -> Result<u32> {
    Ok(read_list(Path::new(DIRECTORY), "online")?.len() as u32)
}

fn set_online_in(directory: &Path, count: u32) -> Result<u32> {
    if count == 0 {
        return Err(Error::invalid("count", "a guest needs a CPU"));
    }
    let count = count as usize;
    let present = read_list(directory, "present")?;
    let online = read_list(directory, "online")?;
    let switch = |cpu: u32, on: bool| {
        fs::write(directory.join(format!("cpu{cpu}/online")), if on { "1" } else { "0" })
            .step_with(|| format!("switch CPU {cpu}"))
    };
    let mut now = online.len();
    for cpu in present.iter().filter(|cpu| !online.contains(cpu)) {
        if now >= count {
            break;
        }
        switch(*cpu, true)?;
        now += 1;
    }
    // The last first: the first CPU cannot be taken offline.
    for cpu in online.iter().rev().filter(|cpu| **cpu != 0) {
        if now <= count {
            break;
        }
        switch(*cpu, false)?;
        now -= 1;
    }
    Ok(now as u32)
}

fn read_list(directory: &Path, name: &str) -> Result<Vec<u32>> {
    let list = fs::read_to_string(directory.join(name)).step("read the list of CPUs")?;
    parse_list(list.trim()).ok_or_else(|| Error::failed("read the list of CPUs", format!("{list:?}")))
}

/// A list such as "0-3,7", as the kernel writes it.
fn parse_list(list: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_understood() {
        assert_eq!(parse_list("0-2,5").unwrap(), [0, 1, 2, 5]);
        assert_eq!(parse_list("0").unwrap(), [0]);
        assert!(parse_list("a-b").is_none());
    }

    #[test]
    fn cpus_go_on_and_off_until_the_count_is_right() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        for cpu in 0..4 {
            fs::create_dir(path.join(format!("cpu{cpu}"))).unwrap();
            fs::write(path.join(format!("cpu{cpu}/online")), "").unwrap();
        }
        let state = |cpu: u32| fs::read_to_string(path.join(format!("cpu{cpu}/online"))).unwrap();
        fs::write(path.join("present"), "0-3\n").unwrap();
        fs::write(path.join("online"), "0\n").unwrap();
        assert_eq!(set_online_in(path, 3).unwrap(), 3);
        assert_eq!((state(1).as_str(), state(2).as_str(), state(3).as_str()), ("1", "1", ""));
        assert_eq!(set_online_in(path, 9).unwrap(), 4);
        fs::write(path.join("online"), "0-3\n").unwrap();
        assert_eq!(set_online_in(path, 2).unwrap(), 2);
        assert_eq!((state(0).as_str(), state(2).as_str(), state(3).as_str()), ("", "0", "0"));
        assert!(set_online_in(path, 0).is_err());
    }
}
