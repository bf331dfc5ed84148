//! Standard streams: connections of their own, opened by the host, each with a token as its first bytes.
//!
//! [`parking`] keeps a connection until a create or exec claims it by its token; [`stdio`] pairs claimed connections
//! with the pipes or the terminal of a process; [`pump`] moves the bytes.

pub(crate) mod parking;
pub(crate) mod pump;
pub(crate) mod stdio;

use tokio::io::{AsyncRead, AsyncWrite};

/// A connection of any kind: vsock in a guest, a Unix socket in tests.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static> Connection for T {}

pub(crate) type BoxedConnection = Box<dyn Connection>;
