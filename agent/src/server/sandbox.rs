//! The sandbox service.

use async_trait::async_trait;
use hull_protocol::VERSION;
use hull_protocol::agent::{
    AddDeviceRequest, AddDeviceResponse, CreateSandboxRequest, Empty, HandshakeRequest, HandshakeResponse, Network,
    NextEventsRequest, NextEventsResponse, OnlineCpusRequest, OnlineCpusResponse, RemoveDeviceRequest, ReseedRequest,
    SandboxStatsResponse, SetTimeRequest,
};
use hull_protocol::agent_ttrpc::SandboxService;
use protobuf::MessageField;
use tokio::task::spawn_blocking;
use ttrpc::r#async::TtrpcContext;

use super::{Services, convert, detached, network};
use crate::error::{Error, Step};
use crate::{cpus, devices, sandbox};

#[async_trait]
impl SandboxService for Services {
    async fn handshake(&self, _: &TtrpcContext, request: HandshakeRequest) -> ttrpc::Result<HandshakeResponse> {
        let (major, minor) = VERSION;
        if request.major != major {
            let reason =
                format!("the host speaks version {}.{}, the agent {major}.{minor}", request.major, request.minor);
            return Err(Error::State(reason).into());
        }
        Ok(HandshakeResponse {
            major,
            minor,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
            ready_us: self.sandbox.ready_us,
            ..Default::default()
        })
    }

    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> ttrpc::Result<Empty> {
        let sandbox = self.sandbox.clone();
        let request = sandbox::CreateRequest {
            hostname: request.hostname,
            time_ns: request.time_ns,
            entropy: request.entropy,
            storages: convert::storages(request.storages)?,
            sysctls: request.sysctls,
            network: request.network.into_option().map(network::network).transpose()?,
        };
        detached(async move { sandbox.create(request).await }).await?;
        Ok(Empty::new())
    }

    async fn update_network(&self, _: &TtrpcContext, request: Network) -> ttrpc::Result<Empty> {
        let (sandbox, network) = (self.sandbox.clone(), network::network(request)?);
        detached(async move { sandbox.update_network(network).await }).await?;
        Ok(Empty::new())
    }

    async fn add_device(&self, _: &TtrpcContext, request: AddDeviceRequest) -> ttrpc::Result<AddDeviceResponse> {
        let node = devices::add(&request.pci_address.parse()?).await?.unwrap_or_default();
        let (major, minor) = if node.is_empty() { (0, 0) } else { devices::number(&node)? };
        Ok(AddDeviceResponse { device_path: node, major, minor, ..Default::default() })
    }

    async fn remove_device(&self, _: &TtrpcContext, request: RemoveDeviceRequest) -> ttrpc::Result<Empty> {
        devices::remove(&request.pci_address.parse()?).await?;
        Ok(Empty::new())
    }

    async fn online_cpus(&self, _: &TtrpcContext, request: OnlineCpusRequest) -> ttrpc::Result<OnlineCpusResponse> {
        let online = spawn_blocking(move || cpus::set_online(request.count)).await.step("switch CPUs").flatten()?;
        Ok(OnlineCpusResponse { online, ..Default::default() })
    }

    async fn set_time(&self, _: &TtrpcContext, request: SetTimeRequest) -> ttrpc::Result<Empty> {
        sandbox::set_time(request.time_ns)?;
        Ok(Empty::new())
    }

    async fn reseed(&self, _: &TtrpcContext, request: ReseedRequest) -> ttrpc::Result<Empty> {
        sandbox::reseed(&request.entropy)?;
        Ok(Empty::new())
    }

    async fn sandbox_stats(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<SandboxStatsResponse> {
        let stats = sandbox::stats()?;
        Ok(SandboxStatsResponse {
            memory_total_bytes: stats.memory_total_bytes,
            memory_available_bytes: stats.memory_available_bytes,
            memory_free_bytes: stats.memory_free_bytes,
            memory_inactive_file_bytes: stats.memory_inactive_file_bytes,
            cpus_online: stats.cpus_online,
            load_1m_milli: stats.load_1m_milli,
            uptime_ms: stats.uptime_ms,
            containers: self.containers.count() as u32,
            agent_resident_bytes: stats.agent_resident_bytes,
            of_containers: MessageField::some(convert::stats(self.containers.total()?)),
            ..Default::default()
        })
    }

    async fn next_events(&self, _: &TtrpcContext, request: NextEventsRequest) -> ttrpc::Result<NextEventsResponse> {
        let (events, lost) = self.containers.events.after(request.after).await;
        let events = events.into_iter().map(convert::event).collect();
        Ok(NextEventsResponse { events, lost, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let services = self.clone();
        tokio::spawn(async move { services.sandbox.shut_down(&services.containers).await });
        Ok(Empty::new())
    }
}
