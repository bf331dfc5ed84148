//! The few devices at I/O ports: [`power`] (power-off and reset), [`pvpanic`] and, for debugging, [`serial`].

pub mod power;
pub mod pvpanic;
pub mod serial;
