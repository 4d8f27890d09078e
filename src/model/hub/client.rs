//! Asking the hub: what a repository holds, and its files, continued where an earlier attempt stopped and checked
//! before anyone sees them.
//!
//! `hf-hub` knows the names and the layout; the transfers are ours, because it neither checks what it received nor
//! tells why it was refused, and gives up where another process downloads for more than a few seconds.

use super::cache::{Repository, is_commit, write_failed};
use super::settings::HubSettings;
use super::{DEFAULT_REVISION, Event, Listener};
use crate::error::{Error, Result};
use hf_hub::api::RepoInfo;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, Uri};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

/// How long a connection may take to be made, and to say nothing.
const CONNECT: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(60);

/// Longest list of files that is read, in bytes.
const LONGEST_LISTING: u64 = 64 << 20;

/// Bytes between two events.
const CHUNK: usize = 1 << 18;

/// Redirects within the hub that are followed: a repository that was renamed, and renamed again.
const RENAMES: usize = 5;

/// Why something was not received.
#[derive(Debug)]
pub(super) struct Failure {
    /// For people.
    pub(super) error: Error,
    /// Whether the same request may succeed a moment later.
    is_passing: bool,
    /// Whether a complete copy in the cache may stand in.
    pub(super) cache_serves: bool,
}

/// What came, or why it did not.
pub(super) type Received<T> = std::result::Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, is_passing: false, cache_serves: false }
    }
}

/// One repository on the hub.
pub(super) struct Client<'a> {
    settings: &'a HubSettings,
    repository: &'a Repository,
    listener: &'a Listener<'a>,
    agent: Agent,
}

/// What the hub says about a file before it is fetched.
struct Remote<'a> {
    /// Its name in the repository.
    name: &'a str,
    url: String,
    /// Name of its content: for large files its SHA-256.
    etag: String,
    size: u64,
}

impl Remote<'_> {
    /// The SHA-256 of the content, where the hub says it.
    fn sha256(&self) -> Option<&str> {
        let is_hash = self.etag.len() == 64 && self.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hash.then_some(self.etag.as_str())
    }
}

impl<'a> Client<'a> {
    pub(super) fn new(
        settings: &'a HubSettings,
        repository: &'a Repository,
        listener: &'a Listener<'a>,
    ) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // The large files are on other hosts, which must not learn the token.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("safemed/", env!("CARGO_PKG_VERSION")))
            // A range of a compressed file would be no range of the file.
            .accept_encoding("identity")
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build()
            .new_agent();
        Self { settings, repository, listener, agent }
    }

    /// The files of the revision, and the commit that it is now.
    pub(super) fn listing(&self) -> Received<RepoInfo> {
        let url = format!("{}/api/{}", self.settings.endpoint, self.repository.names().api_url());
        let mut response =
            self.patiently(|| self.answer(self.with_token(self.agent.get(&url)), "the list of files"))?;
        let info: RepoInfo = response
            .body_mut()
            .with_config()
            .limit(LONGEST_LISTING)
            .read_json()
            .map_err(|error| self.strange(&format!("the list of files cannot be read: {error}")))?;
        if !is_commit(&info.sha) {
            return Err(self.strange(&format!("`{}` is no commit hash", info.sha)));
        }
        Ok(info)
    }

    /// Sees to it that file `name` of `commit` is in the snapshot.
    pub(super) fn get(&self, commit: &str, name: &str) -> Received<()> {
        if self.repository.snapshot(commit).join(name).exists() {
            return Ok(());
        }
        let remote = self.patiently(|| self.remote(commit, name))?;
        let blob = self.repository.blob(&remote.etag);
        let is_there = || fs::metadata(&blob).is_ok_and(|blob| blob.len() == remote.size);
        if !is_there() {
            let _lock = self.repository.lock(&remote.etag, || (self.listener)(Event::Waiting(name)))?;
            // Whoever held the lock may have fetched it.
            if !is_there() {
                self.download(&remote, &blob)?;
            }
        }
        Ok(self.repository.link(commit, name, &blob)?)
    }

    /// Name, hash and size of a file.
    fn remote<'n>(&self, commit: &str, name: &'n str) -> Received<Remote<'n>> {
        let (endpoint, id) = (&self.settings.endpoint, self.repository.id());
        let mut url = format!("{endpoint}/{id}/resolve/{commit}/{}", encoded(name));
        // Followed by hand: a redirect within the hub leads to the answer, one to another host would drop its headers.
        for _ in 0..=RENAMES {
            let request = self.with_token(self.agent.head(&url));
            let request = request.config().max_redirects(0).max_redirects_will_error(false).build();
            let response = self.answer(request, name)?;
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            if let Some(place) =
                header("location").filter(|place| place.starts_with('/') && !place.starts_with("//"))
            {
                url = at_the_same_host(&url, place)
                    .ok_or_else(|| self.strange("a redirect that leads nowhere"))?;
                continue;
            }
            let etag = header("x-linked-etag").or_else(|| header("etag")).unwrap_or_default();
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
            if etag.is_empty()
                || !etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
            {
                return Err(self.strange(&format!("`{name}` has no usable ETag")));
            }
            // The length of a redirect is that of its own body.
            let length = header("content-length").filter(|_| response.status().is_success());
            let size = header("x-linked-size").or(length).and_then(|size| size.parse().ok());
            let size = size.ok_or_else(|| self.strange(&format!("it is not said how long `{name}` is")))?;
            return Ok(Remote { name, url, etag, size });
        }
        Err(self.strange("redirects without end"))
    }

    /// Fetches the content of `remote` to `blob`, under a name of its own until it is complete and checked.
    fn download(&self, remote: &Remote<'_>, blob: &Path) -> Received<()> {
        fs::create_dir_all(blob.parent().unwrap_or(blob))
            .map_err(|error| write_failed("make the cache", blob, &error))?;
        let mut part = Part::open(blob.with_file_name(format!("{}.incomplete", remote.etag)))?;
        let mut is_continued = part.length > 0;
        if part.length > remote.size {
            part.clear()?;
        }
        (self.listener)(Event::Begin { file: remote.name, total: remote.size, done: part.length })?;
        loop {
            self.receive(remote, &mut part)?;
            let found = part.sha256();
            let Some(expected) = remote.sha256().filter(|expected| !expected.eq_ignore_ascii_case(&found))
            else {
                break;
            };
            part.clear()?;
            // What an earlier process left may have been damaged since; what comes anew has no such excuse.
            if !std::mem::take(&mut is_continued) {
                let _ = fs::remove_file(&part.path);
                return Err(Error::data(format!(
                    "`{}` of model `{}` is not what the hub promises: its SHA-256 is {found} instead of {expected}\n  --> {}\n   = help: it was thrown away; run again, and if that does not help, look for a proxy that changes what passes through it",
                    remote.name,
                    self.repository.id(),
                    remote.url
                ))
                .into());
            }
        }
        part.keep_as(blob)?;
        Ok((self.listener)(Event::End)?)
    }

    /// Appends to `part` until it is complete. An attempt that brings something costs nothing.
    fn receive(&self, remote: &Remote<'_>, part: &mut Part) -> Received<()> {
        let mut failed = 0;
        while part.length < remote.size {
            let before = part.length;
            let Err(failure) = self.receive_once(remote, part) else { continue };
            failed = if part.length > before { 0 } else { failed + 1 };
            if !failure.is_passing || failed >= self.settings.attempts {
                return Err(failure);
            }
            tracing::info!("{}", failure.error);
            self.pause(failed.max(1));
        }
        Ok(())
    }

    fn receive_once(&self, remote: &Remote<'_>, part: &mut Part) -> Received<()> {
        let mut request = self.with_token(self.agent.get(&remote.url));
        if part.length > 0 {
            request = request.header("Range", format!("bytes={}-", part.length));
        }
        let response = self.answer(request, remote.name)?;
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let (start, total) = if response.status() == StatusCode::PARTIAL_CONTENT {
            header("content-range").and_then(parse_range).unwrap_or((part.length, Some(remote.size)))
        } else {
            (0, header("content-length").and_then(|length| length.parse().ok()))
        };
        if total.is_some_and(|total| total != remote.size) || (start != 0 && start != part.length) {
            return Err(self.strange(&format!(
                "`{}` was said to have {} bytes, and then another part of it or of another file was sent",
                remote.name, remote.size
            )));
        }
        // The server may not know ranges and send everything.
        if start != part.length {
            part.clear()?;
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; CHUNK];
        while part.length < remote.size {
            let room = (remote.size - part.length).min(CHUNK as u64) as usize;
            match body.read(&mut buffer[..room]) {
                Ok(0) => return Err(self.unreachable(&"the connection was closed")),
                Ok(count) => part.append(&buffer[..count])?,
                Err(error) => return Err(self.unreachable(&error)),
            }
            (self.listener)(Event::Received(part.length))?;
        }
        Ok(())
    }

    fn with_token(&self, request: RequestBuilder<WithoutBody>) -> RequestBuilder<WithoutBody> {
        match &self.settings.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    /// Tries again what may pass.
    fn patiently<T>(&self, attempt: impl Fn() -> Received<T>) -> Received<T> {
        for failed in 1..self.settings.attempts {
            match attempt() {
                Err(failure) if failure.is_passing => tracing::info!("{}", failure.error),
                other => return other,
            }
            self.pause(failed);
        }
        attempt()
    }

    fn pause(&self, failed: u32) {
        std::thread::sleep(self.settings.first_pause * 2u32.pow((failed - 1).min(4)));
    }

    /// Sends the request for `what`; an answer that is a refusal becomes a failure.
    fn answer(&self, request: RequestBuilder<WithoutBody>, what: &str) -> Received<Response<Body>> {
        let response = request.call().map_err(|error| match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => Error::data(format!(
                "the hub's address cannot be used: {error}\n  --> {}\n   = help: check HF_ENDPOINT, HTTPS_PROXY and the token for characters that do not belong there",
                self.settings.endpoint
            ))
            .into(),
            error => self.unreachable(&error),
        })?;
        let status = response.status();
        if status.is_success() || status.is_redirection() {
            return Ok(response);
        }
        Err(self.refused(&response, what))
    }

    /// Why the hub answered with an error.
    fn refused(&self, response: &Response<Body>, what: &str) -> Failure {
        let (id, revision) = (self.repository.id(), self.repository.revision());
        let page = format!("{}/{id}", self.settings.endpoint);
        let header = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
        };
        let (code, said) = (header("x-error-code"), header("x-error-message"));
        let status = response.status();
        let has_token = self.settings.token.is_some();
        let failure = |is_passing: bool, problem: String, help: &str| Failure {
            error: Error::data(format!("{problem}\n  --> {page}\n   = help: {help}")),
            is_passing,
            // As transformers does: a licence or a token that has lapsed does not take away what is on the disk.
            cache_serves: is_passing || matches!(status.as_u16(), 401 | 403),
        };
        let absent = || {
            failure(
                false,
                format!(
                    "there is no model `{id}` on the hub, or it is private; nor is there a directory of that name"
                ),
                "check the spelling; for a private or gated model, accept the licence on the model's page and set HF_TOKEN to a token of that account",
            )
        };
        match status.as_u16() {
            401 | 403 if code == "GatedRepo" && has_token => failure(
                false,
                format!("model `{id}` is gated, and the account of the token in use has no access"),
                "accept the licence on the model's page with that account, or set HF_TOKEN to a token of one that has",
            ),
            401 | 403 if code == "GatedRepo" => failure(
                false,
                format!("model `{id}` is gated: its owner wants the licence accepted"),
                "accept the licence on the model's page and set HF_TOKEN to a token of that account",
            ),
            401 if said.starts_with("Invalid credentials") => failure(
                false,
                "the hub does not accept the token".to_owned(),
                "set HF_TOKEN to a valid one, or unset it and remove the token file; tokens are made on the hub under Settings, Access Tokens",
            ),
            403 => failure(
                false,
                format!("the hub refuses access to model `{id}`{}", quoted(said)),
                "accept the licence on the model's page and set HF_TOKEN to a token that may read it",
            ),
            404 if code == "RevisionNotFound" => failure(
                false,
                format!("model `{id}` has no revision `{revision}`"),
                "name a branch, a tag or a commit hash with `--revision`; the model's page lists them under Files and versions",
            ),
            404 if code == "EntryNotFound" => {
                failure(false, format!("model `{id}` does not have {what} any more"), "run again")
            }
            404 if code.is_empty() && revision != DEFAULT_REVISION => failure(
                false,
                format!("there is no model `{id}` on the hub, or it has no revision `{revision}`"),
                "check the spelling of both",
            ),
            401 | 404 => absent(),
            429 => failure(
                true,
                "the hub answers no more questions for a while: too many were asked".to_owned(),
                "wait some minutes and run again; with HF_TOKEN set more are answered",
            ),
            code => failure(
                code == 408 || code >= 500,
                format!("the hub answered {status} when asked for {what}{}", quoted(said)),
                "run again later: what was received is kept and continued",
            ),
        }
    }

    /// The hub cannot be reached, or not any more.
    fn unreachable(&self, reason: &dyn std::fmt::Display) -> Failure {
        Failure {
            error: Error::data(format!(
                "the hub cannot be reached: {reason}\n  --> {}\n   = help: check the network (HTTPS_PROXY, HF_ENDPOINT) and run again: what was received is kept and continued; or pass a local directory",
                self.settings.endpoint
            )),
            is_passing: true,
            cache_serves: true,
        }
    }

    /// An answer that makes no sense.
    fn strange(&self, what: &str) -> Failure {
        Error::data(format!(
            "the hub's answer makes no sense: {what}\n  --> {}\n   = help: check HF_ENDPOINT, and whether a proxy answers in place of the hub",
            self.settings.endpoint
        ))
        .into()
    }
}

/// Content that is being received.
struct Part {
    path: PathBuf,
    file: File,
    length: u64,
    hasher: Sha256,
}

impl Part {
    /// Opens what an earlier attempt left, or a new file. Nobody else has it open: the caller holds the lock.
    fn open(path: PathBuf) -> Result<Self> {
        let failed = |error| write_failed("open the partial download", &path, &error);
        let mut options = File::options();
        let mut file =
            options.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut hasher = Sha256::new();
        let length = std::io::copy(&mut (&mut file).take(length), &mut hasher).map_err(failed)?;
        Ok(Self { path, file, length, hasher })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| write_failed("write the download", &self.path, &error))?;
        self.hasher.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Begins anew.
    fn clear(&mut self) -> Result<()> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map_err(|error| write_failed("write the download", &self.path, &error))?;
        self.length = 0;
        self.hasher = Sha256::new();
        Ok(())
    }

    fn sha256(&self) -> String {
        format!("{:x}", self.hasher.clone().finalize())
    }

    /// Moves the content to `path`, safe on the disk.
    fn keep_as(self, path: &Path) -> Result<()> {
        self.file
            .sync_all()
            .and_then(|()| fs::rename(&self.path, path))
            .map_err(|error| write_failed("keep the download", path, &error))
    }
}

/// `: text`, where there is one.
fn quoted(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

/// First byte and length of the whole, from `bytes 5-9/10`; the length may be unknown.
fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split('-').next()?.parse().ok()?, total.parse().ok()))
}

/// The address of absolute path `place` on the host of `url`.
fn at_the_same_host(url: &str, place: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    Some(format!("{}://{}{place}", uri.scheme_str()?, uri.authority()?))
}

/// A file name as part of an address.
fn encoded(name: &str) -> String {
    name.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_addresses_and_names_are_read_and_written() {
        assert_eq!(parse_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(parse_range("bytes */10"), None);
        let moved = at_the_same_host("http://a:8/o/m?x=1", "/new/name");
        assert_eq!(moved.as_deref(), Some("http://a:8/new/name"));
        assert_eq!(encoded("model-1 of 2#ä.safetensors"), "model-1%20of%202%23%C3%A4.safetensors");
    }

    #[test]
    fn a_part_goes_on_where_it_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let (path, whole) = (dir.path().join("part"), dir.path().join("whole"));
        Part::open(path.clone()).unwrap().append(b"ab").unwrap();
        let mut part = Part::open(path.clone()).unwrap();
        assert_eq!(part.length, 2);
        part.append(b"c").unwrap();
        assert_eq!(part.sha256(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        part.keep_as(&whole).unwrap();
        assert_eq!(fs::read(&whole).unwrap(), b"abc");
        assert!(!path.exists());
        let mut part = Part::open(whole).unwrap();
        part.clear().unwrap();
        part.append(b"abc").unwrap();
        assert_eq!(part.sha256(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let error = Part::open(path).unwrap().append(b"ab").unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Data(_)) && text.contains("the disk is full"), "{text}");
        assert!(text.contains("HF_HUB_CACHE"), "{text}");
    }
}
