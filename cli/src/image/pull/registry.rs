//! One repository of one registry, by the OCI distribution specification 1.1 ("Pulling manifests", "Pulling blobs").
//!
//! Everything a registry says is hostile: documents are read up to a limit, credentials go to nobody in the clear and to
//! no other host, waiting has an end.

use std::time::Duration;

use http_auth::parser::ChallengeParser;
use oci_spec::image::MediaType;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, RANGE, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use serde::Deserialize;
use tokio::sync::Mutex;

use super::credentials::Login;
use super::reference::Wanted;
use super::{Patience, PullError, is_loopback_url};
use crate::image::digest::Digest;
use crate::image::source::{DOCKER_INDEX, DOCKER_MANIFEST, JSON_CAP};

const TOKEN_CAP: u64 = 64 << 10;
const REDIRECTS_MAX: usize = 5;

/// A repository, and how to be let in.
#[derive(Debug)]
pub(super) struct Registry {
    client: Client,
    base: String,
    wanted: Wanted,
    login: Option<Login>,
    patience: Patience,
    /// What the registry has last accepted, for all requests from then on.
    authorization: Mutex<Option<HeaderValue>>,
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Registry {
    /// Prepares to talk to the registry; on a loopback address finds out whether it speaks TLS.
    pub(super) async fn connect(wanted: Wanted, login: Option<Login>, patience: Patience) -> Result<Self, PullError> {
        // Installed already by an earlier pull of this process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let loopback = wanted.is_loopback();
        let follow = redirect::Policy::custom(move |attempt| {
            let allowed = attempt.url().scheme() == "https" || (loopback && is_loopback_url(attempt.url()));
            match attempt.previous().len() <= REDIRECTS_MAX && allowed {
                true => attempt.follow(),
                false => attempt.error("it leads to a place that is not encrypted, or to too many places"),
            }
        });
        let mut client = Client::builder()
            .user_agent(concat!("hull/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(patience.connect)
            .read_timeout(patience.idle)
            .redirect(follow);
        if loopback {
            // A proxy would look on its own machine.
            client = client.no_proxy();
        }
        let host = wanted.host().to_owned();
        let client = client.build().map_err(|error| PullError::unreachable(&host, &error))?;
        let mut base = format!("https://{host}");
        if loopback && client.get(format!("{base}/v2/")).timeout(patience.connect).send().await.is_err() {
            base = format!("http://{host}");
        }
        Ok(Self { client, base, wanted, login, patience, authorization: Mutex::default() })
    }

    /// Fetches a manifest or index by tag or digest, which is verified, and gives the digest that it has.
    pub(super) async fn manifest(
        &self,
        reference: &str,
        digest: Option<Digest>,
    ) -> Result<(Vec<u8>, Digest), PullError> {
        let kinds = [
            MediaType::ImageManifest.to_string(),
            MediaType::ImageIndex.to_string(),
            DOCKER_MANIFEST.into(),
            DOCKER_INDEX.into(),
        ];
        let accept = HeaderValue::from_str(&kinds.join(", ")).map_err(|error| self.nonsense(error))?;
        let path = format!("manifests/{reference}");
        let headers = HeaderMap::from_iter([(ACCEPT, accept)]);
        let what = format!("{}/{}, {reference}", self.wanted.host(), self.wanted.repository());
        let body = self.get_small(&path, &what, headers, JSON_CAP).await?;
        let found = Digest::of(&body);
        match digest.filter(|digest| *digest != found) {
            Some(expected) => Err(PullError::WrongDigest { what: "the manifest".to_owned(), expected, found }),
            None => Ok((body, found)),
        }
    }

    /// Fetches a blob that is a document, and verifies it.
    pub(super) async fn document(&self, digest: Digest, what: &str) -> Result<Vec<u8>, PullError> {
        let body = self.get_small(&format!("blobs/{digest}"), what, HeaderMap::new(), JSON_CAP).await?;
        let found = Digest::of(&body);
        match found == digest {
            true => Ok(body),
            false => Err(PullError::WrongDigest { what: what.to_owned(), expected: digest, found }),
        }
    }

    /// Asks for a blob from a byte on; the registry may answer with all of it, or that there is no such byte.
    pub(super) async fn blob(&self, digest: Digest, from: u64) -> Result<Response, PullError> {
        let mut headers = HeaderMap::new();
        if from > 0 {
            let range = HeaderValue::from_str(&format!("bytes={from}-")).map_err(|error| self.nonsense(error))?;
            headers.insert(RANGE, range);
        }
        self.get(&format!("blobs/{digest}"), &format!("layer {digest}"), headers).await
    }

    /// Waits before attempt number `attempt`, which counts from 0.
    pub(super) async fn pause(&self, attempt: u32) {
        tokio::time::sleep(self.patience.backoff.saturating_mul(1 << attempt.min(6))).await;
    }

    pub(super) fn attempts(&self) -> u32 {
        self.patience.attempts
    }

    pub(super) fn host(&self) -> &str {
        self.wanted.host()
    }

    async fn get_small(&self, path: &str, what: &str, headers: HeaderMap, cap: u64) -> Result<Vec<u8>, PullError> {
        let mut attempt = 0;
        loop {
            let response = self.get(path, what, headers.clone()).await?;
            match read_small(response, cap, what).await? {
                Ok(body) => return Ok(body),
                Err(error) if attempt + 1 >= self.patience.attempts => {
                    return Err(PullError::unreachable(self.host(), &error));
                }
                Err(_) => self.pause(attempt).await,
            }
            attempt += 1;
        }
    }

    /// Sends a request until the answer is one to work with: 200, 206 or 416.
    async fn get(&self, path: &str, what: &str, headers: HeaderMap) -> Result<Response, PullError> {
        let url = format!("{}/v2/{}/{path}", self.base, self.wanted.repository());
        let (mut attempt, mut asked) = (0, false);
        loop {
            let mut headers = headers.clone();
            let used = self.authorization.lock().await.clone();
            headers.extend(used.iter().map(|value| (AUTHORIZATION, value.clone())));
            let last = attempt + 1 >= self.patience.attempts;
            let response = match self.client.get(&url).headers(headers).send().await {
                Ok(response) => response,
                // Nobody there is not for waiting to change, nor is a redirect to nowhere.
                Err(error) if last || error.is_connect() || error.is_redirect() || error.is_builder() => {
                    return Err(PullError::unreachable(self.host(), &error));
                }
                Err(_) => {
                    self.pause(attempt).await;
                    attempt += 1;
                    continue;
                }
            };
            let status = response.status();
            match status {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                    return Ok(response);
                }
                StatusCode::UNAUTHORIZED if !asked => {
                    asked = true;
                    self.authorize(&response, used).await?;
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(self.denied(status)),
                StatusCode::NOT_FOUND => return Err(PullError::NotFound(what.to_owned())),
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                    let told = retry_after(&response);
                    if let Some(wait) = told.filter(|wait| last || *wait > self.patience.longest_wait) {
                        return Err(PullError::Busy {
                            registry: self.host().to_owned(),
                            status,
                            seconds: wait.as_secs(),
                        });
                    }
                    if last {
                        return Err(self.refused(status));
                    }
                    match told {
                        Some(wait) => tokio::time::sleep(wait).await,
                        None => self.pause(attempt).await,
                    }
                    attempt += 1;
                }
                status if status.is_server_error() && !last => {
                    self.pause(attempt).await;
                    attempt += 1;
                }
                status => return Err(self.refused(status)),
            }
        }
    }

    /// Does what a 401 asks for, unless another request has meanwhile: `used` is what was refused.
    async fn authorize(&self, response: &Response, used: Option<HeaderValue>) -> Result<(), PullError> {
        let mut authorization = self.authorization.lock().await;
        if *authorization != used {
            return Ok(());
        }
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<&str> = challenges.iter().filter_map(|value| value.to_str().ok()).collect();
        let parsed = challenges.iter().flat_map(|text| ChallengeParser::new(text).filter_map(Result::ok));
        let parsed: Vec<_> = parsed.collect();
        let of = |scheme: &str| parsed.iter().find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme));
        let value = if let Some(bearer) = of("Bearer") {
            let parameter = |name: &str| {
                let found = bearer.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            let realm = parameter("realm").ok_or_else(|| self.nonsense("it names no place to get a token from"))?;
            format!("Bearer {}", self.token(&realm, parameter("service")).await?)
        } else if let (Some(_), Some(login)) = (of("Basic"), &self.login) {
            use base64::Engine as _;
            let pair = format!("{}:{}", login.user, login.password);
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
        } else {
            return Err(self.denied(StatusCode::UNAUTHORIZED));
        };
        let mut value = HeaderValue::from_str(&value).map_err(|error| self.nonsense(error))?;
        value.set_sensitive(true);
        *authorization = Some(value);
        Ok(())
    }

    /// Gets a token for pulling from the place that the registry names.
    async fn token(&self, realm: &str, service: Option<String>) -> Result<String, PullError> {
        let realm = Url::parse(realm).map_err(|error| self.nonsense(error))?;
        if realm.scheme() != "https" && !(self.wanted.is_loopback() && is_loopback_url(&realm)) {
            return Err(self.nonsense("it wants the password sent without encryption"));
        }
        let mut query = vec![("scope", format!("repository:{}:pull", self.wanted.repository()))];
        query.extend(service.map(|service| ("service", service)));
        let mut request = self.client.get(realm).query(&query);
        if let Some(login) = &self.login {
            request = request.basic_auth(&login.user, Some(&login.password));
        }
        let response = request.send().await.map_err(|error| PullError::unreachable(self.host(), &error))?;
        match response.status() {
            StatusCode::OK => {}
            status @ (StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                return Err(self.denied(status));
            }
            status => return Err(self.refused(status)),
        }
        let body = read_small(response, TOKEN_CAP, "the token").await?;
        let body = body.map_err(|error| PullError::unreachable(self.host(), &error))?;
        // serde's message could quote the token.
        let token: Token = serde_json::from_slice(&body).map_err(|_| self.nonsense("its token is no valid JSON"))?;
        token.token.or(token.access_token).ok_or_else(|| self.nonsense("its answer holds no token"))
    }

    fn denied(&self, status: StatusCode) -> PullError {
        PullError::Denied {
            registry: self.host().to_owned(),
            status,
            repository: self.wanted.repository().to_owned(),
            known: self.login.is_some(),
        }
    }

    fn refused(&self, status: StatusCode) -> PullError {
        PullError::Refused { registry: self.host().to_owned(), status }
    }

    fn nonsense(&self, why: impl std::fmt::Display) -> PullError {
        PullError::Nonsense { registry: self.host().to_owned(), why: why.to_string() }
    }
}

/// Reads a body up to a limit; the inner error is the connection's.
async fn read_small(response: Response, cap: u64, what: &str) -> Result<reqwest::Result<Vec<u8>>, PullError> {
    let mut response = response;
    let too_large = |size| PullError::TooLarge { what: what.to_owned(), size, cap };
    if let Some(size) = response.content_length().filter(|size| *size > cap) {
        return Err(too_large(size));
    }
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(None) => return Ok(Ok(body)),
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Err(error) => return Ok(Err(error)),
        }
        if body.len() as u64 > cap {
            return Err(too_large(body.len() as u64));
        }
    }
}

/// How long a registry wants to be left alone, where it says so in seconds (RFC 9110, 10.2.3).
fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}
