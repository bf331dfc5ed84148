//! Moves bytes from a reader to a writer: in order, all of them, no faster than they are taken.
//!
//! A stream that rests holds no buffer. While the writer keeps up, bytes pass through one scratch buffer that all
//! streams share (the agent is single-threaded, and nothing else runs between a read and the write that follows);
//! only what the writer does not take at once is set aside, and then nothing more is read.

use std::cell::RefCell;
use std::future::poll_fn;

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes moved at a time: a pipe's capacity, and as much as a virtio-vsock packet carries.
const CHUNK_BYTES: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK_BYTES]);
}

/// Why a [`Pump`] stopped.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The reader ended and everything has been written.
    End,
    Read,
    Write,
}

/// One direction of a stream.
#[derive(Default)]
pub(crate) struct Pump {
    /// What has been read and not been written.
    rest: Vec<u8>,
    written: usize,
}

impl Pump {
    /// Moves bytes until the reader ends or either side fails. Can be dropped and called again without losing any.
    pub(crate) async fn run(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin + ?Sized),
        writer: &mut (impl AsyncWrite + Unpin + ?Sized),
    ) -> Stop {
        poll_fn(|context| self.poll(context, reader, writer)).await
    }

    /// Moves what is there to read already, and waits for none.
    pub(crate) async fn drain(
        &mut self,
        reader: &mut (impl AsyncRead + Unpin + ?Sized),
        writer: &mut (impl AsyncWrite + Unpin + ?Sized),
    ) {
        // What has arrived is not known to be there before the runtime has asked the kernel.
        tokio::task::yield_now().await;
        poll_fn(|context| match self.poll(context, reader, writer) {
            Poll::Pending if !self.rest.is_empty() => Poll::Pending,
            _ => Poll::Ready(()),
        })
        .await;
    }

    fn poll(
        &mut self,
        context: &mut Context<'_>,
        reader: &mut (impl AsyncRead + Unpin + ?Sized),
        writer: &mut (impl AsyncWrite + Unpin + ?Sized),
    ) -> Poll<Stop> {
        loop {
            while self.written < self.rest.len() {
                match ready!(Pin::new(&mut *writer).poll_write(context, &self.rest[self.written..])) {
                    Ok(0) => return Poll::Ready(Stop::Write),
                    Ok(bytes) => self.written += bytes,
                    Err(_) => return Poll::Ready(Stop::Write),
                }
            }
            self.rest = Vec::new();
            self.written = 0;
            if let Err(stop) = ready!(self.poll_chunk(context, reader, writer)) {
                return Poll::Ready(stop);
            }
        }
    }

    /// Reads a chunk and writes as much of it as the writer takes at once. The rest is set aside.
    fn poll_chunk(
        &mut self,
        context: &mut Context<'_>,
        reader: &mut (impl AsyncRead + Unpin + ?Sized),
        writer: &mut (impl AsyncWrite + Unpin + ?Sized),
    ) -> Poll<Result<(), Stop>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            if ready!(Pin::new(reader).poll_read(context, &mut buffer)).is_err() {
                return Poll::Ready(Err(Stop::Read));
            }
            let mut chunk = buffer.filled();
            if chunk.is_empty() {
                return Poll::Ready(Err(Stop::End));
            }
            while !chunk.is_empty() {
                match Pin::new(&mut *writer).poll_write(context, chunk) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(Stop::Write)),
                    Poll::Ready(Ok(bytes)) => chunk = &chunk[bytes..],
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(Stop::Write)),
                    Poll::Pending => {
                        self.rest = chunk.to_vec();
                        return Poll::Pending;
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_byte_arrives_once_and_in_order(
            data in proptest::collection::vec(any::<u8>(), 0..300_000),
            from in 1_usize..100_000,
            to in 1_usize..100_000,
        ) {
            let arrived = run(async {
                let (mut source, mut reader) = duplex(from);
                let (mut writer, mut sink) = duplex(to);
                let expected = data.clone();
                let write = async move {
                    source.write_all(&expected).await.unwrap();
                };
                let pump = async move {
                    assert!(matches!(Pump::default().run(&mut reader, &mut writer).await, Stop::End));
                };
                let read = async move {
                    let mut arrived = Vec::new();
                    sink.read_to_end(&mut arrived).await.unwrap();
                    arrived
                };
                tokio::join!(write, pump, read).2
            });
            prop_assert_eq!(arrived, data);
        }
    }

    #[test]
    fn a_writer_that_takes_nothing_holds_the_reader_back() {
        run(async {
            let (mut source, mut reader) = duplex(1 << 20);
            let (mut writer, _sink) = duplex(16);
            source.write_all(&vec![7; 1 << 20]).await.unwrap();
            let mut pump = Pump::default();
            tokio::select! {
                biased;
                _ = pump.run(&mut reader, &mut writer) => panic!("the pump ended"),
                () = async { for _ in 0..100 { tokio::task::yield_now().await } } => {}
            }
            assert_eq!(pump.rest.len(), CHUNK_BYTES - 16);
        });
    }

    #[test]
    fn a_reader_that_is_gone_stops_the_pump_at_its_writer() {
        run(async {
            let (mut source, mut reader) = duplex(16);
            let (mut writer, sink) = duplex(16);
            drop(sink);
            source.write_all(b"x").await.unwrap();
            assert!(matches!(Pump::default().run(&mut reader, &mut writer).await, Stop::Write));
        });
    }
}
