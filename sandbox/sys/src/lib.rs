//! The system calls that the sandbox library makes and no safe crate offers, behind safe functions, so that the library
//! itself can forbid `unsafe`.

pub mod steer;
pub mod tap;
