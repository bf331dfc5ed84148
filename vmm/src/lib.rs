//! Hull's virtual machine monitor: one process, one virtual machine.
//!
//! [`config`] checks what the caller wants, [`vm`] builds and runs it. A VM is made of [`memory`] with a kernel in it
//! ([`loader`], [`arch`]), virtual CPUs ([`vcpu`]) under [`kvm`], and a [`board`] of devices: [`virtio`] devices on a
//! [`pci`] bus, and a few [`legacy`] ports.
//!
//! Threads: the main thread owns the VM's state ([`vm::driver`]); each vCPU has one; devices that never block share one
//! ([`event_loop`]), others have their own. All of them run in the [`jail`].

pub mod arch;
pub mod args;
pub mod board;
pub mod config;
pub mod event_loop;
pub mod jail;
pub mod kvm;
pub mod legacy;
pub mod loader;
pub mod log;
pub mod memory;
pub mod outcome;
pub mod pci;
pub mod probe;
pub mod vcpu;
pub mod virtio;
pub mod vm;
