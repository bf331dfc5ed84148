//! What depends on the processor architecture. Each architecture's module offers the same names, so that nothing
//! outside asks which one it is.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("hull-vmm runs on x86_64 only, so far");
