//! The agent in the guest, as a caller on the host sees it.
//!
//! Every call has a time limit but those that wait for the guest's program, and every text that comes back is made
//! printable here, in one place.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hull_protocol::agent::{HandshakeRequest, HandshakeResponse};
use hull_protocol::agent_ttrpc::{ContainerServiceClient, SandboxServiceClient};
use hull_protocol::{AGENT_PORT, VERSION};
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};

use crate::console::printable;
use crate::vsock::{self, VsockError};

/// How long the agent may take for what does not wait for a program of the user's.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may take for creating a container, which runs the image's hooks and mounts its volumes.
const CREATE_TIMEOUT: Duration = Duration::from_secs(120);

/// A call that the agent did not carry out.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No connection to the agent.
    #[error(transparent)]
    Connect(#[from] VsockError),
    /// The connection cannot be used.
    #[error("cannot use the connection to the guest's agent: {0}")]
    Io(#[source] std::io::Error),
    /// The agent speaks another protocol.
    #[error("the guest's agent speaks protocol {theirs}, this hull {ours}; install both from the same release")]
    Version {
        /// The agent's version.
        theirs: String,
        /// The host's version.
        ours: String,
    },
    /// The agent refused.
    #[error("{message}")]
    Refused {
        /// The gRPC status code.
        code: ttrpc::Code,
        /// The agent's words.
        message: String,
    },
    /// The agent did not answer in time, or the connection broke.
    #[error("the guest's agent does not answer ({call}): {reason}")]
    Silent {
        /// The call.
        call: &'static str,
        /// What came instead of an answer.
        reason: String,
    },
}

impl AgentError {
    /// Whether the agent knows no such container or process.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: ttrpc::Code::NOT_FOUND, .. })
    }
}

/// A connection to the agent.
#[derive(Clone)]
pub struct Agent {
    pub(crate) sandbox: SandboxServiceClient,
    pub(crate) container: ContainerServiceClient,
    socket: PathBuf,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Agent {
    /// Connects to the agent through the VMM's socket at `socket` and agrees on a version.
    ///
    /// # Errors
    ///
    /// Fails where the guest does not listen, does not answer, or speaks another version.
    pub async fn connect(socket: &Path) -> Result<(Self, HandshakeResponse), AgentError> {
        let path = socket.to_owned();
        let stream = tokio::task::spawn_blocking(move || vsock::connect(&path, AGENT_PORT))
            .await
            .map_err(|error| AgentError::Io(error.into()))??;
        stream.set_nonblocking(true).map_err(AgentError::Io)?;
        let stream = tokio::net::UnixStream::from_std(stream).map_err(AgentError::Io)?;
        let agent = Self::over(stream, socket);
        let request = HandshakeRequest { major: VERSION.0, minor: VERSION.1, ..Default::default() };
        let answer = answer("Handshake", agent.sandbox.handshake(short(), &request).await)?;
        if answer.major != VERSION.0 {
            return Err(AgentError::Version {
                theirs: format!("{}.{}", answer.major, answer.minor),
                ours: format!("{}.{}", VERSION.0, VERSION.1),
            });
        }
        Ok((agent, answer))
    }

    /// The agent at the other end of this stream, which nothing is known of yet. In a tokio runtime.
    pub(crate) fn over(stream: tokio::net::UnixStream, socket: &Path) -> Self {
        let client = Client::new(Socket::new(stream));
        Self {
            sandbox: SandboxServiceClient::new(client.clone()),
            container: ContainerServiceClient::new(client),
            socket: socket.to_owned(),
        }
    }

    /// The VMM's socket, for opening streams.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks for the guest's own figures.
    ///
    /// # Errors
    ///
    /// As every call: [`AgentError::Silent`] or [`AgentError::Refused`].
    pub async fn stats(&self) -> Result<hull_protocol::agent::SandboxStatsResponse, AgentError> {
        answer("SandboxStats", self.sandbox.sandbox_stats(short(), &Default::default()).await)
    }

    /// Brings the guest's CPUs online, or takes them offline, until `count` are online; answers how many are.
    ///
    /// # Errors
    ///
    /// As every call: [`AgentError::Silent`] or [`AgentError::Refused`].
    pub async fn online_cpus(&self, count: u32) -> Result<u32, AgentError> {
        let request = hull_protocol::agent::OnlineCpusRequest { count, ..Default::default() };
        answer("OnlineCpus", self.sandbox.online_cpus(short(), &request).await).map(|answer| answer.online)
    }

    /// Makes the guest's network into this one.
    pub(crate) async fn update_network(&self, network: &hull_protocol::agent::Network) -> Result<(), AgentError> {
        answer("UpdateNetwork", self.sandbox.update_network(short(), network).await).map(drop)
    }

    /// Waits until something has happened in the guest after event number `after`, 0 for none.
    ///
    /// # Errors
    ///
    /// Fails where the guest ends first.
    pub async fn next_events(&self, after: u64) -> Result<hull_protocol::agent::NextEventsResponse, AgentError> {
        let request = hull_protocol::agent::NextEventsRequest { after, ..Default::default() };
        answer("NextEvents", self.sandbox.next_events(endless(), &request).await)
    }

    /// Asks the guest to write everything back and power off.
    ///
    /// # Errors
    ///
    /// As every call: [`AgentError::Silent`] or [`AgentError::Refused`].
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        answer("Shutdown", self.sandbox.shutdown(short(), &Default::default()).await).map(drop)
    }
}

/// A context for a call that must be answered soon.
pub(crate) fn short() -> Context {
    with_duration(CALL_TIMEOUT)
}

/// A context for creating a container or process.
pub(crate) fn long() -> Context {
    with_duration(CREATE_TIMEOUT)
}

/// A context for a call that is answered when something happens.
pub(crate) fn endless() -> Context {
    Context { timeout_nano: 0, ..Default::default() }
}

/// Turns what ttrpc says of a call into what the caller can act on.
pub(crate) fn answer<T>(call: &'static str, result: ttrpc::Result<T>) -> Result<T, AgentError> {
    result.map_err(|error| match error {
        ttrpc::Error::RpcStatus(status) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
            AgentError::Refused { code: status.code(), message: printable(status.message()) }
        }
        other => AgentError::Silent { call, reason: printable(&other.to_string()) },
    })
}
