//! The system calls that the sandbox library and the shim make and no safe crate offers, behind safe functions, so that these
//! can forbid `unsafe`.

pub mod children;
pub mod mounts;
pub mod readiness;
pub mod steer;
pub mod tap;
