//! What the system call filter ([`crate::jail::filter`]) allows on this architecture alone.

/// System calls under their names here.
pub const ALLOWED: &[libc::c_long] = &[libc::SYS_epoll_wait, libc::SYS_poll];

/// Requests to KVM (linux/kvm.h): those of a running VM, and those by which a device is added to one.
pub const IOCTLS: &[u32] = &[
    0xae80,      // KVM_RUN
    0x4008_ae6a, // KVM_SET_GSI_ROUTING
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x8090_ae81, // KVM_GET_REGS, to say where KVM gave up
];
