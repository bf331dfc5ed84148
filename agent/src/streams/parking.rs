//! Connections on the stream port, between their token and the request that claims them.
//!
//! ```text
//! accepted ──token──▶ parked ──claim──▶ handed over
//!     │                 │
//!     └── too late or too many: closed
//! ```
//!
//! A claim may also come first and wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_protocol::STREAM_TOKEN_BYTES;
use tokio::io::AsyncReadExt as _;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::BoxedConnection;
use crate::error::{Error, Result};

/// What the host names a stream by.
pub(crate) type Token = [u8; STREAM_TOKEN_BYTES];

/// How long a create waits for its streams, and a connection may take to send its token.
pub(crate) const CLAIM_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection is kept unclaimed: longer than the host can take between opening it and asking for it.
const PARK_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections without a claim at a time. Three streams for each of 85 processes that start at once; each costs a
/// descriptor and a small task, so the bound keeps a host's mistake from costing the guest its descriptors.
const CAPACITY: usize = 256;

#[derive(Default)]
pub(crate) struct Parking {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Connections accepted and not handed over.
    count: usize,
    /// The connections that have sent their tokens; the task of each waits for the claim.
    parked: HashMap<Token, oneshot::Sender<oneshot::Sender<BoxedConnection>>>,
    /// Claims that came before their connections.
    claims: HashMap<Token, oneshot::Sender<BoxedConnection>>,
}

impl Parking {
    /// Takes a new connection, or closes it where there are too many.
    pub(crate) fn park(self: &Arc<Self>, connection: BoxedConnection) {
        {
            let mut state = self.lock();
            if state.count == CAPACITY {
                tracing::warn!("too many streams without a claim");
                return;
            }
            state.count += 1;
        }
        let parking = self.clone();
        tokio::spawn(async move {
            parking.keep(connection).await;
            parking.lock().count -= 1;
        });
    }

    async fn keep(&self, mut connection: BoxedConnection) {
        let mut token = Token::default();
        match timeout(CLAIM_TIMEOUT, connection.read_exact(&mut token)).await {
            Ok(Ok(_)) => {}
            _ => return tracing::info!("a stream without a token"),
        }
        let waiting = {
            let mut state = self.lock();
            if let Some(claim) = state.claims.remove(&token) {
                let _ = claim.send(connection);
                return;
            }
            if state.parked.contains_key(&token) {
                return tracing::warn!("two streams with one token");
            }
            let (sender, waiting) = oneshot::channel();
            state.parked.insert(token, sender);
            waiting
        };
        match timeout(PARK_TIMEOUT, waiting).await {
            Ok(Ok(claim)) => {
                let _ = claim.send(connection);
            }
            Ok(Err(_)) => {}
            Err(_) => {
                self.lock().parked.remove(&token);
                tracing::warn!("a stream that nobody claimed");
            }
        }
    }

    /// The connection with the given token, for which it waits up to [`CLAIM_TIMEOUT`].
    pub(crate) async fn claim(&self, token: Token) -> Result<BoxedConnection> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut state = self.lock();
            match state.parked.remove(&token) {
                Some(parked) => {
                    if let Err(sender) = parked.send(sender) {
                        // Its time was up this very moment.
                        state.claims.insert(token, sender);
                    }
                }
                None => {
                    if state.claims.insert(token, sender).is_some() {
                        tracing::warn!("two claims of one stream");
                    }
                }
            }
        }
        let answer = timeout(CLAIM_TIMEOUT, receiver).await;
        if answer.is_err() {
            self.lock().claims.remove(&token);
        }
        match answer {
            Ok(Ok(connection)) => Ok(connection),
            _ => Err(Error::TimedOut("io: wait for the stream that the token names".into())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::UnixStream;

    use super::*;

    fn run(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(test);
    }

    async fn dial(parking: &Arc<Parking>, token: Token) -> UnixStream {
        let (mut host, guest) = UnixStream::pair().unwrap();
        parking.park(Box::new(guest));
        host.write_all(&token).await.unwrap();
        host
    }

    async fn is_closed(mut stream: UnixStream) -> bool {
        stream.read(&mut [0]).await.is_ok_and(|bytes| bytes == 0)
    }

    #[test]
    fn a_connection_goes_to_the_claim_of_its_token_whichever_is_first() {
        run(async {
            let parking = Arc::new(Parking::default());
            let claim = tokio::spawn({
                let parking = parking.clone();
                async move { parking.claim([1; 16]).await }
            });
            tokio::task::yield_now().await;
            let mut host = dial(&parking, [1; 16]).await;
            host.write_all(b"x").await.unwrap();
            let mut connection = claim.await.unwrap().unwrap();
            assert_eq!(connection.read_u8().await.unwrap(), b'x');

            let mut host = dial(&parking, [2; 16]).await;
            tokio::time::sleep(Duration::from_secs(5)).await;
            let mut connection = parking.claim([2; 16]).await.unwrap();
            connection.write_all(b"y").await.unwrap();
            assert_eq!(host.read_u8().await.unwrap(), b'y');
            tokio::task::yield_now().await;
            assert_eq!(parking.lock().count, 0);
        });
    }

    #[test]
    fn a_claim_without_a_connection_times_out() {
        run(async {
            let parking = Arc::new(Parking::default());
            assert!(matches!(parking.claim([3; 16]).await, Err(Error::TimedOut(_))));
            assert!(parking.lock().claims.is_empty());
        });
    }

    #[test]
    fn connections_without_token_or_claim_are_closed_in_time() {
        run(async {
            let parking = Arc::new(Parking::default());
            let (silent, guest) = UnixStream::pair().unwrap();
            parking.park(Box::new(guest));
            let unclaimed = dial(&parking, [4; 16]).await;
            assert!(is_closed(silent).await);
            assert!(is_closed(unclaimed).await);
            tokio::task::yield_now().await;
            assert_eq!(parking.lock().count, 0);
        });
    }

    #[test]
    fn the_number_of_unclaimed_connections_is_bounded() {
        run(async {
            let parking = Arc::new(Parking::default());
            let mut kept = Vec::new();
            for number in 0..CAPACITY {
                let mut token = Token::default();
                token[..8].copy_from_slice(&number.to_le_bytes());
                kept.push(dial(&parking, token).await);
            }
            let (one_more, guest) = UnixStream::pair().unwrap();
            parking.park(Box::new(guest));
            assert!(is_closed(one_more).await);
        });
    }
}
