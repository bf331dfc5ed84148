//! The container service.

use async_trait::async_trait;
use hull_protocol::agent::{
    ContainerRequest, ContainerStatsResponse, CreateContainerRequest, CreateContainerResponse, Empty,
    ExecProcessRequest, ExecProcessResponse, ListPidsResponse, Pid, ProcessRequest, ResizeTtyRequest,
    SignalProcessRequest, UpdateContainerRequest, UpdateFilesRequest, WaitProcessResponse,
};
use hull_protocol::agent_ttrpc::ContainerService;
use ttrpc::r#async::TtrpcContext;

use std::sync::Arc;

use super::{Services, convert, detached};
use crate::container::{Container, CreateRequest};
use crate::error::Result;

impl Services {
    fn container(&self, id: &str) -> Result<Arc<Container>> {
        convert::check_id("container_id", id)?;
        self.containers.get(id)
    }

    fn container_of(&self, container_id: &str, exec_id: &str) -> Result<Arc<Container>> {
        convert::check_process_id(container_id, exec_id)?;
        self.containers.get(container_id)
    }
}

#[async_trait]
impl ContainerService for Services {
    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        convert::check_id("container_id", &request.container_id)?;
        let request = CreateRequest {
            container_id: request.container_id,
            spec: request.spec,
            io: convert::io(&request.io)?,
            storages: convert::storages(request.storages)?,
            volumes: convert::volumes(request.volumes)?,
            user: request.user,
        };
        let containers = self.containers.clone();
        let pid = detached(async move { containers.create(request).await }).await?;
        Ok(CreateContainerResponse { pid: pid.as_raw_nonzero().get() as u32, ..Default::default() })
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        detached(async move { container.start().await }).await?;
        Ok(Empty::new())
    }

    async fn exec_process(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<ExecProcessResponse> {
        convert::check_id("exec_id", &request.exec_id)?;
        let container = self.container(&request.container_id)?;
        let io = convert::io(&request.io)?;
        let parking = self.containers.parking.clone();
        let pid = detached(async move {
            let process = (request.process.as_slice(), request.user.as_str());
            container.exec(&request.exec_id, process, &io, &parking).await
        });
        let pid = pid.await?;
        Ok(ExecProcessResponse { pid: pid.as_raw_nonzero().get() as u32, ..Default::default() })
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.container_of(&request.container_id, &request.exec_id)?;
        container.signal(&request.exec_id, request.signal, request.all)?;
        Ok(Empty::new())
    }

    async fn wait_process(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitProcessResponse> {
        let container = self.container_of(&request.container_id, &request.exec_id)?;
        let status = container.wait(&request.exec_id).await?;
        Ok(WaitProcessResponse { status: Some(convert::exit_status(status)).into(), ..Default::default() })
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ContainerStatsResponse> {
        Ok(convert::stats(self.container(&request.container_id)?.stats()?))
    }

    async fn update_container(&self, _: &TtrpcContext, request: UpdateContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        detached(async move { container.update(&request.resources).await }).await?;
        Ok(Empty::new())
    }

    async fn update_files(&self, _: &TtrpcContext, request: UpdateFilesRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        let files = convert::files(request.files)?;
        detached(async move { container.update_files(request.mount_point.as_ref(), files).await }).await?;
        Ok(Empty::new())
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        detached(async move { container.pause().await }).await?;
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container_id)?;
        detached(async move { container.resume().await }).await?;
        Ok(Empty::new())
    }

    async fn list_pids(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<ListPidsResponse> {
        let pids = self.container(&request.container_id)?.pids()?;
        let pids = pids
            .into_iter()
            .map(|(pid, exec_id)| Pid { pid: pid.as_raw_nonzero().get() as u32, exec_id, ..Default::default() })
            .collect();
        Ok(ListPidsResponse { pids, ..Default::default() })
    }

    async fn resize_tty(&self, _: &TtrpcContext, request: ResizeTtyRequest) -> ttrpc::Result<Empty> {
        let container = self.container_of(&request.container_id, &request.exec_id)?;
        container.resize(&request.exec_id, convert::window_size(&request.size)?)?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.container_of(&request.container_id, &request.exec_id)?;
        container.close_stdin(&request.exec_id)?;
        Ok(Empty::new())
    }

    async fn remove_container(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        convert::check_process_id(&request.container_id, &request.exec_id)?;
        let containers = self.containers.clone();
        detached(async move { containers.remove(&request.container_id, &request.exec_id).await }).await?;
        Ok(Empty::new())
    }
}
