//! Network configurations as CNI defines them (specification 1.1.0, section 1): a list of plugins under a name.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{CniError, PortMapping};

/// The version that a configuration has which does not say.
const OLDEST_VERSION: &str = "0.1.0";
/// From this version on plugins learn at the end what they answered at the start.
const PREV_RESULT_AT_END: (u32, u32) = (0, 4);

/// A network configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NetworkList {
    pub(super) name: String,
    #[serde(default = "oldest_version")]
    pub(super) cni_version: String,
    pub(super) plugins: Vec<Map<String, Value>>,
}

fn oldest_version() -> String {
    OLDEST_VERSION.to_owned()
}

/// Finds the network `name` among the files of `dir`.
pub(super) fn find(dir: &Path, name: &str) -> Result<NetworkList, CniError> {
    let mut names = Vec::new();
    for path in files(dir)? {
        // A broken file of another network is none of this one's business.
        match read(&path) {
            Ok(list) if list.name == name => return Ok(list),
            Ok(list) => names.push(list.name),
            Err(error) if path.file_stem().is_some_and(|stem| stem == name) => return Err(error),
            Err(error) => tracing::debug!("{error}"),
        }
    }
    Err(CniError::Unknown { name: name.to_owned(), dir: dir.to_owned(), names })
}

/// The name of the first network among the files of `dir`, as containerd picks one.
pub(super) fn first(dir: &Path) -> Option<String> {
    // A directory that cannot be read configures nothing.
    let files = files(dir).unwrap_or_default();
    files.iter().find_map(|path| match read(path) {
        Ok(list) => Some(list.name),
        Err(error) => {
            tracing::debug!("{error}");
            None
        }
    })
}

/// The configuration files of a directory in their order.
fn files(dir: &Path) -> Result<Vec<PathBuf>, CniError> {
    let read = |source| CniError::Read { path: dir.to_owned(), source };
    let mut files = Vec::new();
    match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        entries => {
            for entry in entries.map_err(read)? {
                let path = entry.map_err(read)?.path();
                let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
                if matches!(extension, "conflist" | "conf" | "json") {
                    files.push(path);
                }
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Reads a list of plugins, or a single one.
fn read(path: &Path) -> Result<NetworkList, CniError> {
    let json = std::fs::read(path).map_err(|source| CniError::Read { path: path.to_owned(), source })?;
    parse(&json).map_err(|source| CniError::Parse { path: path.to_owned(), source })
}

/// Every plugin of what it returns has a `type`.
fn parse(json: &[u8]) -> serde_json::Result<NetworkList> {
    let list = parse_list(json)?;
    match list.plugins.iter().all(|plugin| plugin.get("type").is_some_and(Value::is_string)) {
        true => Ok(list),
        false => Err(serde::de::Error::missing_field("type")),
    }
}

fn parse_list(json: &[u8]) -> serde_json::Result<NetworkList> {
    let value: Value = serde_json::from_slice(json)?;
    if value.get("plugins").is_some() {
        return serde_json::from_value(value);
    }
    let (name, version) = (value["name"].clone(), value.get("cniVersion").cloned());
    let list = json!({ "name": name, "cniVersion": version.unwrap_or(OLDEST_VERSION.into()), "plugins": [value] });
    serde_json::from_value(list)
}

impl NetworkList {
    /// Whether a plugin of it publishes ports.
    pub(super) fn maps_ports(&self) -> bool {
        self.plugins.iter().any(maps_ports)
    }

    /// Whether plugins want to know at the end what they answered at the start.
    pub(super) fn wants_result_at_end(&self) -> bool {
        let mut numbers = self.cni_version.split('.').map(|part| part.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= PREV_RESULT_AT_END
    }

    /// What a plugin of it reads from its standard input.
    pub(super) fn input(&self, plugin: &Map<String, Value>, ports: &[PortMapping], previous: Option<&Value>) -> Value {
        let mut input = plugin.clone();
        input.insert("name".into(), self.name.clone().into());
        input.insert("cniVersion".into(), self.cni_version.clone().into());
        if !ports.is_empty() && maps_ports(plugin) {
            input.insert("runtimeConfig".into(), json!({ "portMappings": ports }));
        }
        // For the runtime, not for the plugin.
        input.remove("capabilities");
        if let Some(previous) = previous {
            input.insert("prevResult".into(), previous.clone());
        }
        input.into()
    }
}

fn maps_ports(plugin: &Map<String, Value>) -> bool {
    plugin.get("capabilities").is_some_and(|capabilities| capabilities["portMappings"] == true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, contents) in files {
            std::fs::write(dir.path().join(name), contents).unwrap();
        }
        dir
    }

    const LIST: &str = r#"{"cniVersion": "1.0.0", "name": "test", "plugins": [
        {"type": "bridge", "bridge": "b"}, {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;

    #[test]
    fn a_network_is_found_by_its_name() {
        let dir = directory(&[
            ("10-broken.conflist", "{"),
            ("11-typeless.conflist", r#"{"name": "typeless", "plugins": [{}]}"#),
            ("20-one.conf", r#"{"name": "one", "type": "bridge"}"#),
            ("30-test.conflist", LIST),
            ("40-test.txt", "not looked at"),
        ]);
        let one = find(dir.path(), "one").unwrap();
        assert_eq!((one.plugins.len(), one.cni_version.as_str(), one.maps_ports()), (1, "0.1.0", false));
        assert!(!one.wants_result_at_end());
        let test = find(dir.path(), "test").unwrap();
        assert!(test.maps_ports() && test.wants_result_at_end());
        assert_eq!(first(dir.path()).as_deref(), Some("one"));
        assert_eq!(first(Path::new("/no/such/dir")), None);
        let unknown = find(dir.path(), "other").unwrap_err().to_string();
        assert!(unknown.contains("one, test"), "{unknown}");
        assert!(matches!(find(dir.path(), "10-broken"), Err(CniError::Parse { .. })));
        assert!(matches!(find(dir.path(), "11-typeless"), Err(CniError::Parse { .. })));
        assert!(matches!(find(Path::new("/no/such/dir"), "x"), Err(CniError::Unknown { .. })));
    }

    #[test]
    fn a_plugin_gets_what_it_can_use() {
        let dir = directory(&[("t.conflist", LIST)]);
        let list = find(dir.path(), "test").unwrap();
        let ports = [PortMapping { host_ip: None, host_port: 8080, container_port: 80, protocol: "tcp".into() }];
        let bridge = list.input(&list.plugins[0], &ports, None);
        assert_eq!(bridge, json!({"type": "bridge", "bridge": "b", "name": "test", "cniVersion": "1.0.0"}));
        let portmap = list.input(&list.plugins[1], &ports, Some(&json!({"ips": []})));
        assert_eq!(portmap["prevResult"], json!({"ips": []}));
        assert_eq!(
            portmap["runtimeConfig"],
            json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]})
        );
    }
}
