//! The contract between `hull-vmm` and whoever starts it.
//!
//! A caller writes one [`config::VmConfig`] as JSON to the descriptor named by `--config-fd`, keeps the other end of
//! the socket named by `--control-fd` to speak [`control`], and reads the VM's fate from the process's exit status
//! ([`exit::ExitCode`]) and, for people, from its standard error.
//!
//! This is a crate of its own because the caller stands on the other side of a trust boundary: it must not link the
//! VMM to describe a VM.
#![forbid(unsafe_code)]

pub mod broker;
pub mod config;
pub mod control;
pub mod exit;
