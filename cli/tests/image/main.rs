//! The image store from outside: honest images, hostile ones, and many processes at once.

mod finding;
mod hostile;
mod loading;
mod pulling;
mod registry;
mod sharing;
mod support;
mod transferring;
