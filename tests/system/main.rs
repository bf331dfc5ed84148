//! Whole-system tests, one file per feature. `tests/run` runs them, here or in the lab.

mod bad_input;
mod boot;
mod cni;
mod containerd;
mod containers;
mod contract;
mod cri;
mod disks;
mod durability;
mod exec;
mod isolation;
mod lifecycle;
mod locks;
mod memory;
mod mounts;
mod network;
mod output;
mod posix;
mod pull;
mod roots;
mod settings;
mod snapshotters;
mod streams;
mod tty;
mod user_net;
mod volumes;
