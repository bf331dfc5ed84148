use proptest::prelude::*;

use super::*;

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

    fn read(&self) -> Result<Settings, Problems> {
        Settings::read(&files(self.dir.path())?)
    }

    /// The one thing that is wrong, with the directory left out.
    #[track_caller]
    fn wrong(&self) -> String {
        let problems = self.read().unwrap_err();
        assert_eq!(problems.0.len(), 1, "{problems}");
        problems.to_string().replace(&format!("{}/", self.dir.path().display()), "")
    }
}

#[track_caller]
fn wrong(text: &str) -> String {
    Node::new([("config.toml", text)]).wrong()
}

#[test]
fn a_network_is_one_that_serves_any_number_of_containers() {
    let network = |text: &str| Node::new([("config.toml", &format!("run.network = '{text}'")[..])]).read();
    assert_eq!(network("cni:web").unwrap().run.network.value, RunNetwork::Fixed("cni:web".into()));
    assert_eq!(network("auto").unwrap().run.network.value, RunNetwork::Auto);
    for wrong in ["", "cni:", "netns:/run/netns/x", "host"] {
        let error = network(wrong).unwrap_err().to_string();
        assert!(error.contains("auto, none, user, cni:NAME"), "{error}");
    }
}

#[test]
fn without_files_the_defaults_are_in_force() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(files(&dir.path().join("none")).unwrap(), Vec::<PathBuf>::new());
    assert_eq!(Node::new([]).read().unwrap(), Settings::default());
}

#[test]
fn drop_ins_win_in_the_order_of_their_names_key_by_key() {
    let node = Node::new([
        ("config.toml", "[guest]\ndefault_vcpus = 2\ndefault_memory_mib = 1024\nkernel_params = 'a'"),
        ("config.d/20.toml", "[guest]\n\ndefault_memory_mib = 256"),
        ("config.d/10.toml", "[guest]\ndefault_memory_mib = 128\nkernel_params = 'b'"),
        ("config.d/30.toml.bak", "nonsense"),
        ("config.d/.40.toml", "nonsense"),
    ]);
    let guest = node.read().unwrap().guest;
    let values =
        (guest.default_vcpus.value.get(), guest.default_memory_mib.value.get(), guest.kernel_params.value.as_str());
    assert_eq!(values, (2, 256, "b"));
    let place = |name: &str, line| Origin::File { path: node.dir.path().join(name), line };
    assert_eq!(guest.default_vcpus.origin, place("config.toml", 2));
    assert_eq!(guest.default_memory_mib.origin, place("config.d/20.toml", 3));
    assert_eq!(node.read().unwrap().pod.boot_timeout_s.origin, Origin::Default);
}

#[test]
fn every_way_to_write_a_key_is_taken() {
    for text in ["guest.default_vcpus = 3", "guest = { default_vcpus = 3 }", "[guest]\n\"default_vcpus\" = 0x3"] {
        assert_eq!(Node::new([("config.toml", text)]).read().unwrap().guest.default_vcpus.value.get(), 3, "{text}");
    }
}

#[test]
fn unknown_names_are_refused_with_file_line_and_the_nearest() {
    for (text, said) in [
        ("[guest]\n\ndefault_cpus = 1", "config.toml:3: unknown key guest.default_cpus; did you mean default_vcpus?"),
        ("[geust]", "config.toml:1: unknown table [geust]; did you mean guest?"),
        ("max_vcpus = 1", "config.toml:1: unknown key max_vcpus outside of any table; did you mean pod.max_vcpus?"),
        ("[guest]\nmax_vcpus = 1", "config.toml:2: unknown key guest.max_vcpus; did you mean pod.max_vcpus?"),
        ("[log]\ncolour = 1", "config.toml:2: unknown key log.colour"),
        ("debug = true", "config.toml:1: unknown key debug"),
        ("[guest.default_vcpu]", "config.toml:1: unknown key guest.default_vcpu; did you mean default_vcpus?"),
    ] {
        assert_eq!(wrong(text), said);
    }
    let node = Node::new([("config.d/a.toml", "[log]\nlvl = 'info'")]);
    assert_eq!(node.wrong(), "config.d/a.toml:2: unknown key log.lvl; did you mean level?");
}

#[test]
fn values_are_checked_where_they_stand() {
    for (text, said) in [
        ("[guest]\ndefault_vcpus = 0", "config.toml:2: guest.default_vcpus: 0 is out of range; it may be 1 to 64"),
        ("[guest]\ndefault_vcpus = -1", "config.toml:2: guest.default_vcpus: -1 is out of range; it may be 1 to 64"),
        (
            "[guest]\ndefault_memory_mib = 63",
            "config.toml:2: guest.default_memory_mib: 63 is out of range; it may be 64 to 524288",
        ),
        ("[paths]\nvmm = 'hull-vmm'", "config.toml:2: paths.vmm: \"hull-vmm\" is no absolute path; start it with /"),
        (
            "[guest]\nkernel_params = \"a\\nb\"",
            "config.toml:2: guest.kernel_params: '\\n' cannot stand on a kernel's command line",
        ),
        (
            "[pod]\nallowed_annotations = [\n 'default_memory',\n 'kernel_parms']",
            "config.toml:2: pod.allowed_annotations: \"kernel_parms\" is no annotation that has a meaning here; did you mean kernel_params?; there are default_vcpus, default_memory, default_maxvcpus, default_maxmemory, block_device_cache_direct, kernel_params",
        ),
        (
            "[log]\nlevel = 'dbug'",
            "config.toml:2: log.level: \"dbug\" is not among error, warn, info, debug; did you mean debug?",
        ),
        ("guest = 1", "config.toml:1: guest is a table: write [guest], and its keys below it"),
    ] {
        assert_eq!(wrong(text), said);
    }
    for (text, place) in [
        ("[guest]\ndefault_vcpus = '1'", "config.toml:2: guest.default_vcpus: "),
        ("[guest]\ndefault_vcpus = 1.5", "config.toml:2: guest.default_vcpus: "),
        ("[guest]\ndefault_vcpus = 99999999999999999999999", "config.toml:2: guest.default_vcpus: "),
        ("[log]\nlevel = 'loud'", "config.toml:2: log.level: "),
        ("[pod]\nhost_namespaces = true", "config.toml:2: pod.host_namespaces: "),
        ("[guest]\ndefault_vcpus = 1\ndefault_vcpus = 2", "config.toml:3: "),
        ("[guest]\ndefault_vcpus = ", "config.toml:2: "),
        ("[guest", "config.toml:1: "),
    ] {
        let said = wrong(text);
        assert!(said.starts_with(place) && said.len() > place.len() && !said.contains('\n'), "{said}");
    }
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let node = Node::new([
        ("config.toml", "[guest]\ndefault_vcpus = 0\nnone = 1\n[pod]\nmax_vcpus = 65"),
        ("config.d/a.toml", "["),
    ]);
    let problems = node.read().unwrap_err();
    assert_eq!(problems.0.iter().map(|problem| problem.line).collect::<Vec<_>>(), [Some(2), Some(3), Some(5), Some(1)]);
}

#[test]
fn a_default_above_the_most_is_a_contradiction() {
    let said = wrong("[guest]\ndefault_vcpus = 4\n[pod]\nmax_vcpus = 2");
    assert!(
        said.starts_with("config.toml:4: guest.default_vcpus (4, ") && said.contains("pod.max_vcpus (2, "),
        "{said}"
    );
    let said = wrong("[pod]\nmax_memory_mib = 256");
    assert!(said.starts_with("config.toml:2: guest.default_memory_mib (512, default)"), "{said}");
}

#[test]
fn what_is_no_readable_file_is_told_and_nothing_waits_for_it() {
    let node = Node::new([]);
    let path = node.dir.path().join("config.toml");
    std::os::unix::fs::symlink("/no/such/file", &path).unwrap();
    assert!(node.wrong().starts_with("config.toml: No such file"));
    std::fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert_eq!(node.wrong(), "config.toml: is no file");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert_eq!(node.wrong(), "config.toml: is no file");
    std::fs::remove_dir(&path).unwrap();
    std::fs::write(&path, b"# a\n# \xff\n").unwrap();
    assert_eq!(node.wrong(), "config.toml:2: is not UTF-8");
    std::fs::write(&path, "#".repeat(300_000)).unwrap();
    assert_eq!(node.wrong(), "config.toml: has more than 262144 bytes");
    std::fs::remove_dir(node.dir.path().join("config.d")).unwrap();
    std::fs::write(node.dir.path().join("config.d"), "").unwrap();
    assert!(node.wrong().starts_with("config.d: Not a directory"));
}

#[test]
fn depth_and_length_of_what_is_written_do_no_harm() {
    for text in ["[".repeat(100_000), format!("a = {}", "[".repeat(100_000)), format!("a{} = 1", ".a".repeat(50_000))] {
        Node::new([("config.toml", &text)]).read().unwrap_err();
    }
    let said = wrong(&format!("{} = 1", "k".repeat(100_000)));
    assert!(said.len() < 200, "{} bytes", said.len());
}

proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in "\\PC*") {
        let (mut settings, mut problems) = (Settings::default(), Problems::default());
        file::apply(&mut settings, Path::new("f"), &text, &mut problems);
    }

    #[test]
    fn no_value_of_a_known_key_makes_the_reader_panic(number in 0..Settings::KEYS.len(), value in "[0-9a-z\\[\\]{}\"'=,.+\\- \n\\\\]*") {
        let (table, key) = Settings::KEYS[number];
        let (mut settings, mut problems) = (Settings::default(), Problems::default());
        file::apply(&mut settings, Path::new("f"), &format!("[{table}]\n{key} = {value}"), &mut problems);
        for problem in problems.0 {
            prop_assert!(problem.line.is_none_or(|line| line >= 2), "{}", problem);
        }
    }

    #[test]
    fn a_number_is_taken_when_it_is_in_range(number: i64) {
        let (mut settings, mut problems) = (Settings::default(), Problems::default());
        file::apply(&mut settings, Path::new("f"), &format!("guest.default_vcpus = {number}"), &mut problems);
        prop_assert_eq!(problems.0.is_empty(), (1..=64).contains(&number));
    }
}
