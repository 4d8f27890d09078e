//! A hub on this machine: the few requests that fetching a checkpoint makes, and the ways in which they can go wrong.

use safemed::model::hub::HubSettings;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// The one repository of this hub.
pub(crate) const ID: &str = "owner/tiny";
/// What it was called before.
pub(crate) const OLD_ID: &str = "owner/old-name";
/// The token that opens it when it is gated.
pub(crate) const TOKEN: &str = "hf_secret";

/// Files of one commit.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// What the hub holds, and what is wrong with it.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Commit of each revision.
    pub(crate) revisions: BTreeMap<String, String>,
    /// Files of each commit.
    pub(crate) commits: BTreeMap<String, Files>,
    /// Every request: method, path, range.
    pub(crate) requests: Vec<String>,
    /// Only who has the token gets files.
    pub(crate) is_gated: bool,
    /// Every answer is this error: status, `X-Error-Code`, `X-Error-Message`.
    pub(crate) refusal: Option<(u16, &'static str, &'static str)>,
    /// The connection is cut after so many bytes of a large file; as often as there are entries.
    pub(crate) cuts: Vec<usize>,
    /// Ranges are ignored.
    pub(crate) without_ranges: bool,
    /// Large files come with their first byte changed.
    pub(crate) is_corrupt: bool,
    /// Pause after every KiB of a large file.
    pub(crate) pause: Duration,
}

/// A running hub; it ends with the process of the tests.
#[derive(Debug, Clone)]
pub(crate) struct HubServer {
    port: u16,
    state: Arc<Mutex<State>>,
}

/// The commit hash made of one digit.
pub(crate) fn commit(digit: char) -> String {
    digit.to_string().repeat(40)
}

/// The files of a directory.
pub(crate) fn files_of(dir: &Path) -> Files {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap()))
        .collect()
}

/// SHA-256 of a content.
pub(crate) fn sha256(content: &[u8]) -> String {
    format!("{:x}", Sha256::digest(content))
}

impl HubServer {
    /// A hub whose branch `main` is commit `aaaa…` with `files`.
    pub(crate) fn start(files: Files) -> Self {
        let state = State {
            revisions: BTreeMap::from([("main".to_owned(), commit('a'))]),
            commits: BTreeMap::from([(commit('a'), files)]),
            ..State::default()
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { port: listener.local_addr().unwrap().port(), state: Arc::new(Mutex::new(state)) };
        let serving = server.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = serving.clone();
                // A client that went away is the client's business.
                std::thread::spawn(move || drop(server.answer(stream)));
            }
        });
        server
    }

    /// What it holds and what was asked, to look at and to change.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Its address.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Settings that lead here and to a cache in `dir`.
    pub(crate) fn settings(&self, dir: &Path) -> HubSettings {
        HubSettings {
            endpoint: self.endpoint(),
            cache: dir.join("hub"),
            token: None,
            offline: false,
            attempts: 3,
            first_pause: Duration::from_millis(1),
        }
    }

    /// Requests so far that contain `part`, forgotten afterwards with all others.
    pub(crate) fn take_requests(&self, part: &str) -> Vec<String> {
        let all = std::mem::take(&mut self.state().requests);
        all.into_iter().filter(|request| request.contains(part)).collect()
    }

    fn answer(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let first = lines.next().transpose()?.unwrap_or_default();
        let mut words = first.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut headers = BTreeMap::new();
        for line in lines {
            let line = line?;
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.insert(name.to_lowercase(), value.to_owned());
        }
        let is_head = method == "HEAD";
        let range = headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        let mark = range.map_or(String::new(), |start| format!(" from {start}"));
        self.state().requests.push(format!("{method} {path}{mark}"));
        let token = headers.get("authorization").map(String::as_str);
        let reply = |head: &str, body: &[u8]| {
            let body_sent = if is_head { &[][..] } else { body };
            let mut bytes =
                format!("HTTP/1.1 {head}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len())
                    .into_bytes();
            bytes.extend_from_slice(body_sent);
            (&stream).write_all(&bytes)
        };
        if let Some((status, code, message)) = self.state().refusal {
            return reply(
                &format!("{status} Refused\r\nX-Error-Code: {code}\r\nX-Error-Message: {message}"),
                b"",
            );
        }
        if path.contains(OLD_ID) {
            let place = path.replace(OLD_ID, ID);
            return reply(&format!("307 Temporary Redirect\r\nLocation: {place}"), b"moved");
        }
        if let Some(hash) = path.strip_prefix("/elsewhere/") {
            assert_eq!(token, None, "another host does not learn the token");
            return self.send(&mut stream, hash, range);
        }
        if headers.get("accept-encoding").is_some_and(|encoding| encoding != "identity") {
            return reply("500 Encoded", b"");
        }
        let is_welcome = !self.state().is_gated || token == Some(&format!("Bearer {TOKEN}"));
        if let Some(revision) = path.strip_prefix(&format!("/api/models/{ID}/revision/")) {
            let state = self.state();
            let name = revision.replace("%2F", "/");
            let commit = state.revisions.get(&name).unwrap_or(&name);
            let Some(files) = state.commits.get(commit) else {
                return reply("404 Not Found\r\nX-Error-Code: RevisionNotFound", b"{}");
            };
            let names: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
            let body = serde_json::json!({"id": ID, "sha": commit, "siblings": names}).to_string();
            return reply("200 OK", body.as_bytes());
        }
        let Some((commit, name)) =
            path.strip_prefix(&format!("/{ID}/resolve/")).and_then(|rest| rest.split_once('/'))
        else {
            return reply("401 Unauthorized\r\nX-Error-Message: Invalid username or password.", b"");
        };
        if !is_welcome {
            return reply("401 Unauthorized\r\nX-Error-Code: GatedRepo", b"");
        }
        let content = self.state().commits.get(commit).and_then(|files| files.get(name).cloned());
        let Some(content) = content else {
            return reply("404 Not Found\r\nX-Error-Code: EntryNotFound", b"");
        };
        let hash = sha256(&content);
        if !is_large(name) {
            return reply(
                &format!("200 OK\r\nETag: W/\"{}\"\r\nX-Repo-Commit: {commit}", &hash[..40]),
                &content,
            );
        }
        // Another name of this machine, so that it counts as another host.
        let place = format!("http://localhost:{}/elsewhere/{hash}", self.port);
        reply(
            &format!(
                "302 Found\r\nLocation: {place}\r\nX-Linked-Etag: \"{hash}\"\r\nX-Linked-Size: {}\r\nETag: \"other\"",
                content.len()
            ),
            b"redirected",
        )
    }

    /// A large file from the host that keeps them.
    fn send(&self, stream: &mut TcpStream, hash: &str, range: Option<&str>) -> std::io::Result<()> {
        let (mut content, cut, start, pause) = {
            let mut state = self.state();
            let content =
                state.commits.values().flat_map(BTreeMap::values).find(|content| sha256(content) == hash);
            let Some(content) = content.cloned() else { return Ok(()) };
            let cut = (!state.cuts.is_empty()).then(|| state.cuts.remove(0));
            let start =
                range.filter(|_| !state.without_ranges).and_then(|start| start.parse().ok()).unwrap_or(0);
            (content, cut, start, state.pause)
        };
        if self.state().is_corrupt {
            content[0] ^= 1;
        }
        let (rest, total) = (&content[start..], content.len());
        let head = if start > 0 {
            format!("206 Partial Content\r\nContent-Range: bytes {start}-{}/{total}", total - 1)
        } else {
            "200 OK".to_owned()
        };
        write!(stream, "HTTP/1.1 {head}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", rest.len())?;
        for piece in rest[..cut.unwrap_or(rest.len())].chunks(1024) {
            stream.write_all(piece)?;
            std::thread::sleep(pause);
        }
        stream.flush()
    }
}

/// Whether the hub keeps such a file elsewhere.
fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}
