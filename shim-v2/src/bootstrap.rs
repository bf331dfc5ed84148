//! What `start` reads and answers: containerd up to 2.2 speaks by flags and environment, from 2.3 by a message.

use std::io::Read;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use sha2::{Digest, Sha256};

use crate::flags::Flags;

/// Most that is read: runtime options are a few hundred bytes.
const MAX_INPUT_BYTES: u64 = 4 << 20;
/// Where containerd keeps its shims' sockets.
const SOCKET_DIR: &str = "/run/containerd/s";
/// The version of the task service that all versions of containerd take.
const TASK_V2: i32 = 2;
/// The version in which containerd starts no shim per container.
const TASK_V3: i32 = 3;

/// What a shim needs to know to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    /// Where events go.
    pub(crate) ttrpc_address: String,
    /// containerd's own socket, one part of the name of the shim's.
    pub(crate) grpc_address: String,
    pub(crate) socket_dir: String,
    pub(crate) debug: bool,
    /// Whether containerd sent a message, and takes one.
    pub(crate) by_message: bool,
}

/// Something is wrong with what containerd sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootstrapError {
    /// Standard input cannot be read.
    #[error("cannot read standard input: {0}")]
    Input(#[from] std::io::Error),
    /// The message is for another shim.
    #[error("the message on standard input is for {found} and the flags are for {expected}")]
    Mismatch {
        /// Namespace and identifier in the message.
        found: String,
        /// Namespace and identifier in the flags.
        expected: String,
    },
    /// There is nobody to tell of events.
    #[error("there is no address for events: neither in TTRPC_ADDRESS nor on standard input")]
    NoAddress,
}

/// Reads standard input to its end, unless it is a terminal.
pub(crate) fn read_input() -> Result<Vec<u8>, BootstrapError> {
    let stdin = std::io::stdin();
    let mut input = Vec::new();
    if !std::io::IsTerminal::is_terminal(&stdin) {
        stdin.lock().take(MAX_INPUT_BYTES).read_to_end(&mut input)?;
    }
    Ok(input)
}

/// Makes sense of what containerd says. `environment` looks up a variable.
pub(crate) fn parse(
    input: &[u8],
    flags: &Flags,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Start, BootstrapError> {
    let variable = |name: &str| environment(name).unwrap_or_default();
    let mut start = Start {
        ttrpc_address: variable("TTRPC_ADDRESS"),
        grpc_address: if flags.address.is_empty() { variable("GRPC_ADDRESS") } else { flags.address.clone() },
        socket_dir: SOCKET_DIR.to_owned(),
        debug: flags.debug,
        by_message: false,
    };
    // Runtime options, which older versions send, can happen to parse as the message: they are an `Any`, whose first two
    // fields are texts as well. So it counts only if it names this shim.
    if let Ok(params) = BootstrapParams::parse_from_bytes(input)
        && !params.instance_id.is_empty()
        && !params.containerd_ttrpc_address.is_empty()
    {
        if (&params.instance_id, &params.namespace) != (&flags.id, &flags.namespace) {
            return Err(BootstrapError::Mismatch {
                found: format!("{}/{}", params.namespace, params.instance_id),
                expected: format!("{}/{}", flags.namespace, flags.id),
            });
        }
        start.by_message = true;
        start.debug |= params.log_level.value() < 0;
        start.ttrpc_address = params.containerd_ttrpc_address;
        if !params.containerd_grpc_address.is_empty() {
            start.grpc_address = params.containerd_grpc_address;
        }
        if let Some(dir) = params.socket_dir.filter(|dir| !dir.is_empty()) {
            start.socket_dir = dir;
        }
    }
    if start.ttrpc_address.is_empty() {
        return Err(BootstrapError::NoAddress);
    }
    Ok(start)
}

impl Start {
    /// The path of the socket of the pod `group` in `namespace`.
    pub(crate) fn socket_path(&self, namespace: &str, group: &str) -> String {
        socket_path(&self.socket_dir, &self.grpc_address, namespace, group)
    }

    /// What is printed for containerd: where the shim listens, and what it speaks.
    pub(crate) fn answer(&self, socket: &str) -> Vec<u8> {
        let address = address(socket);
        if !self.by_message {
            let answer = serde_json::json!({ "version": TASK_V2, "address": address, "protocol": "ttrpc" });
            return answer.to_string().into_bytes();
        }
        let result = BootstrapResult { version: TASK_V3, address, protocol: "ttrpc".to_owned(), ..Default::default() };
        // Fails only where a required field is missing, which proto3 does not have.
        result.write_to_bytes().unwrap_or_default()
    }
}

/// A socket as containerd names it.
pub(crate) fn address(socket: &str) -> String {
    format!("unix://{socket}")
}

/// The path of a pod's socket, as containerd's own shim names it.
fn socket_path(dir: &str, grpc_address: &str, namespace: &str, group: &str) -> String {
    let place = std::path::Path::new(grpc_address).join(namespace).join(group);
    let digest = Sha256::digest(place.as_os_str().as_encoded_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}/{hex}", dir.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use protobuf::well_known_types::any::Any;

    use super::*;

    fn flags() -> Flags {
        Flags {
            id: "abc".into(),
            namespace: "k8s.io".into(),
            address: "/run/containerd/containerd.sock".into(),
            ..Flags::default()
        }
    }

    fn environment(name: &str) -> Option<String> {
        (name == "TTRPC_ADDRESS").then(|| "/env.ttrpc".to_owned())
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/message.ttrpc".into(),
            ..Default::default()
        }
    }

    #[test]
    fn without_a_message_the_environment_counts_and_the_answer_is_version_2() {
        let start = parse(&[], &flags(), environment).unwrap();
        assert_eq!((start.ttrpc_address.as_str(), start.by_message), ("/env.ttrpc", false));
        let answer: serde_json::Value = serde_json::from_slice(&start.answer("/s/x")).unwrap();
        assert_eq!(answer["version"], 2);
        assert_eq!(answer["address"], "unix:///s/x");
    }

    #[test]
    fn a_message_counts_and_the_answer_is_version_3() {
        let start = parse(&params().write_to_bytes().unwrap(), &flags(), environment).unwrap();
        assert_eq!((start.ttrpc_address.as_str(), start.by_message), ("/message.ttrpc", true));
        let answer = BootstrapResult::parse_from_bytes(&start.answer("/s/x")).unwrap();
        assert_eq!((answer.version, answer.address.as_str()), (3, "unix:///s/x"));
    }

    #[test]
    fn a_message_for_another_shim_is_refused() {
        let other = BootstrapParams { instance_id: "other".into(), ..params() };
        let error = parse(&other.write_to_bytes().unwrap(), &flags(), environment).unwrap_err();
        assert!(matches!(error, BootstrapError::Mismatch { .. }));
    }

    #[test]
    fn options_of_older_versions_are_not_taken_for_a_message() {
        let options = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![1, 2], ..Default::default() };
        let start = parse(&options.write_to_bytes().unwrap(), &flags(), environment).unwrap();
        assert!(!start.by_message);
    }

    #[test]
    fn without_an_address_for_events_nothing_starts() {
        assert!(matches!(parse(&[], &flags(), |_| None), Err(BootstrapError::NoAddress)));
    }

    #[test]
    fn sockets_are_named_as_containerds_own_shim_names_them() {
        let path = socket_path("/run/containerd/s", "/run/containerd/containerd.sock", "default", "123");
        assert_eq!(path, "/run/containerd/s/0ddfbd72d02b3551e75f3a0ed90b9965b533401be618f43a568bc522764e0ad0");
        assert!(path.len() <= 106);
    }

    proptest! {
        #[test]
        fn no_input_makes_the_parser_panic(input in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&input, &flags(), environment);
        }
    }
}
