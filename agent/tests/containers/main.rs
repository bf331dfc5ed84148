//! Containers, for real, through an agent on this machine. Needs root and cgroup version 2, as `lab/run` gives them
//! (docs/lab.md), and skips itself elsewhere.

mod fixture;
mod operations;
mod specification;
