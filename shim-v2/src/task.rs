//! The task service: containerd's requests to the pod's operations, and their results to answers.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
    ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;

use crate::error::Error;
use crate::events::{any, timestamp};
use crate::pod::{Create, Pod};
use crate::process::Phase;
use crate::streams::Stdio;

/// The pod's task service.
#[derive(Debug)]
pub(crate) struct TaskService(pub(crate) Arc<Pod>);

type Answer<T> = ttrpc::Result<T>;

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        let process = self.0.process(&request.id, &request.exec_id)?;
        let mut response = StateResponse {
            id: request.id.clone(),
            bundle: self.0.bundle(&request.id)?,
            pid: self.0.pid(),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exec_id: request.exec_id,
            ..Default::default()
        };
        let status = match process.phase() {
            Phase::Created => Status::CREATED,
            Phase::Running => Status::RUNNING,
            Phase::Paused => Status::PAUSED,
            Phase::Stopped(exit) => {
                response.exit_status = exit.code;
                response.exited_at = MessageField::some(timestamp(exit.at));
                Status::STOPPED
            }
        };
        response.status = status.into();
        Ok(response)
    }

    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Invalid("a container cannot be created from a checkpoint".into()).into());
        }
        let create = Create {
            id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            stdio: Stdio {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            },
        };
        let pod = self.0.clone();
        let pid = detached(async move { pod.create(create).await }).await.map_err(|error| match error {
            // UNIMPLEMENTED would make containerd go back to the version before, as if the method were not there.
            Error::Unsupported(what) => Error::Invalid(what),
            error => error,
        })?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        let pod = self.0.clone();
        let pid = detached(async move { pod.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        let pod = self.0.clone();
        let (pid, exit) = detached(async move { pod.delete(&request.id, &request.exec_id).await }).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.code,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        let processes = self.0.pids(&request.id).await?.into_iter().map(|listed| {
            let details = ProcessDetails { exec_id: listed.exec_id.clone(), ..Default::default() };
            let info = if listed.exec_id.is_empty() { None } else { Some(any(&details)) };
            ProcessInfo { pid: listed.pid, info: info.into(), ..Default::default() }
        });
        Ok(PidsResponse { processes: processes.collect(), ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<Empty> {
        let pod = self.0.clone();
        detached(async move { pod.set_paused(&request.id, true).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<Empty> {
        let pod = self.0.clone();
        detached(async move { pod.set_paused(&request.id, false).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Answer<Empty> {
        Err(Error::Unsupported("a container in a virtual machine cannot be checkpointed".into()).into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        let pod = self.0.clone();
        detached(async move { pod.kill(&request.id, &request.exec_id, request.signal, request.all).await }).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        let stdio =
            Stdio { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        self.0.exec(&request.id, &request.exec_id, stdio, &request.spec.get_or_default().value)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        self.0.resize(&request.id, &request.exec_id, request.width, request.height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        if request.stdin {
            self.0.close_input(&request.id, &request.exec_id)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Answer<Empty> {
        let pod = self.0.clone();
        detached(async move { pod.update(&request.id, &request.resources.get_or_default().value).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        let exit = self.0.process(&request.id, &request.exec_id)?.wait().await;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let metrics = self.0.stats(&request.id).await?;
        Ok(StatsResponse { stats: MessageField::some(any(&metrics)), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> Answer<ConnectResponse> {
        let (shim_pid, task_pid) = (std::process::id(), self.0.pid());
        Ok(ConnectResponse { shim_pid, task_pid, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Answer<Empty> {
        let pod = self.0.clone();
        detached(async move {
            pod.shutdown().await;
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }
}

/// Runs an operation to its end even if the caller goes away meanwhile: half of one is nothing that anybody could repair.
async fn detached<T: Send + 'static>(
    operation: impl Future<Output = crate::error::Result<T>> + Send + 'static,
) -> crate::error::Result<T> {
    match tokio::spawn(operation).await {
        Ok(outcome) => outcome,
        Err(error) => Err(Error::State(format!("the operation broke off: {error}"))),
    }
}
