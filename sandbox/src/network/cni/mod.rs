//! Networks that CNI plugins make (Container Network Interface, specification 1.1.0), for sandboxes that have no namespace
//! from somebody else.
//!
//! A network's plugins are called one after the other on a new namespace, and in the reverse order at the end, which is
//! when the value here is dropped. What they need to know then is in the sandbox's directory too, for the case that the
//! owner dies.

mod config;
mod plugin;
mod ports;

use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::config::NetworkList;
use self::plugin::Caller;

/// Where configurations are, unless `NETCONFPATH` says otherwise.
const CONFIGURATIONS: &str = "/etc/cni/net.d";
/// The interface that plugins make.
const INTERFACE: &str = "eth0";

/// A network that CNI did not make.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A configuration is none.
    #[error("{path} is no network configuration: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// There is no such network.
    #[error("there is no network {name} in {dir}{}", listed(.names))]
    Unknown {
        /// The name.
        name: String,
        /// Where configurations are.
        dir: PathBuf,
        /// Those that there are.
        names: Vec<String>,
    },
    /// A plugin is not installed.
    #[error("the CNI plugin {plugin:?} is not in {path}; install it, or set CNI_PATH")]
    Missing {
        /// Its name.
        plugin: String,
        /// Where it was looked for.
        path: String,
    },
    /// A plugin failed.
    #[error("the CNI plugin {plugin} failed ({command}): {reason}")]
    Plugin {
        /// Its name.
        plugin: String,
        /// What it was to do.
        command: &'static str,
        /// Its own words, or what became of it.
        reason: String,
    },
    /// A plugin's answer is of no use.
    #[error("the CNI plugins of {0} answered without a result")]
    NoResult(String),
    /// Ports were to be published by a network that cannot.
    #[error("the network {0} publishes no ports; add the plugin portmap to it, with the capability portMappings")]
    NoPorts(String),
    /// Somebody else has a port that was to be published.
    #[error("the port {port} of the host is taken by {holder}; publish another one, or end that first")]
    PortTaken {
        /// Address, number and protocol.
        port: String,
        /// Who has it.
        holder: String,
    },
    /// A port cannot be published.
    #[error("the port {port} of the host cannot be had: {source}")]
    Port {
        /// Address, number and protocol.
        port: String,
        /// Why not.
        source: std::io::Error,
    },
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; there are {}", names.join(", ")) }
}

/// A port of the host that leads to one of the sandbox's, as the plugin `portmap` takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortMapping {
    /// An address of the host; all if there is none.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// The port on the host.
    pub host_port: u16,
    /// The port in the sandbox.
    pub container_port: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
}

/// What is needed to undo a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CniNote {
    container_id: String,
    list: NetworkList,
    ports: Vec<PortMapping>,
    result: Option<Value>,
}

/// A network that is made, or being made, until this is dropped.
#[derive(Debug)]
pub(super) struct Cni {
    caller: Caller,
    note: CniNote,
    /// The ports of the host; let go when the plugins have.
    _ports: Vec<OwnedFd>,
    /// Open until the plugins have let go: they know it by this descriptor's number.
    namespace: OwnedFd,
}

fn configurations() -> PathBuf {
    std::env::var_os("NETCONFPATH").map_or_else(|| PathBuf::from(CONFIGURATIONS), PathBuf::from)
}

/// The name of the first network that is configured, by the names of files.
#[must_use]
pub fn first() -> Option<String> {
    config::first(&configurations())
}

impl Cni {
    /// Finds the network called `name`, checks that it can do what is wanted, and sees to it that nobody else has the ports,
    /// of other programs or of the sandboxes whose directories are in `sandboxes`. Nothing is done to the namespace yet.
    pub(super) fn find(
        container_id: &str,
        name: &str,
        ports: &[PortMapping],
        namespace: OwnedFd,
        sandboxes: &Path,
    ) -> Result<Self, CniError> {
        let list = config::find(&configurations(), name)?;
        if !ports.is_empty() && !list.maps_ports() {
            return Err(CniError::NoPorts(name.to_owned()));
        }
        let caller = Caller::new(container_id, path_of(&namespace).display().to_string(), INTERFACE);
        for plugin in &list.plugins {
            // Before any is called: one that is not there cannot undo what the others did either.
            caller.program(plugin["type"].as_str().unwrap_or_default())?;
        }
        let held = ports::hold(ports, sandboxes)?;
        let note = CniNote { container_id: container_id.to_owned(), list, ports: ports.to_vec(), result: None };
        Ok(Self { caller, note, _ports: held, namespace })
    }

    /// The namespace.
    pub(super) fn namespace(&self) -> &OwnedFd {
        &self.namespace
    }

    /// The path by which other processes open the namespace.
    pub(super) fn path(&self) -> PathBuf {
        path_of(&self.namespace)
    }

    /// What is to be written down before [`add`](Self::add), and again after it.
    pub(super) fn note(&self) -> &CniNote {
        &self.note
    }

    /// Makes the network.
    pub(super) fn add(&mut self) -> Result<(), CniError> {
        for plugin in &self.note.list.plugins {
            let input = self.note.list.input(plugin, &self.note.ports, self.note.result.as_ref());
            if let Some(result) = self.caller.call("ADD", &input)? {
                self.note.result = Some(result);
            }
        }
        if self.note.result.is_none() {
            return Err(CniError::NoResult(self.note.list.name.clone()));
        }
        Ok(())
    }

    /// The lines for a resolv.conf that the plugins ask for.
    pub(super) fn resolv_conf(&self) -> String {
        self.note.result.as_ref().map(|result| resolv_conf(&result["dns"])).unwrap_or_default()
    }
}

impl Drop for Cni {
    fn drop(&mut self) {
        remove(&self.caller, &self.note);
    }
}

/// Undoes the network of a sandbox whose owner, and with it the namespace, has gone.
pub(super) fn sweep(note: &CniNote) {
    remove(&Caller::new(&note.container_id, String::new(), INTERFACE), note);
}

/// Has all plugins let go, whatever the others say.
fn remove(caller: &Caller, note: &CniNote) {
    let previous = note.result.as_ref().filter(|_| note.list.wants_result_at_end());
    for plugin in note.list.plugins.iter().rev() {
        if let Err(error) = caller.call("DEL", &note.list.input(plugin, &note.ports, previous)) {
            tracing::warn!("left behind: {error}");
        }
    }
}

/// The `dns` object of a result (section 5) as a file. Its strings come from programs that run as root.
fn resolv_conf(dns: &Value) -> String {
    let words =
        |key: &str| -> Vec<&str> { dns[key].as_array().into_iter().flatten().filter_map(Value::as_str).collect() };
    let mut file: String = words("nameservers").iter().map(|server| format!("nameserver {server}\n")).collect();
    for (keyword, words) in [("search", words("search")), ("options", words("options"))] {
        if !words.is_empty() {
            file.push_str(&format!("{keyword} {}\n", words.join(" ")));
        }
    }
    file
}

/// The path by which plugins, other processes of the host, open a namespace that this process has open.
fn path_of(namespace: &OwnedFd) -> PathBuf {
    Path::new("/proc").join(std::process::id().to_string()).join("fd").join(namespace.as_raw_fd().to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn name_servers_of_a_result_become_a_file() {
        let dns = json!({"nameservers": ["192.0.2.1", "192.0.2.2"], "search": ["a.example", "b.example"]});
        assert_eq!(resolv_conf(&dns), "nameserver 192.0.2.1\nnameserver 192.0.2.2\nsearch a.example b.example\n");
        assert_eq!(resolv_conf(&Value::Null), "");
    }

    #[test]
    fn a_note_survives_its_file() {
        let list = serde_json::from_value(json!({"name": "n", "cniVersion": "1.0.0", "plugins": [{"type": "x"}]}));
        let ports = vec![PortMapping {
            host_ip: Some("127.0.0.1".parse().unwrap()),
            host_port: 1,
            container_port: 2,
            protocol: "udp".into(),
        }];
        let note = CniNote { container_id: "c".into(), list: list.unwrap(), ports, result: Some(json!({"ips": []})) };
        let json = serde_json::to_string(&note).unwrap();
        assert_eq!(serde_json::from_str::<CniNote>(&json).unwrap(), note);
    }
}
