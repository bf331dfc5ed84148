//! Runs those hooks of a container that belong to no step of libcontainer's creation.

use libcontainer::container::{Container, ContainerStatus};
use libcontainer::hooks::run_hooks;
use oci_spec::runtime::Spec;

use super::message::{HookKind, HookRequest};
use crate::error::{Error, Result, Step, chain};

pub(super) fn run(request: &HookRequest) -> Result<()> {
    let spec = Spec::load(request.bundle.join("config.json")).step("read the specification")?;
    let hooks = spec.hooks().as_ref();
    let (hooks, status) = match request.kind {
        HookKind::Poststart => (hooks.and_then(|hooks| hooks.poststart().as_ref()), ContainerStatus::Running),
        HookKind::Poststop => (hooks.and_then(|hooks| hooks.poststop().as_ref()), ContainerStatus::Stopped),
    };
    let mut container =
        Container::load(request.state.join(&request.container_id)).step("read the container's state")?;
    container.set_status(status);
    run_hooks(hooks, Some(&container.state), Some(&request.bundle), None, None)
        .map_err(|error| Error::failed(format!("run the hooks of {:?}", request.kind), chain(&error)))
}
