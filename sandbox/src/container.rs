//! A container of a running sandbox, and the processes in it.
//!
//! A [`Process`] needs no more than a connection to the agent, so that a process other than the sandbox's owner can exec, signal
//! and wait.

use std::os::unix::net::UnixStream;

use hull_protocol::agent::{
    ContainerRequest, ContainerStatsResponse, CreateContainerRequest, ExecProcessRequest, ExitStatus, File, Io,
    ListPidsResponse, MemoryVolume, ProcessRequest, ResizeTtyRequest, SignalProcessRequest, Storage,
    UpdateContainerRequest, UpdateFilesRequest, WindowSize,
};
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec, Spec};

use crate::agent::{Agent, AgentError, answer, endless, long, short};
use crate::vsock::open_stream;

/// Which standard streams a process gets; the others are `/dev/null`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// A terminal of the given size.
    Terminal {
        /// Columns of the window, 0 where not known.
        columns: u16,
        /// Rows of the window, 0 where not known.
        rows: u16,
    },
    /// Up to three pipes.
    Pipes {
        /// Whether standard input is one of them.
        stdin: bool,
    },
}

/// What the guest is to do for a container before it is created, besides what the specification says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Setup {
    /// The container's own, mounted in this order.
    pub storages: Vec<Storage>,
    /// Its views of volumes in the guest's memory.
    pub volumes: Vec<MemoryVolume>,
    /// Whom its first process runs as, `USER[:GROUP]`, where the guest is to look that up; else empty.
    pub user: String,
}

/// The host's ends of a process's streams.
#[derive(Debug, Default)]
pub struct Connections {
    /// To standard input: half-closing it is the program's end of file.
    pub stdin: Option<UnixStream>,
    /// From standard output; with a terminal, both directions of it.
    pub stdout: Option<UnixStream>,
    /// From standard error.
    pub stderr: Option<UnixStream>,
}

/// One process of a container, by its names.
#[derive(Clone, Debug)]
pub struct Process {
    agent: Agent,
    container_id: String,
    /// Empty for the first process.
    exec_id: String,
    pid: Option<u32>,
}

impl Process {
    /// The first process of a container that exists.
    #[must_use]
    pub fn init(agent: &Agent, container_id: &str) -> Self {
        Self { agent: agent.clone(), container_id: container_id.to_owned(), exec_id: String::new(), pid: None }
    }

    /// Its number in the guest, where [`Process::create`] has answered this value.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Creates a container from `spec`, whose paths are the guest's. Its program does not run
    /// before [`Process::start`].
    ///
    /// # Errors
    ///
    /// Fails where a stream cannot be opened or the agent refuses the specification.
    pub async fn create(
        agent: &Agent,
        container_id: &str,
        spec: &Spec,
        streams: Streams,
        setup: Setup,
    ) -> Result<(Self, Connections), AgentError> {
        let (io, connections) = open_streams(agent, streams).await?;
        let request = CreateContainerRequest {
            container_id: container_id.to_owned(),
            spec: json(spec)?,
            io: Some(io).into(),
            storages: setup.storages,
            volumes: setup.volumes,
            user: setup.user,
            ..Default::default()
        };
        let created = answer("CreateContainer", agent.container.create_container(long(), &request).await)?;
        Ok((Self { pid: Some(created.pid), ..Self::init(agent, container_id) }, connections))
    }

    /// Starts another process in a container, as the specification's user or, unless that is empty, as this one, whom the guest looks
    /// up.
    ///
    /// # Errors
    ///
    /// Fails where a stream cannot be opened, the container does not run, or the program cannot be started.
    pub async fn exec(
        agent: &Agent,
        container_id: &str,
        exec_id: &str,
        process: &ProcessSpec,
        streams: Streams,
        user: &str,
    ) -> Result<(Self, Connections), AgentError> {
        let (io, connections) = open_streams(agent, streams).await?;
        let request = ExecProcessRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            process: json(process)?,
            io: Some(io).into(),
            user: user.to_owned(),
            ..Default::default()
        };
        answer("ExecProcess", agent.container.exec_process(long(), &request).await)?;
        let process = Self { exec_id: exec_id.to_owned(), ..Self::init(agent, container_id) };
        Ok((process, connections))
    }

    /// Makes one of the container's own file systems hold these files and no others.
    ///
    /// # Errors
    ///
    /// Fails where the container is gone or the files have no room.
    pub async fn update_files(&self, mount_point: &str, files: Vec<File>) -> Result<(), AgentError> {
        let request = UpdateFilesRequest {
            container_id: self.container_id.clone(),
            mount_point: mount_point.to_owned(),
            files,
            ..Default::default()
        };
        answer("UpdateFiles", self.agent.container.update_files(long(), &request).await).map(drop)
    }

    /// Lets the program of a created container run.
    ///
    /// # Errors
    ///
    /// Fails where the program does not exist or has been started already.
    pub async fn start(&self) -> Result<(), AgentError> {
        answer("StartContainer", self.agent.container.start_container(long(), &self.container()).await).map(drop)
    }

    /// Waits for the process's end.
    ///
    /// # Errors
    ///
    /// Fails where the guest ends first.
    pub async fn wait(&self) -> Result<ExitStatus, AgentError> {
        let response = answer("WaitProcess", self.agent.container.wait_process(endless(), &self.names()).await)?;
        Ok(response.status.unwrap_or_default())
    }

    /// Sends a signal to the process, or to all of the container's.
    ///
    /// # Errors
    ///
    /// Fails where the process has ended.
    pub async fn signal(&self, signal: u32, all: bool) -> Result<(), AgentError> {
        let request = SignalProcessRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        answer("SignalProcess", self.agent.container.signal_process(short(), &request).await).map(drop)
    }

    /// Tells the process's terminal its window's size.
    ///
    /// # Errors
    ///
    /// Fails where the process has no terminal.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<(), AgentError> {
        let request = ResizeTtyRequest {
            container_id: self.container_id.clone(),
            exec_id: self.exec_id.clone(),
            size: Some(window_size(columns, rows)).into(),
            ..Default::default()
        };
        answer("ResizeTty", self.agent.container.resize_tty(short(), &request).await).map(drop)
    }

    /// Has the agent forget the process, or the container of a first process.
    ///
    /// # Errors
    ///
    /// Fails where it has not ended.
    pub async fn remove(&self) -> Result<(), AgentError> {
        answer("RemoveContainer", self.agent.container.remove_container(short(), &self.names()).await).map(drop)
    }

    /// What the container uses.
    ///
    /// # Errors
    ///
    /// Fails where the container is unknown.
    pub async fn stats(&self) -> Result<ContainerStatsResponse, AgentError> {
        answer("ContainerStats", self.agent.container.container_stats(short(), &self.container()).await)
    }

    /// The container's processes, as the guest numbers them.
    ///
    /// # Errors
    ///
    /// Fails where the container is unknown.
    pub async fn pids(&self) -> Result<ListPidsResponse, AgentError> {
        answer("ListPids", self.agent.container.list_pids(short(), &self.container()).await)
    }

    /// Changes the container's limits.
    ///
    /// # Errors
    ///
    /// Fails where the guest's kernel refuses a limit.
    pub async fn update(&self, resources: &LinuxResources) -> Result<(), AgentError> {
        let request = UpdateContainerRequest {
            container_id: self.container_id.clone(),
            resources: json(resources)?,
            ..Default::default()
        };
        answer("UpdateContainer", self.agent.container.update_container(short(), &request).await).map(drop)
    }

    /// Freezes the container's processes, or thaws them.
    ///
    /// # Errors
    ///
    /// Fails where the container does not run.
    pub async fn set_paused(&self, paused: bool) -> Result<(), AgentError> {
        let client = &self.agent.container;
        if paused {
            answer("PauseContainer", client.pause_container(short(), &self.container()).await).map(drop)
        } else {
            answer("ResumeContainer", client.resume_container(short(), &self.container()).await).map(drop)
        }
    }

    fn container(&self) -> ContainerRequest {
        ContainerRequest { container_id: self.container_id.clone(), ..Default::default() }
    }

    fn names(&self) -> ProcessRequest {
        ProcessRequest { container_id: self.container_id.clone(), exec_id: self.exec_id.clone(), ..Default::default() }
    }
}

fn window_size(columns: u16, rows: u16) -> WindowSize {
    WindowSize { columns: columns.into(), rows: rows.into(), ..Default::default() }
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>, AgentError> {
    serde_json::to_vec(value).map_err(|error| AgentError::Io(error.into()))
}

async fn open_streams(agent: &Agent, streams: Streams) -> Result<(Io, Connections), AgentError> {
    let socket = agent.socket().to_owned();
    // Connecting blocks on the guest for a moment; the runtime's thread has others to serve.
    let opened = tokio::task::spawn_blocking(move || {
        let mut io = Io::default();
        let mut connections = Connections::default();
        let open = |token: &mut Vec<u8>, connection: &mut Option<UnixStream>| {
            let (stream, secret) = open_stream(&socket)?;
            *token = secret.to_vec();
            *connection = Some(stream);
            Ok::<(), AgentError>(())
        };
        match streams {
            Streams::Terminal { columns, rows } => {
                io.terminal = true;
                io.size = Some(window_size(columns, rows)).into();
                open(&mut io.stdout, &mut connections.stdout)?;
            }
            Streams::Pipes { stdin } => {
                if stdin {
                    open(&mut io.stdin, &mut connections.stdin)?;
                }
                open(&mut io.stdout, &mut connections.stdout)?;
                open(&mut io.stderr, &mut connections.stderr)?;
            }
        }
        Ok((io, connections))
    });
    opened.await.map_err(|error| AgentError::Io(error.into()))?
}
