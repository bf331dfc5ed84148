//! The settings of a node, as pods of containerd come by them.

use std::path::PathBuf;

use fixture::containerd::{BUSYBOX, RUNTIME, ctr, run_script};
use fixture::cri::{Pod, eventually, handlers};

/// In CRI: the node's.
const OF_THE_NODE: i32 = 2;

/// A drop-in, gone at the end.
struct DropIn {
    path: PathBuf,
}

impl DropIn {
    fn new(name: &str, text: &str) -> Self {
        let path = PathBuf::from("/etc/hull/config.d").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        Self { path }
    }
}

impl Drop for DropIn {
    fn drop(&mut self) {
        // A test that fails may have removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What a guest says of itself.
struct Guest {
    memory_mib: u64,
    cpus: String,
    cmdline: String,
}

/// That of a pod with these annotations.
#[track_caller]
fn guest<const N: usize>(id: &str, annotations: [&str; N]) -> Guest {
    let options: Vec<String> = annotations
        .iter()
        .flat_map(|pair| ["--annotation".to_owned(), format!("io.katacontainers.config.hypervisor.{pair}")])
        .collect();
    let script = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; nproc; cat /proc/cmdline";
    let args = ["run", "--rm", "--runtime", RUNTIME].map(str::to_owned).into_iter().chain(options);
    let said = ctr(args.chain([BUSYBOX, id, "sh", "-c", script].map(str::to_owned)));
    let said = said.ok();
    let [kib, cpus, cmdline] = said.lines().collect::<Vec<_>>()[..] else { panic!("{said}") };
    Guest {
        memory_mib: kib.parse::<u64>().unwrap() / 1024,
        cpus: cpus.to_owned(),
        // A space behind the last word too.
        cmdline: format!("{cmdline} "),
    }
}

#[test]
fn a_drop_in_changes_the_memory_of_pods_and_what_annotations_do() {
    let dropped = DropIn::new(
        "50-test.toml",
        "[guest]\nkernel_params = 'of_the=node'\n[pod]\nallowed_annotations = ['kernel_params']",
    );
    let plain = guest("plain", ["kernel_params=of_the=pod more"]);
    assert!((400..=512).contains(&plain.memory_mib), "{} MiB", plain.memory_mib);
    assert!(plain.cmdline.contains(" of_the=node of_the=pod more "), "{}", plain.cmdline);
    drop(dropped);
    let dropped = DropIn::new(
        "50-test.toml",
        "[guest]\ndefault_memory_mib = 256\n[pod]\nallowed_annotations = ['default_vcpus']",
    );
    let changed =
        guest("changed", ["default_memory=1024", "default_vcpus=2", "kernel_params=nonsense", "of_no_meaning=1"]);
    let memory = changed.memory_mib;
    assert!((150..=256).contains(&memory), "{memory} MiB: the annotation was not to count");
    assert_eq!(changed.cpus, "2");
    assert!(!changed.cmdline.contains("nonsense"), "{}", changed.cmdline);
    for key in ["default_memory", "kernel_params"] {
        let told = format!("hypervisor.{key} is ignored: pod.allowed_annotations does not have {key}");
        eventually("the log has it", || match fixture::containerd::log() {
            log if log.contains(&told) => Ok(()),
            log => Err(format!("{told:?} is not in {log}")),
        });
    }
    let told = "hypervisor.of_no_meaning has no meaning here and is ignored";
    eventually("the log has it once", || match fixture::containerd::log().matches(told).count() {
        1 => Ok(()),
        count => Err(format!("{told:?} is there {count} times")),
    });
    drop(dropped);
    let memory = guest("back", ["default_memory=1024"]).memory_mib;
    assert!((900..=1024).contains(&memory), "{memory} MiB");
}

#[test]
fn a_pod_that_wants_namespaces_of_the_node_has_its_own_where_that_is_to_be_ignored() {
    let _dropped = DropIn::new("50-test.toml", "[pod]\nhost_namespaces = 'ignore'");
    let pod = Pod::start(handlers()[0], |config| {
        let options = config.security().namespace_options.mut_or_insert_default();
        (options.pid, options.ipc) = (OF_THE_NODE, OF_THE_NODE);
    });
    let container = pod.run("main", "exec sleep 1000", |config| {
        config.security().namespace_options.mut_or_insert_default().ipc = OF_THE_NODE;
    });
    let seen = container.exec("ps -o args | grep -c '^sleep 1000$'; ps -o comm | grep -c '^containerd$' || true");
    assert_eq!(seen, "1\n0");
    for name in ["processes (hostPID)", "System V IPC (hostIPC)"] {
        let told = format!("the pod is not given the host's {name}, but its own");
        eventually("the log has it", || match fixture::containerd::log() {
            log if log.contains(&told) => Ok(()),
            log => Err(format!("{told:?} is not in {log}")),
        });
    }
    pod.end();
}

#[test]
fn wrong_settings_are_told_by_the_start_that_fails() {
    let dropped = DropIn::new("60-test.toml", "[guest]\ndefault_memory = 256");
    let said = run_script("wrong", [], "true");
    assert_ne!(said.code, 0);
    for word in ["60-test.toml:2", "guest.default_memory", "default_memory_mib"] {
        assert!(said.stderr.contains(word), "{word} is not in {}", said.stderr);
    }
    drop(dropped);
    assert_eq!(run_script("right", [], "echo up").ok(), "up");
}
