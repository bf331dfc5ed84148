//! A registry on a loopback address that serves what a test puts there, and misbehaves as it is told to.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

use hull_cli::image::Digest;

use crate::support::{Build, INDEX, MANIFEST};

/// A request's path and the headers that matter.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) range: Option<u64>,
    pub(crate) authorization: Option<String>,
}

/// What to answer instead of what there is.
#[derive(Clone)]
pub(crate) enum Trick {
    /// A status, with header lines and a body.
    Status(u16, String, Vec<u8>),
    /// The true body's first bytes; then the connection is closed.
    CloseAfter(usize),
    /// The true body's first bytes; then nothing more.
    StallAfter(usize),
    /// Another body, with its true length.
    Body(Vec<u8>),
    /// All of the true body, whatever range was asked for.
    IgnoreRange,
    /// A body without end and without a length.
    Endless,
    /// Wait until the test lets it go on, then do this, or serve the truth.
    Hold(Arc<Gate>, Option<Box<Trick>>),
}

/// Something that a test opens once.
#[derive(Default)]
pub(crate) struct Gate {
    /// How many wait, and whether it is open.
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Gate {
    fn wait(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |(_, open)| !*open).unwrap());
    }

    /// Waits until somebody waits.
    pub(crate) fn reached(&self) {
        drop(self.changed.wait_while(self.state.lock().unwrap(), |(waiting, _)| *waiting == 0).unwrap());
    }

    pub(crate) fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

type Rule = Box<dyn FnMut(&Request) -> Option<Trick> + Send>;

struct Shared {
    files: Mutex<HashMap<String, (String, Vec<u8>)>>,
    rule: Mutex<Rule>,
    log: Mutex<Vec<Request>>,
}

/// The registry; it ends with the test's process.
pub(crate) struct Registry {
    pub(crate) host: String,
    shared: Arc<Shared>,
}

impl Registry {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let nothing: Rule = Box::new(|_| None);
        let shared = Arc::new(Shared { files: Mutex::default(), rule: Mutex::new(nothing), log: Mutex::default() });
        let served = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = served.clone();
                // A client that goes away is no error of the registry's.
                std::thread::spawn(move || drop(serve(stream.unwrap(), &shared)));
            }
        });
        Self { host, shared }
    }

    /// Has an image under a repository and tag, and gives its manifest's digest.
    pub(crate) fn push(&self, repository: &str, tag: &str, build: &Build) -> Digest {
        let files = build.files();
        let index: serde_json::Value = serde_json::from_slice(&files.last().unwrap().1).unwrap();
        let digest: Digest = index["manifests"][0]["digest"].as_str().unwrap().parse().unwrap();
        for (name, bytes) in files {
            let Some(hex) = name.strip_prefix("blobs/sha256/") else { continue };
            if hex == digest.hex() {
                self.put_manifest(repository, tag, MANIFEST, bytes);
            } else {
                self.put(format!("/v2/{repository}/blobs/sha256:{hex}"), "application/octet-stream", bytes);
            }
        }
        digest
    }

    /// Has an index, or whatever else, where a manifest is looked for.
    pub(crate) fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: Vec<u8>) {
        let digest = Digest::of(&bytes);
        self.put(format!("/v2/{repository}/manifests/{digest}"), media_type, bytes.clone());
        self.put(format!("/v2/{repository}/manifests/{tag}"), media_type, bytes);
    }

    pub(crate) fn put_index(&self, repository: &str, tag: &str, manifests: &[serde_json::Value]) {
        self.put_manifest(repository, tag, INDEX, crate::support::index(manifests));
    }

    fn put(&self, path: String, media_type: &str, bytes: Vec<u8>) {
        self.shared.files.lock().unwrap().insert(path, (media_type.to_owned(), bytes));
    }

    /// Looks at each request first, and may answer it.
    pub(crate) fn rule(&self, rule: impl FnMut(&Request) -> Option<Trick> + Send + 'static) {
        *self.shared.rule.lock().unwrap() = Box::new(rule);
    }

    /// The requests so far for paths that contain this.
    pub(crate) fn requests(&self, part: &str) -> Vec<Request> {
        self.shared.log.lock().unwrap().iter().filter(|request| request.path.contains(part)).cloned().collect()
    }
}

fn serve(stream: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut input = BufReader::new(stream.try_clone()?);
    // What comes first of a client that tries TLS is no method.
    if !input.fill_buf()?.starts_with(b"G") {
        return stream.shutdown(Shutdown::Both);
    }
    while let Some(request) = read_request(&mut input)? {
        shared.log.lock().unwrap().push(request.clone());
        let trick = (shared.rule.lock().unwrap())(&request);
        let file = shared.files.lock().unwrap().get(&request.path).cloned();
        answer(&stream, &request, file, trick)?;
    }
    Ok(())
}

fn read_request(input: &mut impl BufRead) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if input.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut request = Request { path, range: None, authorization: None };
    loop {
        let mut line = String::new();
        input.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { return Ok(Some(request)) };
        match name.to_ascii_lowercase().as_str() {
            "range" => request.range = value.strip_prefix("bytes=").and_then(|v| v.trim_end_matches('-').parse().ok()),
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
}

fn answer(
    mut stream: &TcpStream,
    request: &Request,
    file: Option<(String, Vec<u8>)>,
    trick: Option<Trick>,
) -> std::io::Result<()> {
    let trick = match trick {
        Some(Trick::Hold(gate, then)) => {
            gate.wait();
            then.map(|then| *then)
        }
        other => other,
    };
    if let Some(Trick::Status(status, headers, body)) = trick {
        write!(stream, "HTTP/1.1 {status} x\r\n{headers}Content-Length: {}\r\n\r\n", body.len())?;
        return stream.write_all(&body);
    }
    if matches!(trick, Some(Trick::Endless)) {
        write!(stream, "HTTP/1.1 200 x\r\nConnection: close\r\n\r\n")?;
        loop {
            stream.write_all(&[b' '; 65536])?;
        }
    }
    let Some((media_type, mut body)) = file else {
        let known = request.path == "/v2/";
        return write!(stream, "HTTP/1.1 {} x\r\nContent-Length: 0\r\n\r\n", if known { 200 } else { 404 });
    };
    if let Some(Trick::Body(other)) = &trick {
        body.clone_from(other);
    }
    let range = request.range.filter(|_| !matches!(trick, Some(Trick::IgnoreRange)));
    let start = range.map_or(0, |start| usize::try_from(start).unwrap().min(body.len()));
    let (status, extra) = match range {
        Some(_) => (206, format!("Content-Range: bytes {start}-{}/{}\r\n", body.len() - 1, body.len())),
        None => (200, String::new()),
    };
    let body = &body[start..];
    let length = body.len();
    write!(stream, "HTTP/1.1 {status} x\r\nContent-Type: {media_type}\r\n{extra}Content-Length: {length}\r\n\r\n")?;
    match trick {
        Some(Trick::CloseAfter(bytes)) => {
            stream.write_all(&body[..bytes.min(length)])?;
            stream.shutdown(Shutdown::Both)
        }
        Some(Trick::StallAfter(bytes)) => {
            stream.write_all(&body[..bytes.min(length)])?;
            // Until the client has had enough.
            stream.read(&mut [0]).map(drop)
        }
        _ => stream.write_all(body),
    }
}
