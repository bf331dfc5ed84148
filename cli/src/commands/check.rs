//! `hull check`: what this host offers, each with a verdict and what to do about it.

use std::fs::{self, File};
use std::path::Path;

use hull_sandbox::host::Host;
use hull_settings::Settings;
use serde::{Deserialize, Serialize};

use crate::args::Check;
use crate::{Outcome, output};

/// What is found of one thing.
#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    /// Whether Hull cannot run without it.
    needed: bool,
    ok: bool,
    detail: String,
    /// What to do about it, where it is not well.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<&'static str>,
}

/// What `hull-vmm --probe` prints.
#[derive(Debug, Deserialize)]
struct Probe {
    kvm: Kvm,
    detail: String,
    io_uring: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kvm {
    Hardware,
    Emulated,
    Missing,
}

pub(super) fn run(args: &Check, host: Host) -> Outcome {
    let findings = findings(host);
    if args.json {
        output::json(&findings)?;
    } else {
        for finding in &findings {
            let verdict = match (finding.ok, finding.needed) {
                (true, _) => "ok",
                (false, true) => "MISSING",
                (false, false) => "absent",
            };
            println!("{:<12} {verdict:<8} {}", finding.name, finding.detail);
            if let (false, Some(remedy)) = (finding.ok, finding.remedy) {
                println!("{:<21} {remedy}", "");
            }
        }
    }
    Ok(u8::from(findings.iter().any(|finding| finding.needed && !finding.ok)))
}

fn findings(host: Host) -> Vec<Finding> {
    let mut findings = Vec::new();
    let (settings, wrong) = match Settings::load() {
        Ok(settings) => (settings, None),
        Err(problems) => (Settings::default(), Some(problems)),
    };
    findings.push(Finding {
        name: "settings",
        needed: true,
        ok: wrong.is_none(),
        detail: wrong.map_or_else(|| hull_settings::dir().display().to_string(), |problems| problems.to_string()),
        remedy: Some("correct the file; `hull config example` explains every key"),
    });
    let host = &settings.host(host);
    let installed = host.check();
    findings.push(Finding {
        name: "install",
        needed: true,
        ok: installed.is_ok(),
        detail: installed.map_or_else(|error| error.to_string(), |()| "VMM, guest kernel and guest image".to_owned()),
        remedy: Some("run `make install`"),
    });
    findings.extend(probed(host));
    findings.push(device("tap", "/dev/net/tun", "modprobe tun; needed for networking only"));
    findings.push(device("vhost-vsock", "/dev/vhost-vsock", "nothing to do: Hull has a socket device of its own"));
    findings.push(device("vhost-net", "/dev/vhost-net", "nothing to do: Hull has a network device of its own"));
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    findings.push(Finding {
        name: "cgroup v2",
        needed: false,
        ok: unified,
        detail: if unified { "/sys/fs/cgroup".into() } else { "no unified hierarchy at /sys/fs/cgroup".into() },
        remedy: Some("boot with systemd.unified_cgroup_hierarchy=1; needed for limits on the host only"),
    });
    let overlay = fs::read_to_string("/proc/filesystems").is_ok_and(|list| list.contains("\toverlay\n"));
    findings.push(Finding {
        name: "overlayfs",
        needed: false,
        ok: overlay,
        detail: if overlay { "images can be mounted".into() } else { "not registered with the kernel yet".into() },
        remedy: Some("modprobe overlay; needed for images, --rootfs does without"),
    });
    findings
}

/// Has the VMM try out what only it may touch: a tiny guest, an io_uring.
fn probed(host: &Host) -> Vec<Finding> {
    let probe = std::process::Command::new(&host.vmm)
        .arg("--probe")
        .output()
        .map_err(|error| error.to_string())
        .and_then(|out| serde_json::from_slice::<Probe>(&out.stdout).map_err(|error| error.to_string()))
        .unwrap_or_else(|error| Probe { kvm: Kvm::Missing, detail: format!("not probed: {error}"), io_uring: false });
    let remedy = match probe.kvm {
        Kvm::Hardware => None,
        Kvm::Emulated => Some("this machine has no nested virtualization: use one that has, or the lab (docs/lab.md)"),
        Kvm::Missing => Some("load kvm_intel or kvm_amd, enable virtualization in the firmware, and run as root"),
    };
    vec![
        Finding { name: "kvm", needed: true, ok: probe.kvm == Kvm::Hardware, detail: probe.detail, remedy },
        Finding {
            name: "io_uring",
            needed: false,
            ok: probe.io_uring,
            detail: if probe.io_uring { "used for disks".into() } else { "disks are served by threads".into() },
            remedy: Some("sysctl kernel.io_uring_disabled=0; disks are slower without"),
        },
    ]
}

fn device(name: &'static str, path: &str, remedy: &'static str) -> Finding {
    let opened = File::options().read(true).write(true).open(path);
    Finding {
        name,
        needed: false,
        ok: opened.is_ok(),
        detail: opened.map_or_else(|error| format!("{path}: {error}"), |_| path.to_owned()),
        remedy: Some(remedy),
    }
}
