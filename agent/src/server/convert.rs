//! Wire messages to the agent's own types and back. What comes in is checked here, once.

use std::path::{Component, Path, PathBuf};

use hull_protocol::agent as wire;
use hull_protocol::{MAX_ID_BYTES, STREAM_TOKEN_BYTES};
use protobuf::MessageField;

use crate::cgroup::stats::{Pressure, PressureLine, Stats};
use crate::container::spec::check_path;
use crate::error::{Error, Result};
use crate::events::{Event, ExitStatus, What};
use crate::files::{self, File};
use crate::overlay::Overlay;
use crate::storage::{Source, Storage};
use crate::streams::parking::Token;
use crate::streams::stdio::{Io, WindowSize};
use crate::volumes::Volume;

/// An identifier: of a container, a directory and a cgroup too, so neither "." nor "..".
pub(super) fn check_id(field: &'static str, id: &str) -> Result<()> {
    let plain = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'));
    if id.is_empty() || id.len() > MAX_ID_BYTES || !plain || id == "." || id == ".." {
        return Err(Error::invalid(
            field,
            format!("is not 1 to {MAX_ID_BYTES} letters, digits, dots, dashes or underscores"),
        ));
    }
    Ok(())
}

/// The ids of a request for a process: empty for the container's first.
pub(super) fn check_process_id(container_id: &str, exec_id: &str) -> Result<()> {
    check_id("container_id", container_id)?;
    if exec_id.is_empty() { Ok(()) } else { check_id("exec_id", exec_id) }
}

pub(super) fn io(io: &MessageField<wire::Io>) -> Result<Io> {
    let io = io.get_or_default();
    if io.terminal && (!io.stdin.is_empty() || !io.stderr.is_empty()) {
        return Err(Error::invalid("io", "a terminal's only stream is stdout"));
    }
    let streams = Io {
        stdin: token("io.stdin", &io.stdin)?,
        stdout: token("io.stdout", &io.stdout)?,
        stderr: token("io.stderr", &io.stderr)?,
        terminal: io.terminal,
        size: window_size(&io.size)?,
    };
    let tokens = [streams.stdin, streams.stdout, streams.stderr];
    let twice = |index: usize| tokens[index].is_some() && tokens[index + 1..].contains(&tokens[index]);
    if twice(0) || twice(1) {
        return Err(Error::invalid("io", "two streams have one token"));
    }
    Ok(streams)
}

fn token(field: &'static str, bytes: &[u8]) -> Result<Option<Token>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let token = bytes.try_into().map_err(|_| Error::invalid(field, format!("is not {STREAM_TOKEN_BYTES} bytes")))?;
    Ok(Some(token))
}

pub(super) fn window_size(size: &MessageField<wire::WindowSize>) -> Result<WindowSize> {
    let size = size.get_or_default();
    let side = |side: u32| u16::try_from(side).map_err(|_| Error::invalid("size", format!("{side} is too large")));
    Ok(WindowSize { columns: side(size.columns)?, rows: side(size.rows)? })
}

pub(super) fn storages(storages: Vec<wire::Storage>) -> Result<Vec<Storage>> {
    storages.into_iter().map(storage).collect()
}

fn storage(storage: wire::Storage) -> Result<Storage> {
    let source = match storage.source {
        Some(wire::storage::Source::FsTag(tag)) if tag.is_empty() || tag.contains('\0') => {
            return Err(Error::invalid("storages.fs_tag", "is not a tag"));
        }
        Some(wire::storage::Source::FsTag(tag)) => Source::FsTag(tag),
        Some(wire::storage::Source::PciAddress(address)) => Source::Disk(address.parse()?),
        Some(wire::storage::Source::Path(path)) => {
            check_path("storages.path", Path::new(&path))?;
            Source::File(path)
        }
        Some(wire::storage::Source::None(_)) => Source::None,
        Some(wire::storage::Source::Overlay(overlay)) => Source::Overlay(self::overlay(overlay)?),
        Some(_) | None => return Err(Error::invalid("storages.source", "is missing")),
    };
    let mount_point = mount_point("storages.mount_point", storage.mount_point)?;
    let files = files(storage.files)?;
    if storage.read_ahead_kib > 0 && !matches!(source, Source::FsTag(_)) {
        return Err(Error::invalid("storages.read_ahead_kib", "is of a share only"));
    }
    let wire::Storage { fstype, options, read_ahead_kib, .. } = storage;
    Ok(Storage { source, fstype, options, mount_point, files, read_ahead_kib })
}

fn overlay(overlay: wire::Overlay) -> Result<Overlay> {
    let lower: Vec<PathBuf> = overlay.lower.into_iter().map(PathBuf::from).collect();
    let writable = Some(overlay.writable).filter(|path| !path.is_empty()).map(PathBuf::from);
    lower.iter().try_for_each(|path| check_path("storages.overlay.lower", path))?;
    writable.iter().try_for_each(|path| check_path("storages.overlay.writable", path))?;
    let least = if writable.is_some() { 1 } else { 2 };
    if lower.len() < least {
        return Err(Error::invalid("storages.overlay.lower", format!("has fewer than {least} directories")));
    }
    Ok(Overlay { lower, writable })
}

fn mount_point(field: &'static str, path: String) -> Result<PathBuf> {
    let path = PathBuf::from(path);
    check_path(field, &path)?;
    if path == Path::new("/") {
        return Err(Error::invalid(field, "is the guest's root"));
    }
    Ok(path)
}

pub(super) fn volumes(volumes: Vec<wire::MemoryVolume>) -> Result<Vec<Volume>> {
    volumes.into_iter().map(volume).collect()
}

fn volume(volume: wire::MemoryVolume) -> Result<Volume> {
    check_id("volumes.name", &volume.name)?;
    let path = PathBuf::from(volume.path);
    check_plain("volumes.path", &path)?;
    let directories = files(volume.directories)?;
    if !directories.iter().all(|file| matches!(file.what, files::What::Directory)) {
        return Err(Error::invalid("volumes.directories", "are not all directories"));
    }
    Ok(Volume {
        name: volume.name,
        size_bytes: volume.size_bytes,
        page_bytes: volume.page_bytes,
        mode: volume.mode & 0o7777,
        uid: volume.uid,
        gid: volume.gid,
        path,
        directories,
        mount_point: mount_point("volumes.mount_point", volume.mount_point)?,
    })
}

/// A path below something: plain names, or none.
fn check_plain(field: &'static str, path: &Path) -> Result<()> {
    if !path.components().all(|component| matches!(component, Component::Normal(_))) {
        return Err(Error::invalid(field, format!("{} is not a plain relative path", path.display())));
    }
    Ok(())
}

pub(super) fn files(files: Vec<wire::File>) -> Result<Vec<File>> {
    files.into_iter().map(file).collect()
}

fn file(file: wire::File) -> Result<File> {
    let path = PathBuf::from(file.path);
    check_plain("files.path", &path)?;
    let what = match file.what {
        Some(wire::file::What::Directory(_)) => files::What::Directory,
        Some(wire::file::What::Contents(contents)) => files::What::Contents(contents),
        Some(wire::file::What::Link(target)) => files::What::Link(target),
        Some(_) | None => return Err(Error::invalid("files.what", "is missing")),
    };
    if path.as_os_str().is_empty() && !matches!(what, files::What::Directory) {
        return Err(Error::invalid("files.path", "the mount point is a directory"));
    }
    Ok(File { path, mode: file.mode & 0o7777, uid: file.uid, gid: file.gid, what })
}

pub(super) fn exit_status(status: ExitStatus) -> wire::ExitStatus {
    wire::ExitStatus {
        code: status.code,
        signal: status.signal,
        exited_at_ns: status.exited_at_ns,
        oom_killed: status.oom_killed,
        ..Default::default()
    }
}

pub(super) fn event(event: Event) -> wire::Event {
    let what = match event.what {
        What::Exit { exec_id, status } => wire::event::What::Exit(wire::ProcessExit {
            exec_id,
            status: Some(exit_status(status)).into(),
            ..Default::default()
        }),
        What::OutOfMemory { kills } => wire::event::What::Oom(wire::OutOfMemory { kills, ..Default::default() }),
    };
    wire::Event { number: event.number, container_id: event.container_id, what: Some(what), ..Default::default() }
}

pub(super) fn stats(stats: Stats) -> wire::ContainerStatsResponse {
    let cpu = wire::CpuStats {
        usage_usec: stats.cpu("usage_usec"),
        user_usec: stats.cpu("user_usec"),
        system_usec: stats.cpu("system_usec"),
        nr_periods: stats.cpu("nr_periods"),
        nr_throttled: stats.cpu("nr_throttled"),
        throttled_usec: stats.cpu("throttled_usec"),
        pressure: stats.cpu_pressure.map(pressure).into(),
        ..Default::default()
    };
    let memory = wire::MemoryStats {
        usage_bytes: stats.memory_usage_bytes,
        limit_bytes: stats.memory_limit_bytes,
        swap_usage_bytes: stats.swap_usage_bytes,
        swap_limit_bytes: stats.swap_limit_bytes,
        peak_bytes: stats.memory_peak_bytes,
        stat: stats.memory_stat.into_iter().collect(),
        events: stats.memory_events.into_iter().collect(),
        pressure: stats.memory_pressure.map(pressure).into(),
        ..Default::default()
    };
    let pids = wire::PidsStats { current: stats.pids_current, limit: stats.pids_limit, ..Default::default() };
    let io = stats
        .io
        .into_iter()
        .map(|io| wire::IoStats {
            major: io.major,
            minor: io.minor,
            read_bytes: io.read_bytes,
            write_bytes: io.write_bytes,
            reads: io.reads,
            writes: io.writes,
            ..Default::default()
        })
        .collect();
    wire::ContainerStatsResponse {
        cpu: Some(cpu).into(),
        memory: Some(memory).into(),
        pids: Some(pids).into(),
        io,
        ..Default::default()
    }
}

fn pressure(pressure: Pressure) -> wire::Pressure {
    wire::Pressure {
        some: pressure.some.map(pressure_line).into(),
        full: pressure.full.map(pressure_line).into(),
        ..Default::default()
    }
}

fn pressure_line(line: PressureLine) -> wire::PressureLine {
    wire::PressureLine {
        avg10: line.avg10,
        avg60: line.avg60,
        avg300: line.avg300,
        total_usec: line.total_usec,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams(stdin: &[u8], stdout: &[u8], terminal: bool) -> Result<Io> {
        let message = wire::Io { stdin: stdin.to_vec(), stdout: stdout.to_vec(), terminal, ..Default::default() };
        io(&Some(message).into())
    }

    #[test]
    fn ids_are_plain_names_of_bounded_length() {
        for good in ["a", "web-1_2.x", &"x".repeat(MAX_ID_BYTES)] {
            assert!(check_id("container_id", good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä", "a\0", &"x".repeat(MAX_ID_BYTES + 1)] {
            assert!(check_id("container_id", bad).is_err(), "{bad}");
        }
        assert!(check_process_id("c", "").is_ok());
        assert!(check_process_id("c", "/").is_err());
    }

    #[test]
    fn streams_need_tokens_of_the_right_length_and_their_own() {
        assert!(streams(&[1; 16], &[2; 16], false).is_ok());
        assert!(streams(&[], &[], false).unwrap().stdin.is_none());
        assert!(streams(&[1; 15], &[], false).is_err());
        assert!(streams(&[1; 16], &[1; 16], false).is_err());
        assert!(streams(&[1; 16], &[], true).is_err());
        assert!(streams(&[], &[1; 16], true).is_ok());
    }

    #[test]
    fn storages_need_a_source_and_a_mount_point_below_the_root() {
        let make = |source, mount_point: &str| {
            let message = wire::Storage { source, mount_point: mount_point.into(), ..Default::default() };
            storages(vec![message])
        };
        let none = || Some(wire::storage::Source::None(true));
        assert!(make(none(), "/data").is_ok());
        for bad in ["", "/", "data", "/a/../b"] {
            assert!(make(none(), bad).is_err(), "{bad}");
        }
        assert!(make(None, "/data").is_err());
        assert!(make(Some(wire::storage::Source::PciAddress("x".into())), "/data").is_err());
        assert!(make(Some(wire::storage::Source::FsTag(String::new())), "/data").is_err());
        assert!(make(Some(wire::storage::Source::Path("/shared/layer".into())), "/data").is_ok());
        assert!(make(Some(wire::storage::Source::Path("layer".into())), "/data").is_err());
        for (source, is_acceptable) in [(wire::storage::Source::FsTag("tag".into()), true), (none().unwrap(), false)] {
            let mount_point = "/data".into();
            let message = wire::Storage { source: Some(source), mount_point, read_ahead_kib: 1, ..Default::default() };
            assert_eq!(storages(vec![message]).is_ok(), is_acceptable);
        }
    }

    #[test]
    fn an_overlay_has_layers_by_their_paths_in_the_guest() {
        let make = |lower: &[&str], writable: &str| {
            let lower = lower.iter().map(ToString::to_string).collect();
            overlay(wire::Overlay { lower, writable: writable.into(), ..Default::default() })
        };
        assert!(make(&["/a"], "/w").unwrap().writable.is_some());
        assert!(make(&["/a", "/b"], "").unwrap().writable.is_none());
        for (lower, writable) in [(&[][..], "/w"), (&["/a"], ""), (&["a"], "/w"), (&["/a/../b"], "/w"), (&["/a"], "w")]
        {
            assert!(make(lower, writable).is_err(), "{lower:?} {writable}");
        }
    }

    #[test]
    fn a_volume_needs_a_name_and_a_part_below_it() {
        let make = |name: &str, path: &str| {
            let message = wire::MemoryVolume {
                name: name.into(),
                path: path.into(),
                mount_point: "/run/v".into(),
                ..Default::default()
            };
            volumes(vec![message])
        };
        assert!(make("0", "").is_ok() && make("0", "a/b").is_ok());
        for (name, path) in [("", ""), ("..", ""), ("a/b", ""), ("0", "/a"), ("0", "../a"), ("0", "a/../../b")] {
            assert!(make(name, path).is_err(), "{name} {path}");
        }
    }
}
