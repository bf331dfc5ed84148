//! Images pulled from a registry that behaves, and from one that does not.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_cli::image::pull::{Patience, Progress, PullError};
use hull_cli::image::{Digest, Image};
use serde_json::json;

use crate::registry::{Gate, Registry, Request, Trick};
use crate::support::*;

/// Nothing that a test waits for may take a user's patience; what must not happen has all the time in the world.
const IMPATIENT: Patience = Patience {
    connect: Duration::from_secs(20),
    idle: Duration::from_secs(20),
    attempts: 3,
    backoff: Duration::from_millis(1),
    longest_wait: Duration::from_secs(2),
    helper: Duration::from_secs(20),
};

struct Unseen;

impl Progress for Unseen {
    fn starts(&self, _: Digest, _: u64) {}
    fn has(&self, _: Digest, _: u64) {}
    fn unpacks(&self, _: Digest) {}
    fn done(&self, _: Digest) {}
}

fn pull_with(bench: &Bench, reference: &str, patience: Patience) -> Result<Image, PullError> {
    bench.store.pull(reference, None, patience, Arc::new(Unseen))
}

fn pull(bench: &Bench, registry: &Registry, name: &str) -> Result<Image, PullError> {
    pull_with(bench, &format!("{}/{name}", registry.host), IMPATIENT)
}

/// An image with a layer of each compression.
fn three_layers() -> Build {
    let layer = |name: &str| Layer::new().file(name, name.repeat(100_000)).bytes();
    Build::new().layer("+gzip", layer("a")).layer("+zstd", layer("b")).layer("", layer("c"))
}

fn one_layer() -> Build {
    Build::of([Layer::new().file("file", "x".repeat(300_000))])
}

fn is_blob(request: &Request, build: &Build) -> bool {
    build.layers.iter().any(|layer| request.path.ends_with(&Digest::of(&layer.bytes).hex()))
}

/// The registry's requests for an image's layers.
fn layer_requests(registry: &Registry, build: &Build) -> Vec<Request> {
    registry.requests("/blobs/").into_iter().filter(|request| is_blob(request, build)).collect()
}

/// The line that a refused pull ends with, all traces of which must be gone.
fn refused(bench: &Bench, registry: &Registry, name: &str) -> String {
    let error = pull(bench, registry, name).expect_err("it must be refused").to_string();
    bench.assert_nothing_left();
    assert!(!error.contains('\n'), "{error}");
    error
}

/// An answer to requests for layers, or for manifests.
fn answer(registry: &Registry, part: &'static str, trick: Trick) {
    registry.rule(move |request| request.path.contains(part).then(|| trick.clone()));
}

fn status(code: u16, headers: &str) -> Trick {
    Trick::Status(code, headers.to_owned(), b"{\"errors\":[]}".to_vec())
}

#[test]
fn a_pulled_image_is_found_by_its_reference_and_its_blobs_are_gone() {
    let (bench, registry, build) = (Bench::new(), Registry::new(), three_layers());
    let manifest = registry.push("some/app", "v1", &build);
    let image = pull(&bench, &registry, "some/app:v1").unwrap();
    let reference = format!("{}/some/app:v1", registry.host);
    assert_eq!((image.name(), image.layers().len()), (reference.as_str(), 3));
    assert_eq!(std::fs::read(image.layers()[1].join("b")).unwrap(), "b".repeat(100_000).as_bytes());
    assert_eq!(bench.store.resolve(&reference).unwrap().digest(), image.digest());
    let listed = bench.store.list().unwrap();
    assert_eq!(listed[0].manifest, Some(manifest.to_string()));
    assert_eq!(std::fs::read_dir(bench.path("store/blobs")).unwrap().count(), 0);

    // What is there is not fetched again, under whatever name.
    let before = registry.requests("/blobs/").len();
    let pinned = format!("{}/some/app@{manifest}", registry.host);
    assert_eq!(pull_with(&bench, &pinned, IMPATIENT).unwrap().digest(), image.digest());
    assert_eq!(bench.store.resolve(&pinned).unwrap().name(), pinned);
    assert_eq!(registry.requests("/blobs/").len(), before);
    bench.store.remove(&reference).unwrap();
    bench.store.remove(&pinned).unwrap();
    drop(image);
    bench.store.collect_garbage().unwrap();
    bench.assert_nothing_left();
}

#[test]
fn only_the_layers_that_are_missing_are_fetched() {
    let (bench, registry) = (Bench::new(), Registry::new());
    let base = Layer::new().file("base", "base");
    bench.load(&Build::of([base.clone()])).unwrap();
    let build = Build::of([base, Layer::new().file("top", "top")]);
    registry.push("app", "latest", &build);
    assert_eq!(pull(&bench, &registry, "app").unwrap().layers().len(), 2);
    assert_eq!(layer_requests(&registry, &build).len(), 1);
}

#[test]
fn an_index_leads_to_the_image_for_this_machine() {
    let (bench, registry, build) = (Bench::new(), Registry::new(), one_layer());
    let here = registry.push("app", "here", &build);
    let other = registry.push("app", "other", &Build::of([Layer::new().file("other", "")]));
    let entry = |digest: Digest, os: &str, architecture: &str| {
        json!({"mediaType": MANIFEST, "digest": digest.to_string(), "size": 1,
            "platform": {"os": os, "architecture": architecture}})
    };
    registry.put_index(
        "app",
        "latest",
        &[entry(other, "unknown", "unknown"), entry(other, "linux", "s390x"), entry(here, "linux", architecture())],
    );
    let image = pull(&bench, &registry, "app").unwrap();
    assert!(image.layers()[0].join("file").exists());

    let bench = Bench::new();
    registry.put_index("app", "latest", &[entry(other, "linux", "s390x"), entry(other, "windows", "amd64")]);
    let error = refused(&bench, &registry, "app");
    assert!(error.contains("linux/s390x, windows/amd64"), "{error}");
    registry.put_index("app", "latest", &[]);
    assert!(refused(&bench, &registry, "app").contains("no platform at all"));
}

#[test]
fn an_index_that_leads_to_itself_has_an_end() {
    let (bench, registry) = (Bench::new(), Registry::new());
    let mut digest = Digest::of(b"");
    for depth in 0..10 {
        let entry = json!({"mediaType": INDEX, "digest": digest.to_string(), "size": 1});
        registry.put_index("app", &depth.to_string(), std::slice::from_ref(&entry));
        digest = Digest::of(&index(&[entry]));
    }
    assert!(refused(&bench, &registry, "app:9").contains("depth of its indexes"));
}

#[test]
fn each_refusal_is_one_line_and_leaves_nothing() {
    let no_more = "Retry-After: 3600\r\n";
    let elsewhere = "Location: http://registry.example/x\r\n";
    for (part, trick, expected) in [
        (
            "/manifests/",
            status(401, ""),
            "does not let everybody pull app (401 Unauthorized): check the name, or log in",
        ),
        ("/manifests/", status(403, ""), "(403 Forbidden)"),
        ("/manifests/", status(404, ""), "latest (404 Not Found): check the name and tag"),
        ("/manifests/", status(429, no_more), "(429 Too Many Requests): try again in 3600 s"),
        ("/manifests/", status(429, ""), "(429 Too Many Requests): try again later"),
        ("/manifests/", status(500, ""), "(500 Internal Server Error): try again later"),
        ("/manifests/", status(418, ""), "(418 I'm a teapot)"),
        ("/manifests/", status(307, elsewhere), "not encrypted"),
        ("/manifests/", Trick::Body(b"<html>".to_vec()), "no valid image document"),
        ("/manifests/", Trick::Body(b"{\"mediaType\":\"x/y\"}".to_vec()), "`x/y`, which is not supported"),
        ("/manifests/", Trick::Body(vec![b' '; 5 << 20]), "above the limit"),
        ("/manifests/", Trick::Endless, "above the limit"),
        ("/manifests/", Trick::CloseAfter(10), "cannot reach the registry"),
        ("/blobs/", status(404, ""), "does not have the image's configuration (404 Not Found)"),
        ("/blobs/", status(503, ""), "(503 Service Unavailable)"),
        ("/blobs/", Trick::Body(b"{}".to_vec()), "the image's configuration should have the digest"),
        ("/blobs/", Trick::Endless, "above the limit"),
    ] {
        let (bench, registry) = (Bench::new(), Registry::new());
        registry.push("app", "latest", &one_layer());
        answer(&registry, part, trick);
        let error = refused(&bench, &registry, "app");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_layer_that_is_not_what_it_should_be_is_refused() {
    let size = one_layer().layers[0].bytes.len();
    for (trick, expected) in [
        (Trick::Body(vec![0; size]), "a layer should have the digest"),
        (Trick::Body(vec![0; size - 1]), "but the registry sends"),
        (Trick::Body(vec![0; size + 1]), "but the registry sends"),
        (Trick::Endless, "but the registry sends"),
        (Trick::CloseAfter(0), "broke off at 0 of"),
        (status(404, ""), "does not have layer sha256:"),
        (status(429, "Retry-After: 99\r\n"), "try again in 99 s"),
        (status(502, ""), "(502 Bad Gateway)"),
        (status(416, ""), "(416 Range Not Satisfiable)"),
        (status(206, ""), "(206 Partial Content)"),
    ] {
        let (bench, registry, build) = (Bench::new(), Registry::new(), one_layer());
        registry.push("app", "latest", &build);
        registry.rule(move |request| is_blob(request, &build).then(|| trick.clone()));
        let error = refused(&bench, &registry, "app");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_registry_that_falls_silent_is_given_up() {
    let (bench, registry, build) = (Bench::new(), Registry::new(), three_layers());
    registry.push("app", "latest", &build);
    registry.rule(move |request| is_blob(request, &build).then_some(Trick::StallAfter(100)));
    let patience = Patience { idle: Duration::from_millis(100), ..IMPATIENT };
    let error = pull_with(&bench, &format!("{}/app", registry.host), patience).unwrap_err().to_string();
    assert!(error.contains("broke off") && error.contains("does not answer in time"), "{error}");
    bench.assert_nothing_left();
}

#[test]
fn what_passes_is_waited_for() {
    let (bench, registry) = (Bench::new(), Registry::new());
    registry.push("app", "latest", &one_layer());
    let mut answers = vec![status(503, ""), status(429, "Retry-After: 1\r\n")];
    registry.rule(move |request| request.path.contains("/manifests/").then(|| answers.pop()).flatten());
    let start = Instant::now();
    pull(&bench, &registry, "app").unwrap();
    assert!(start.elapsed() >= Duration::from_secs(1), "the registry asked for a second");
    assert_eq!(registry.requests("/manifests/").len(), 3);
}

#[test]
fn a_broken_download_goes_on_where_it_was() {
    let (bench, registry, build) = (Bench::new(), Registry::new(), one_layer());
    registry.push("app", "latest", &build);
    let layer = one_layer();
    let mut answers = vec![Trick::CloseAfter(50_000), Trick::CloseAfter(100_000)];
    registry.rule(move |request| is_blob(request, &layer).then(|| answers.pop()).flatten());
    pull(&bench, &registry, "app").unwrap();
    let ranges: Vec<_> = layer_requests(&registry, &build).iter().map(|request| request.range).collect();
    assert_eq!(ranges, [None, Some(100_000), Some(150_000)]);
}

#[test]
fn a_server_without_ranges_starts_again() {
    let (bench, registry, build) = (Bench::new(), Registry::new(), one_layer());
    registry.push("app", "latest", &build);
    let layer = one_layer();
    registry.rule(move |request| {
        let trick = if request.range.is_some() { Trick::IgnoreRange } else { Trick::CloseAfter(100_000) };
        is_blob(request, &layer).then_some(trick)
    });
    pull(&bench, &registry, "app").unwrap();
    assert_eq!(layer_requests(&registry, &build).len(), 2);
}

#[test]
fn what_a_dead_pull_left_is_used_unless_it_is_damaged() {
    let build = one_layer();
    let bytes = &build.layers[0].bytes;
    let (whole, zeros, longer) = (bytes.clone(), vec![0; 1000], [bytes.as_slice(), b"x"].concat());
    for (left, ranges) in [
        (bytes[..1000].to_vec(), vec![Some(1000)]),
        (whole, vec![]),
        (zeros, vec![Some(1000), None]),
        (longer, vec![None]),
    ] {
        let (bench, registry) = (Bench::new(), Registry::new());
        registry.push("app", "latest", &build);
        std::fs::create_dir_all(bench.path("store/blobs")).unwrap();
        std::fs::write(bench.path("store/blobs").join(Digest::of(bytes).hex()), left).unwrap();
        pull(&bench, &registry, "app").unwrap();
        let asked: Vec<_> = layer_requests(&registry, &build).iter().map(|request| request.range).collect();
        assert_eq!(asked, ranges);
    }
}

#[test]
fn pulls_at_the_same_time_share_the_work() {
    let (bench, registry, build) = (Bench::new(), Registry::new(), three_layers());
    registry.push("app", "latest", &build);
    registry.push("again", "latest", &build);
    let (gate, layers) = (Arc::new(Gate::default()), three_layers());
    registry.rule({
        let gate = gate.clone();
        move |request| is_blob(request, &layers).then(|| Trick::Hold(gate.clone(), None))
    });
    std::thread::scope(|scope| {
        let pulls = ["app", "again", "app"].map(|name| {
            let (bench, registry) = (&bench, &registry);
            scope.spawn(move || pull(bench, registry, name).unwrap().digest())
        });
        // All three know what they want before the first gets any of it.
        gate.reached();
        while registry.requests("/manifests/").len() < 3 {
            std::thread::yield_now();
        }
        gate.open();
        let digests = pulls.map(|pull| pull.join().unwrap());
        assert_eq!(digests[0], digests[1]);
    });
    assert_eq!(layer_requests(&registry, &build).len(), 3, "each layer was fetched once");
    assert_eq!(bench.store.list().unwrap().len(), 2);
}

#[test]
fn a_pull_that_waits_does_the_work_when_the_other_fails() {
    let (bench, registry, build) = (Bench::new(), Registry::new(), one_layer());
    registry.push("app", "latest", &build);
    let (gate, layer) = (Arc::new(Gate::default()), one_layer());
    let mut tricks = vec![Trick::Hold(gate.clone(), Some(Box::new(status(404, ""))))];
    registry.rule(move |request| is_blob(request, &layer).then(|| tricks.pop()).flatten());
    std::thread::scope(|scope| {
        // The first has the lock while its only answer is held up, and is then refused.
        let refused = scope.spawn(|| pull(&bench, &registry, "app"));
        gate.reached();
        let other = scope.spawn(|| pull(&bench, &registry, "app"));
        while registry.requests("/manifests/").len() < 2 {
            std::thread::yield_now();
        }
        gate.open();
        assert!(matches!(refused.join().unwrap(), Err(PullError::NotFound(_))));
        other.join().unwrap().unwrap();
    });
    assert_eq!(bench.store.list().unwrap().len(), 1);
}

/// `hull image pull` with a store of the bench's own, and nobody else's settings.
fn hull(bench: &Bench, reference: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hull"));
    command.args(["image", "pull", reference]).env("HULL_DATA_DIR", bench.path("store"));
    command.env("HULL_STATE_DIR", bench.path("state")).env("DOCKER_CONFIG", bench.path("docker"));
    command
}

#[test]
fn a_killed_pull_leaves_a_store_that_works_and_is_gone_on_with() {
    let (bench, registry, build) = (Bench::new(), Registry::new(), one_layer());
    registry.push("app", "latest", &build);
    let (layer, mut tricks) = (one_layer(), vec![Trick::StallAfter(70_000)]);
    registry.rule(move |request| is_blob(request, &layer).then(|| tricks.pop()).flatten());
    let reference = format!("{}/app", registry.host);
    let mut killed = hull(&bench, &reference).stdout(Stdio::null()).spawn().unwrap();
    let blob = bench.path("store/blobs").join(Digest::of(&build.layers[0].bytes).hex());
    while std::fs::metadata(&blob).map_or(0, |metadata| metadata.len()) < 70_000 {
        assert!(killed.try_wait().unwrap().is_none(), "it must wait for the rest");
        std::thread::yield_now();
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(bench.store.list().unwrap().is_empty());
    bench.unpack(Layer::new().file("other", "x")).unwrap();

    let output = hull(&bench, &reference).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(layer_requests(&registry, &build).last().unwrap().range, Some(70_000));
    assert!(!blob.exists());
    assert!(bench.store.resolve(&reference).is_ok());
}

#[test]
fn the_command_prints_the_digest_and_fails_with_125() {
    let (bench, registry, build) = (Bench::new(), Registry::new(), one_layer());
    registry.push("app", "latest", &build);
    let said = |reference: &str| {
        let output = hull(&bench, reference).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, stdout, stderr) = said(&format!("{}/app", registry.host));
    assert_eq!((code, stdout.trim()), (Some(0), bench.store.list().unwrap()[0].digest.as_str()));
    assert!(stderr.lines().all(|line| line.starts_with("layer ")) && stderr.contains(": done"), "{stderr}");
    for reference in ["debian:12", "127.0.0.1:1/app", &format!("{}/other", registry.host), "r.example/A"] {
        let (code, stdout, stderr) = said(reference);
        assert_eq!((code, stdout.as_str(), stderr.lines().count()), (Some(125), "", 1), "{stderr}");
    }
    assert!(said("debian:12").2.contains("names no registry"));
}

#[test]
fn a_missing_image_is_never_fetched_unasked() {
    let (bench, registry) = (Bench::new(), Registry::new());
    registry.push("app", "latest", &one_layer());
    let reference = format!("{}/app", registry.host);
    let error = bench.store.resolve(&reference).unwrap_err().to_string();
    assert!(error.contains(&format!("`hull image pull {reference}`")), "{error}");
    assert!(registry.requests("/").is_empty());
}

/// Writes a docker configuration that knows the registry.
fn docker_config(bench: &Bench, config: serde_json::Value) -> PathBuf {
    let file = bench.path("docker/config.json");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, config.to_string()).unwrap();
    file
}

/// `me:secret` in base64.
const BASIC: &str = "bWU6c2VjcmV0";

fn protected(registry: &Registry, challenge: String, accepted: &'static str) {
    registry.rule(move |request| {
        let known = request.authorization.as_deref() == Some(accepted);
        (request.path.starts_with("/v2/app/") && !known).then(|| status(401, &challenge))
    });
}

#[test]
fn passwords_come_from_the_docker_configuration() {
    let (bench, registry) = (Bench::new(), Registry::new());
    registry.push("app", "latest", &one_layer());
    protected(&registry, "WWW-Authenticate: Basic realm=\"x\"\r\n".to_owned(), "Basic bWU6c2VjcmV0");
    let reference = format!("{}/app", registry.host);
    assert!(refused(&bench, &registry, "app").contains("log in"));
    let wrong = docker_config(&bench, json!({"auths": {registry.host.as_str(): {"auth": "bWU6d3Jvbmc="}}}));
    let error = bench.store.pull(&reference, Some(wrong), IMPATIENT, Arc::new(Unseen)).unwrap_err().to_string();
    assert!(error.contains("does not let this user pull app (401 Unauthorized)"), "{error}");
    let file = docker_config(&bench, json!({"auths": {registry.host.as_str(): {"auth": BASIC}}}));
    bench.store.pull(&reference, Some(file), IMPATIENT, Arc::new(Unseen)).unwrap();
    assert!(registry.requests("/v2/app/manifests/")[0].authorization.is_none(), "nobody asked for it yet");
}

#[test]
fn a_token_is_fetched_where_the_registry_says_and_once() {
    let (bench, registry) = (Bench::new(), Registry::new());
    let build = three_layers();
    registry.push("app", "latest", &build);
    registry.put_manifest("token", "x", "application/json", br#"{"token": "t0k3n", "expires_in": 60}"#.to_vec());
    let challenge =
        format!("WWW-Authenticate: Bearer realm=\"http://{}/token\",service=\"the service\"\r\n", registry.host);
    let mut tokens = 0;
    registry.rule(move |request| {
        if request.path.starts_with("/token?") {
            tokens += 1;
            assert_eq!(tokens, 1, "one token is enough");
            assert_eq!(request.path, "/token?scope=repository%3Aapp%3Apull&service=the+service");
            assert_eq!(request.authorization.as_deref(), Some("Basic bWU6c2VjcmV0"));
            return Some(Trick::Status(200, String::new(), br#"{"token": "t0k3n"}"#.to_vec()));
        }
        let known = request.authorization.as_deref() == Some("Bearer t0k3n");
        (request.path.starts_with("/v2/app/") && !known).then(|| status(401, &challenge))
    });
    let file = docker_config(&bench, json!({"auths": {format!("https://{}/v1/", registry.host): {"auth": BASIC}}}));
    let reference = format!("{}/app", registry.host);
    bench.store.pull(&reference, Some(file), IMPATIENT, Arc::new(Unseen)).unwrap();
}

#[test]
fn a_hostile_token_service_gets_and_does_nothing() {
    let bench = Bench::new();
    for (realm, answer, expected) in [
        ("http://registry.example/token", status(200, ""), "without encryption"),
        ("no url", status(200, ""), "makes no sense"),
        ("", Trick::Status(200, String::new(), br#"{"token": "a\r\nb: c"}"#.to_vec()), "makes no sense"),
        ("", Trick::Status(200, String::new(), b"{}".to_vec()), "holds no token"),
        ("", Trick::Status(200, String::new(), b"token".to_vec()), "no valid JSON"),
        ("", Trick::Endless, "above the limit"),
        ("", status(401, ""), "(401 Unauthorized)"),
        ("", status(500, ""), "(500 Internal Server Error)"),
    ] {
        let registry = Registry::new();
        registry.push("app", "latest", &one_layer());
        let own = format!("http://{}/token", registry.host);
        let realm = if realm.is_empty() { &own } else { realm };
        let challenge = format!("WWW-Authenticate: Bearer realm=\"{realm}\"\r\n");
        registry.rule(move |request| match request.path.starts_with("/token") {
            true => Some(answer.clone()),
            false => request.path.starts_with("/v2/app/").then(|| status(401, &challenge)),
        });
        let error = refused(&bench, &registry, "app");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_credential_helper_is_found_in_the_path() {
    let (bench, registry) = (Bench::new(), Registry::new());
    registry.push("app", "latest", &one_layer());
    protected(&registry, "WWW-Authenticate: Basic realm=\"x\"\r\n".to_owned(), "Basic bWU6c2VjcmV0");
    docker_config(&bench, json!({"credsStore": "none", "credHelpers": {registry.host.as_str(): "hull-test"}}));
    let helper = bench.path("docker-credential-hull-test");
    std::fs::write(&helper, "#!/bin/sh\necho '{\"Username\": \"me\", \"Secret\": \"secret\"}'\n").unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", helper.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let output = hull(&bench, &format!("{}/app", registry.host)).env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// Speaks TLS in front of the registry, with a certificate of its own; gives its address.
fn tls_proxy(registry: &Registry, certificate: &rcgen::CertifiedKey<rcgen::KeyPair>) -> String {
    use tokio_rustls::rustls;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = certificate.signing_key.serialize_der().try_into().unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let (address, inner) = (listener.local_addr().unwrap().to_string(), registry.host.clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                // A client that does not trust the certificate hangs up.
                let Ok(mut outside) = acceptor.accept(stream).await else { continue };
                let mut inside = tokio::net::TcpStream::connect(&inner).await.unwrap();
                tokio::spawn(async move { drop(tokio::io::copy_bidirectional(&mut outside, &mut inside).await) });
            }
        });
    });
    address
}

#[test]
fn tls_is_spoken_with_whom_the_system_trusts_and_with_nobody_else() {
    let (bench, registry) = (Bench::new(), Registry::new());
    registry.push("app", "latest", &one_layer());
    let certificate = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let trusted = bench.path("trusted.pem");
    std::fs::write(&trusted, certificate.cert.pem()).unwrap();
    let reference = format!("{}/app", tls_proxy(&registry, &certificate));
    let untrusted = hull(&bench, &reference).output().unwrap();
    assert_eq!(untrusted.status.code(), Some(125));
    let output = hull(&bench, &reference).env("SSL_CERT_FILE", &trusted).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(!registry.requests("/manifests/").is_empty());
}
