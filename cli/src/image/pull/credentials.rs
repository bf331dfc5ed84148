//! Names and passwords for registries, from the file where docker, podman and others keep them.
//!
//! The order is docker's: a helper for this registry, the helper for all, what the file itself holds. Nothing of it is ever
//! part of an error or of what `--debug` prints.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::PullError;

/// The file lists tens of registries at the most.
const FILE_CAP: u64 = 1 << 20;
/// Tokens are some kilobytes.
const ANSWER_CAP: u64 = 64 << 10;
/// A helper that says who it is for instead of a name has a refresh token in place of the password.
const TOKEN_USER: &str = "<token>";

/// Who to be.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Login {
    pub(super) user: String,
    pub(super) password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").finish_non_exhaustive()
    }
}

/// The parts of docker's `config.json` that have a meaning here; the rest is for others.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: HashMap<String, Auth>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    /// `user:password` in base64.
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// The file that docker would read: `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.
#[must_use]
pub fn docker_config() -> Option<PathBuf> {
    let directory = std::env::var_os("DOCKER_CONFIG").filter(|directory| !directory.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"));
    Some(directory.or_else(home)?.join("config.json"))
}

/// What the file has for a registry that goes by these names; nothing if there is no file.
pub(super) async fn find(file: Option<PathBuf>, keys: &[&str], patience: Duration) -> Result<Option<Login>, PullError> {
    let Some(file) = file else { return Ok(None) };
    let bad = |why: String| PullError::Credentials(format!("{}: {why}", file.display()));
    let content = match std::fs::File::open(&file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bad(format!("{error}: make it readable, or set DOCKER_CONFIG"))),
        Ok(opened) => {
            let mut content = Vec::new();
            let read = std::io::Read::read_to_end(&mut std::io::Read::take(opened, FILE_CAP + 1), &mut content);
            read.map_err(|error| bad(error.to_string()))?;
            content
        }
    };
    if content.len() as u64 > FILE_CAP {
        return Err(bad(format!("it is larger than {FILE_CAP} bytes, so it is no docker configuration")));
    }
    // serde's message could quote a secret.
    let config: DockerConfig = serde_json::from_slice(&content).map_err(|error| {
        bad(format!("no valid JSON at line {}, column {}: correct it", error.line(), error.column()))
    })?;
    let helper = keys.iter().find_map(|key| config.cred_helpers.get(*key)).or(config.creds_store.as_ref());
    if let Some(helper) = helper.filter(|name| !name.is_empty()) {
        for key in deduplicated(keys, &config) {
            if let Some(login) = ask(&program(helper)?, &key, patience).await? {
                return Ok(Some(login));
            }
        }
    }
    for (key, auth) in &config.auths {
        if keys.contains(&host_of(key)) {
            let login = auth.login().map_err(|why| bad(format!("the entry {key} {why}: log in again")))?;
            if login.is_some() {
                return Ok(login);
            }
        }
    }
    Ok(None)
}

/// What to ask a helper for: as the file spells the registry, else its plain names.
fn deduplicated(keys: &[&str], config: &DockerConfig) -> Vec<String> {
    let spelled = config.auths.keys().filter(|key| keys.contains(&host_of(key))).cloned();
    let mut all: Vec<String> = spelled.chain(keys.iter().map(ToString::to_string)).collect();
    let mut seen = std::collections::HashSet::new();
    all.retain(|key| seen.insert(key.clone()));
    all
}

/// The registry in a key of `auths`, which may be a URL.
fn host_of(key: &str) -> &str {
    let key = key.split_once("://").map_or(key, |(_, rest)| rest);
    key.split('/').next().unwrap_or_default()
}

impl Auth {
    fn login(&self) -> Result<Option<Login>, &'static str> {
        if let (Some(user), Some(password)) = (&self.username, &self.password) {
            return Ok(Some(Login { user: user.clone(), password: password.clone() }));
        }
        let Some(auth) = self.auth.as_deref().filter(|auth| !auth.is_empty()) else {
            return match &self.identitytoken {
                Some(_) => Err("holds an identity token, which is not supported, and no password"),
                None => Ok(None),
            };
        };
        let plain = STANDARD.decode(auth.trim()).ok().and_then(|plain| String::from_utf8(plain).ok());
        let plain = plain.ok_or("is no base64")?;
        let (user, password) = plain.split_once(':').ok_or("has no colon between user and password")?;
        // Old versions of docker end it with a zero.
        Ok(Some(Login { user: user.to_owned(), password: password.trim_end_matches('\0').to_owned() }))
    }
}

/// The program of a credential helper, to be found in `PATH`.
fn program(name: &str) -> Result<String, PullError> {
    if name.contains('/') {
        return Err(PullError::Credentials(format!("the credential helper `{}` is no name", name.escape_debug())));
    }
    Ok(format!("docker-credential-{name}"))
}

/// Asks a credential helper; it may know nothing of the registry.
async fn ask(program: &str, registry: &str, patience: Duration) -> Result<Option<Login>, PullError> {
    let failed = |why: String| PullError::Credentials(format!("the credential helper {program} {why}"));
    let mut child = tokio::process::Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(format!("cannot be started ({error}): install it, or log in without it")))?;
    let (mut stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let conversation = async {
        if let Some(stdin) = &mut stdin {
            // One that does not want to know has closed it.
            let _ = stdin.write_all(format!("{registry}\n").as_bytes()).await;
        }
        drop(stdin.take());
        let mut answer = Vec::new();
        if let Some(stdout) = stdout {
            stdout.take(ANSWER_CAP).read_to_end(&mut answer).await?;
        }
        Ok::<_, std::io::Error>((child.wait().await?, answer))
    };
    let (status, answer) = tokio::time::timeout(patience, conversation)
        .await
        .map_err(|_| failed(format!("has not answered for {} s: see why it waits", patience.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        // The protocol's way to say that there is nothing; only these words are fixed.
        if String::from_utf8_lossy(&answer).contains("credentials not found") {
            return Ok(None);
        }
        return Err(failed(format!("failed ({status}): run `{program} get` by hand to see why")));
    }
    let answer: Answer = serde_json::from_slice(&answer).map_err(|_| failed("gave no valid answer".to_owned()))?;
    if answer.username == TOKEN_USER {
        return Err(failed("gave an identity token, which is not supported: log in with a password".to_owned()));
    }
    Ok(Some(Login { user: answer.username, password: answer.secret }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(config: &str, keys: &[&str]) -> Result<Option<Login>, PullError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(&file, config).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(find(Some(file), keys, Duration::from_secs(10)))
    }

    fn login(user: &str, password: &str) -> Option<Login> {
        Some(Login { user: user.into(), password: password.into() })
    }

    #[test]
    fn registries_are_found_by_host_or_url() {
        let auth = STANDARD.encode("me:a:b\0");
        for key in ["r.example", "https://r.example", "https://r.example/v1/", "r.example/v2/"] {
            let config = format!(r#"{{"auths": {{"{key}": {{"auth": "{auth}"}}}}, "other": 1}}"#);
            assert!(look(&config, &["r.example"]).unwrap() == login("me", "a:b"), "{key}");
            assert!(look(&config, &["r.example:5000"]).unwrap().is_none(), "{key}");
        }
        assert!(look(r#"{"auths": {"r.example": {}}}"#, &["r.example"]).unwrap().is_none());
    }

    #[test]
    fn errors_name_the_file_and_never_the_secret() {
        let token = r#"{"auths": {"r.example": {"identitytoken": "secret"}}}"#;
        let base64 = r#"{"auths": {"r.example": {"auth": "secret!"}}}"#;
        for config in ["{\"auths\": \"secret\"}", "[\"secret\"", token, base64] {
            let error = look(config, &["r.example"]).unwrap_err().to_string();
            assert!(error.contains("config.json") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn no_file_is_no_login() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let found = runtime.block_on(find(Some("/no/such/file".into()), &["r.example"], Duration::ZERO));
        assert!(found.unwrap().is_none());
    }

    /// Asks a helper that is this shell script.
    fn helped(script: &str, patience: Duration) -> Result<Option<Login>, PullError> {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("helper");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            loop {
                match ask(program.to_str().unwrap(), "r.example", patience).await {
                    // Another test's thread was between fork and exec with the script still open for writing.
                    Err(error) if error.to_string().contains("Text file busy") => {}
                    other => return other,
                }
            }
        })
    }

    #[test]
    fn a_helper_is_asked_for_the_registry_and_may_not_know_it() {
        let long = Duration::from_secs(60);
        let answer = r#"read name; echo "{\"ServerURL\": \"x\", \"Username\": \"$1\", \"Secret\": \"$name\"}""#;
        assert!(helped(answer, long).unwrap() == login("get", "r.example"));
        assert!(helped("echo credentials not found in native keychain; exit 1", long).unwrap().is_none());
        for script in
            ["echo no; exit 1", "echo no", "head -c 100000 /dev/zero", r#"echo '{"Username":"<token>","Secret":"s"}'"#]
        {
            let error = helped(script, long).unwrap_err().to_string();
            assert!(error.starts_with("the credential helper "), "{error}");
        }
    }

    #[test]
    fn a_helper_that_does_not_answer_is_not_waited_for() {
        let error = helped("exec sleep 1000", Duration::from_millis(50)).unwrap_err().to_string();
        assert!(error.contains("has not answered"), "{error}");
    }

    #[test]
    fn a_helpers_name_is_no_path() {
        assert!(look(r#"{"credsStore": "../../bin/x"}"#, &["r.example"]).is_err());
        let error = look(r#"{"credHelpers": {"r.example": "no-such-helper"}}"#, &["r.example"]).unwrap_err();
        assert!(error.to_string().contains("docker-credential-no-such-helper"), "{error}");
    }
}
