//! `hull config` from outside.

use std::path::Path;
use std::process::{Command, Output};

struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    fn new<const N: usize>(files: [(&str, &str); N]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("config.d")).unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).into_os_string().into_string().unwrap()
    }

    fn hull(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hull"));
        command.args(args).env("HULL_CONFIG_DIR", self.dir.path());
        for variable in ["HULL_VMM", "HULL_KERNEL", "HULL_IMAGE"] {
            command.env_remove(variable);
        }
        command
    }

    fn said(&self, args: &[&str]) -> (i32, String, String) {
        text(&self.hull(args).output().unwrap())
    }
}

fn text(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// What `hull config show --json` says of a key.
fn shown(command: &mut Command, key: &str) -> (serde_json::Value, String) {
    let (code, stdout, stderr) = text(&command.output().unwrap());
    assert_eq!((code, stderr.as_str()), (0, ""));
    let all: Vec<serde_json::Value> = serde_json::from_str(&stdout).unwrap();
    let found = all.iter().find(|setting| setting["key"] == key).unwrap_or_else(|| panic!("no {key} in {stdout}"));
    (found["value"].clone(), found["from"].as_str().unwrap().to_owned())
}

#[test]
fn show_says_what_is_in_force_and_where_it_comes_from() {
    let node = Node::new([
        ("config.toml", "[guest]\ndefault_vcpus = 2\n[paths]\nvmm = '/a'\nkernel = '/b'"),
        ("config.d/9.toml", "guest.default_memory_mib = 256"),
    ]);
    let show = || node.hull(&["config", "show", "--json"]);
    assert_eq!(shown(&mut show(), "guest.default_vcpus"), (2.into(), node.path("config.toml:2")));
    assert_eq!(shown(&mut show(), "guest.default_memory_mib"), (256.into(), node.path("config.d/9.toml:1")));
    assert_eq!(shown(&mut show(), "pod.host_namespaces"), ("refuse".into(), "default".into()));
    assert_eq!(shown(&mut show(), "paths.vmm"), ("/a".into(), node.path("config.toml:4")));
    assert_eq!(shown(show().env("HULL_KERNEL", "/c"), "paths.kernel"), ("/c".into(), "HULL_KERNEL".into()));
    let image = Path::new(env!("CARGO_BIN_EXE_hull")).parent().unwrap().parent().unwrap().join("share/hull/guest.img");
    assert_eq!(shown(&mut show(), "paths.image"), (image.to_str().unwrap().into(), "default".into()));
}

#[test]
fn show_prints_a_table_for_people() {
    let node = Node::new([("config.toml", "log.level = 'debug'")]);
    let (code, stdout, stderr) = node.said(&["config", "show"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    assert!(stdout.starts_with("KEY "), "{stdout}");
    let line = stdout.lines().find(|line| line.starts_with("log.level")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words, ["log.level", "\"debug\"", &node.path("config.toml:1")]);
}

#[test]
fn check_says_everything_that_is_wrong_a_line_each() {
    let node = Node::new([("config.toml", "[pod]\nmax_cpus = 1\n[log]\nlevel = 3")]);
    let (code, stdout, _) = node.said(&["config", "check"]);
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!((code, lines.len()), (1, 2), "{stdout}");
    let first = format!("{}: unknown key pod.max_cpus; did you mean max_vcpus?", node.path("config.toml:2"));
    assert_eq!(lines[0], first);
    assert!(lines[1].starts_with(&node.path("config.toml:4: log.level: ")), "{stdout}");
}

#[test]
fn check_takes_a_file_by_itself() {
    let node = Node::new([("config.toml", "nonsense"), ("good", "guest.default_vcpus = 4"), ("bad", "[guest]\nx = 1")]);
    assert_eq!(node.said(&["config", "check", &node.path("good")]), (0, String::new(), String::new()));
    let (code, stdout, _) = node.said(&["config", "check", &node.path("bad")]);
    assert_eq!((code, stdout.trim_end()), (1, format!("{}: unknown key guest.x", node.path("bad:2")).as_str()));
    let (code, stdout, _) = node.said(&["config", "check", "/no/such/file"]);
    assert!(code == 1 && stdout.starts_with("/no/such/file: "), "{stdout}");
}

#[test]
fn the_example_is_right_as_it_is() {
    let node = Node::new([]);
    let (code, stdout, _) = node.said(&["config", "example"]);
    assert_eq!(code, 0);
    std::fs::write(node.path("config.toml"), stdout).unwrap();
    assert_eq!(node.said(&["config", "check"]), (0, String::new(), String::new()));
}

#[test]
fn wrong_settings_keep_run_from_starting_but_nothing_from_being_cleared_away() {
    let node = Node::new([("config.toml", "[guest]\nvcpus = 1")]);
    let (code, _, stderr) = node.said(&["run", "--rootfs", "/", "true"]);
    assert_eq!(code, 125);
    let place = node.path("config.toml:2: unknown key guest.vcpus; did you mean default_vcpus?");
    assert_eq!(stderr.trim_end(), format!("hull: {place}"));
    let state = node.path("state");
    let output = node.hull(&["ps", "--json"]).env("HULL_STATE_DIR", &state).env("HULL_DATA_DIR", &state).output();
    assert_eq!(text(&output.unwrap()).0, 0);
}
