//! The x86-64 board: addresses, ACPI tables, and the state in which its processors start.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod filter;
pub mod layout;
pub mod registers;
