//! The virtual machine as a whole.
//!
//! ```text
//! Settings ──build──▶ Machine ──run──▶ Outcome
//! ```
//!
//! * [`build`] puts the parts together, vCPUs waiting.
//! * [`machine`] is the VM: what can be done to it. All changes are made by the main thread.
//! * [`driver`] is the main thread: it waits for control requests, signals, the caller's death and the VM's end.
//! * [`control`] is the wire side of the control protocol.

pub mod build;
pub mod control;
pub mod driver;
pub mod machine;
