//! Containers, for real, through an agent on this machine. Needs root and cgroup version 2, as `lab/run` gives them
//! (docs/lab.md), and skips itself elsewhere; `tests/run` runs it in the lab, where it may not.

mod fixture;
mod operations;
mod specification;
