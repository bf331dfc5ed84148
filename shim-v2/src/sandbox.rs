//! The sandbox service: for runtime handlers with `sandboxer = "shim"`.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;

use crate::events::{any, timestamp};
use crate::pod::{CreateSandbox, Pod};

/// What CRI reads as the sandbox's state.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The pod's sandbox service.
#[derive(Debug)]
pub(crate) struct SandboxService(pub(crate) Arc<Pod>);

type Answer<T> = ttrpc::Result<T>;

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> Answer<CreateSandboxResponse> {
        self.0.create_sandbox(CreateSandbox {
            id: request.sandbox_id,
            config: request.options.into_option().map(|options| options.value).unwrap_or_default(),
            network_namespace: request.netns_path,
            annotations: request.annotations,
        })?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(&self, _: &TtrpcContext, request: StartSandboxRequest) -> Answer<StartSandboxResponse> {
        let status = self.0.start_sandbox(&request.sandbox_id).await?;
        Ok(StartSandboxResponse {
            pid: status.pid,
            created_at: MessageField::some(timestamp(status.created_at)),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> Answer<PlatformResponse> {
        // Go's name of the architecture that this program, and with it the guest, is for.
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = architecture.to_owned();
        Ok(response)
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> Answer<StopSandboxResponse> {
        self.0.stop_sandbox(&request.sandbox_id).await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> Answer<WaitSandboxResponse> {
        let exit = self.0.wait_sandbox(&request.sandbox_id).await?;
        Ok(WaitSandboxResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(&self, _: &TtrpcContext, request: SandboxStatusRequest) -> Answer<SandboxStatusResponse> {
        let status = self.0.sandbox_status(&request.sandbox_id)?;
        let mut response = SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: status.pid,
            state: if status.is_ready { READY } else { NOT_READY }.to_owned(),
            created_at: MessageField::some(timestamp(status.created_at)),
            exited_at: status.exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        };
        if request.verbose {
            let info = serde_json::json!({ "pid": status.pid, "runtimeType": "io.containerd.hull.v2" });
            response.info.insert("info".to_owned(), info.to_string());
        }
        Ok(response)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, _: PingRequest) -> Answer<PingResponse> {
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> Answer<ShutdownSandboxResponse> {
        self.0.shutdown_sandbox(&request.sandbox_id).await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Answer<SandboxMetricsResponse> {
        let metrics = self.0.sandbox_metrics(&request.sandbox_id).await?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(timestamp(std::time::SystemTime::now()));
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(any(&metrics));
        Ok(response)
    }
}
