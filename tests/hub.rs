//! Checkpoints by hub id: what is fetched, kept, continued and refused, against a hub on this machine.

use crate::support::hub_server::{Files, HubServer, ID, OLD_ID, TOKEN, commit, files_of, sha256};
use crate::support::{safemed, texts};
use crate::tiny::{phantoms, tiny_assistant, tiny_checkpoint};
use candle_core::Tensor;
use safemed::error::{Error, Result};
use safemed::model::hub::{Event, HubSettings, Listener, Location, fetch};
use safemed::model::weights::save_file;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tiny checkpoint, with other files around it that nobody needs.
static TINY: LazyLock<Files> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    tiny_checkpoint(dir.path());
    let mut files = files_of(dir.path());
    for name in
        ["README.md", "pytorch_model.bin", "consolidated.safetensors", "onnx/config.json", "training.json"]
    {
        files.insert(name.to_owned(), b"not needed".to_vec());
    }
    files
});

/// The same with its weights in two files.
fn sharded() -> Files {
    let mut files = TINY.clone();
    files.remove(WEIGHTS);
    let tensors = tiny_assistant().vlm.parameters().tensors().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut places = serde_json::Map::new();
    for (number, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", number + 1);
        let part: Vec<(String, Tensor)> = part.to_vec();
        save_file(&dir.path().join(&name), &part, &[]).unwrap();
        places.extend(part.iter().map(|(tensor, _)| (tensor.clone(), json!(name))));
    }
    files.insert(INDEX.to_owned(), json!({"weight_map": places}).to_string().into_bytes());
    files.extend(files_of(dir.path()));
    files
}

fn get(settings: &HubSettings, revision: &str) -> Result<Location> {
    fetch(ID, revision, settings, &|_| Ok(()))
}

/// The message of an error of data.
fn refusal(result: Result<Location>) -> String {
    match result.unwrap_err() {
        Error::Data(text) => text,
        other => panic!("{other:?}"),
    }
}

fn blob(settings: &HubSettings, content: &[u8]) -> std::path::PathBuf {
    settings.cache.join("models--owner--tiny/blobs").join(sha256(content))
}

fn leave_partly(settings: &HubSettings, content: &[u8], left: &[u8]) {
    let path = blob(settings, content).with_extension("incomplete");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, left).unwrap();
}

#[test]
fn what_a_checkpoint_needs_is_fetched_once_and_kept_where_transformers_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    let settings = hub.settings(dir.path());
    let events = RefCell::new(Vec::new());
    let listener: &Listener<'_> = &|event| {
        events.borrow_mut().push(match event {
            Event::Begin { file, total, done } => format!("{file} {done}/{total}"),
            Event::Received(done) => done.to_string(),
            Event::End => "end".to_owned(),
            Event::Waiting(_) => "waiting".to_owned(),
        });
        Ok(())
    };
    let found = fetch(ID, "main", &settings, listener).unwrap();
    let home = settings.cache.join("models--owner--tiny");
    assert_eq!(found, Location { dir: home.join("snapshots").join(commit('a')), commit: Some(commit('a')) });
    assert_eq!(std::fs::read_to_string(home.join("refs/main")).unwrap(), commit('a'));
    let fetched = files_of(&found.dir);
    let mut needed = TINY.clone();
    needed.retain(|_, content| !content.starts_with(b"not needed"));
    assert_eq!(fetched.keys().collect::<Vec<_>>(), needed.keys().collect::<Vec<_>>());
    assert!(fetched == needed);
    #[cfg(unix)]
    assert_eq!(
        std::fs::read_link(found.dir.join(WEIGHTS)).unwrap(),
        Path::new("../../blobs").join(sha256(&TINY[WEIGHTS]))
    );
    let size = TINY[WEIGHTS].len();
    let events = events.into_inner();
    let begin = events.iter().position(|event| *event == format!("{WEIGHTS} 0/{size}")).unwrap();
    assert!(events[begin..].contains(&size.to_string()));
    assert_eq!(events.last().unwrap(), "end");
    let order = hub.take_requests("/resolve/");
    assert!(order[0].ends_with("config.json") && order.last().unwrap().ends_with(WEIGHTS), "{order:?}");
    assert_eq!(get(&settings, "main").unwrap(), found);
    assert_eq!(hub.take_requests("").len(), 1, "what is there is not asked for again");
    std::fs::remove_file(found.dir.join("tokenizer.json")).unwrap();
    get(&settings, "main").unwrap();
    assert_eq!(
        hub.take_requests("/resolve/"),
        [format!("HEAD /{ID}/resolve/{}/tokenizer.json", commit('a'))]
    );
}

#[test]
fn a_pinned_revision_stays_what_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    let settings = hub.settings(dir.path());
    let old = get(&settings, "main").unwrap();
    let mut newer = TINY.clone();
    newer.insert("generation_config.json".to_owned(), b"{}".to_vec());
    {
        let mut state = hub.state();
        state.revisions = [("main", 'b'), ("v1", 'a'), ("refs/pr/1", 'b')]
            .map(|(name, digit)| (name.to_owned(), commit(digit)))
            .into();
        state.commits.insert(commit('b'), newer);
    }
    let new = get(&settings, "main").unwrap();
    assert_eq!(new.commit, Some(commit('b')));
    assert_eq!(std::fs::read(new.dir.join("generation_config.json")).unwrap(), b"{}");
    assert!(hub.take_requests("/elsewhere/").len() == 1, "the weights are the same content");
    for (revision, expected) in
        [("v1", &old), (&commit('a'), &old), ("refs/pr/1", &new), (&commit('b'), &new)]
    {
        assert_eq!(get(&settings, revision).unwrap(), *expected, "{revision}");
        let offline = HubSettings { offline: true, ..settings.clone() };
        assert_eq!(get(&offline, revision).unwrap(), *expected, "{revision}, offline");
    }
    assert!(refusal(get(&settings, "v2")).contains("has no revision `v2`"));
}

#[test]
fn a_cut_download_goes_on_where_it_was_cut() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    let settings = hub.settings(dir.path());
    hub.state().cuts = vec![1000, 500];
    let found = get(&settings, "main").unwrap();
    assert!(files_of(&found.dir)[WEIGHTS] == TINY[WEIGHTS]);
    let hash = sha256(&TINY[WEIGHTS]);
    let expected: Vec<String> =
        ["", " from 1000", " from 1500"].iter().map(|mark| format!("GET /elsewhere/{hash}{mark}")).collect();
    assert_eq!(hub.take_requests("/elsewhere/"), expected);
}

#[test]
fn a_download_that_gets_nowhere_is_given_up_and_continued_next_time() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    let settings = hub.settings(dir.path());
    hub.state().cuts = vec![1000, 0, 0, 0];
    let text = refusal(get(&settings, "main"));
    assert!(text.contains("cannot be reached") && text.contains("kept and continued"), "{text}");
    hub.take_requests("");
    get(&settings, "main").unwrap();
    assert_eq!(
        hub.take_requests("/elsewhere/"),
        [format!("GET /elsewhere/{} from 1000", sha256(&TINY[WEIGHTS]))]
    );
}

#[test]
fn what_a_killed_process_left_is_continued_when_it_is_sound() {
    let content = &TINY[WEIGHTS];
    let half = content.len() / 2;
    let hash = sha256(content);
    let whole = format!("GET /elsewhere/{hash}");
    let rest = format!("{whole} from {half}");
    let garbage = vec![7; half];
    let too_long = vec![7; content.len() + 1];
    let cases: [(&[u8], Vec<&str>); 4] = [
        (&content[..half], vec![&rest]),
        (content, vec![]),
        (&garbage, vec![&rest, &whole]),
        (&too_long, vec![&whole]),
    ];
    for (left, requests) in cases {
        let dir = tempfile::tempdir().unwrap();
        let hub = HubServer::start(TINY.clone());
        let settings = hub.settings(dir.path());
        leave_partly(&settings, content, left);
        let found = get(&settings, "main").unwrap();
        assert!(files_of(&found.dir)[WEIGHTS] == *content);
        assert_eq!(hub.take_requests("/elsewhere/"), requests);
        assert!(!blob(&settings, content).with_extension("incomplete").exists());
    }
}

#[test]
fn a_server_without_ranges_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    let settings = hub.settings(dir.path());
    hub.state().without_ranges = true;
    hub.state().cuts = vec![1000];
    let found = get(&settings, "main").unwrap();
    assert!(files_of(&found.dir)[WEIGHTS] == TINY[WEIGHTS]);
}

#[test]
fn content_that_is_not_what_the_hub_promises_is_thrown_away() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    let settings = hub.settings(dir.path());
    hub.state().is_corrupt = true;
    let text = refusal(get(&settings, "main"));
    let hash = sha256(&TINY[WEIGHTS]);
    assert!(text.contains(WEIGHTS) && text.contains(&format!("instead of {hash}")), "{text}");
    assert!(!blob(&settings, &TINY[WEIGHTS]).exists());
    assert!(!blob(&settings, &TINY[WEIGHTS]).with_extension("incomplete").exists());
    // A blob of the wrong length, left by whatever program, is no blob.
    std::fs::write(blob(&settings, &TINY[WEIGHTS]), b"short").unwrap();
    hub.state().is_corrupt = false;
    let found = get(&settings, "main").unwrap();
    assert!(files_of(&found.dir)[WEIGHTS] == TINY[WEIGHTS]);
}

#[test]
fn offline_the_cache_serves_and_says_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(sharded());
    let online = hub.settings(dir.path());
    let offline = HubSettings { offline: true, ..online.clone() };
    let text = refusal(get(&offline, "main"));
    assert!(text.contains("`owner/tiny`, revision `main`, is not in the local cache"), "{text}");
    let found = get(&online, "main").unwrap();
    hub.take_requests("");
    assert_eq!(get(&offline, "main").unwrap(), found);
    assert_eq!(get(&offline, &commit('a')).unwrap(), found);
    assert!(refusal(get(&offline, "v1")).contains("not in the local cache"));
    for name in ["model-00002-of-00002.safetensors", "tokenizer.json", INDEX] {
        let path = found.dir.join(name);
        let target = path.canonicalize().unwrap();
        std::fs::rename(&target, target.with_extension("away")).unwrap();
        let text = refusal(get(&offline, "main"));
        let named = if name == INDEX { WEIGHTS } else { name };
        assert!(text.contains(&format!("is incomplete: `{named}` is missing")), "{text}");
        std::fs::rename(target.with_extension("away"), &target).unwrap();
    }
    assert_eq!(hub.take_requests("").len(), 0, "offline nobody is asked");
}

#[test]
fn an_interrupted_first_download_says_offline_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    let settings = hub.settings(dir.path());
    let stopped = fetch(ID, "main", &settings, &|event| match event {
        Event::Received(done) if done > 100_000 => Err(Error::Stopped),
        _ => Ok(()),
    });
    assert!(matches!(stopped, Err(Error::Stopped)));
    let offline = HubSettings { offline: true, ..settings.clone() };
    assert!(refusal(get(&offline, "main")).contains("`model.safetensors` is missing"));
    get(&settings, "main").unwrap();
    assert_eq!(hub.take_requests("/elsewhere/").len(), 2);
    // A newer commit whose download is cut does not hide the complete one.
    let mut newer = TINY.clone();
    newer.insert(WEIGHTS.to_owned(), vec![1; 5000]);
    hub.state().commits.insert(commit('b'), newer);
    hub.state().revisions.insert("main".to_owned(), commit('b'));
    hub.state().cuts = vec![0; 3];
    assert!(get(&settings, "main").is_err());
    assert_eq!(get(&offline, "main").unwrap().commit, Some(commit('a')));
}

#[test]
fn without_network_a_complete_copy_serves() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    let settings = hub.settings(dir.path());
    // A port that nobody listens at.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let cut_off = HubSettings { endpoint: format!("http://{closed}"), ..settings.clone() };
    let text = refusal(get(&cut_off, "main"));
    assert!(text.contains("the hub cannot be reached") && text.contains("check the network"), "{text}");
    let found = get(&settings, "main").unwrap();
    assert_eq!(get(&cut_off, "main").unwrap(), found);
    for refusal in [(503, "", ""), (429, "", ""), (401, "GatedRepo", "")] {
        hub.state().refusal = Some(refusal);
        assert_eq!(get(&settings, "main").unwrap(), found, "{refusal:?}");
    }
    hub.state().refusal = Some((404, "RepoNotFound", ""));
    assert!(get(&settings, "main").is_err(), "a repository that is gone is not a network that fails");
}

#[test]
fn a_gated_model_needs_a_token_that_no_other_host_learns() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    hub.state().is_gated = true;
    let settings = hub.settings(dir.path());
    let text = refusal(get(&settings, "main"));
    assert!(
        text.contains("is gated") && text.contains("accept the licence on the model's page and set HF_TOKEN"),
        "{text}"
    );
    assert!(text.contains(&format!("{}/{ID}", hub.endpoint())), "{text}");
    let wrong = HubSettings { token: Some("hf_other".to_owned()), ..settings.clone() };
    let text = refusal(get(&wrong, "main"));
    assert!(text.contains("has no access") && !text.contains("hf_other"), "{text}");
    get(&HubSettings { token: Some(TOKEN.to_owned()), ..settings }, "main").unwrap();
}

#[test]
fn refusals_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    let settings = hub.settings(dir.path());
    for ((status, code, message), words) in [
        (
            (401, "RepoNotFound", "Repository not found"),
            "there is no model `owner/tiny` on the hub, or it is private",
        ),
        ((404, "RepoNotFound", ""), "nor is there a directory of that name"),
        ((404, "RevisionNotFound", ""), "has no revision `main`"),
        ((401, "", "Invalid credentials in Authorization header"), "does not accept the token"),
        ((403, "", "not today"), "refuses access to model `owner/tiny`: not today"),
        ((429, "", ""), "wait some minutes"),
        (
            (503, "", "maintenance"),
            "the hub answered 503 Service Unavailable when asked for the list of files: maintenance",
        ),
        ((418, "", ""), "the hub answered 418"),
    ] {
        hub.take_requests("");
        hub.state().refusal = Some((status, code, message));
        let text = refusal(get(&settings, "main"));
        assert!(text.contains(words) && text.contains("= help: "), "{status}: {text}");
        let tries = if matches!(status, 429 | 503) { 3 } else { 1 };
        assert_eq!(hub.take_requests("").len(), tries, "{status}");
    }
    hub.state().refusal = None;
    let text = refusal(fetch("nobody/nothing", "main", &settings, &|_| Ok(())));
    assert!(text.contains("there is no model `nobody/nothing`"), "{text}");
    let bad = HubSettings { endpoint: "not an address".to_owned(), ..settings };
    assert!(refusal(get(&bad, "main")).contains("check HF_ENDPOINT"));
}

#[test]
fn what_cannot_be_used_is_refused_before_weights_are_fetched() {
    let mut other = TINY.clone();
    other.insert("config.json".to_owned(), br#"{"model_type": "bert"}"#.to_vec());
    let mut pickled = TINY.clone();
    pickled.retain(|name, _| !name.ends_with(".safetensors"));
    let mut lacking = sharded();
    lacking.remove("model-00002-of-00002.safetensors");
    let mut escaping = sharded();
    escaping.insert(INDEX.to_owned(), br#"{"weight_map": {"a": "../../a"}}"#.to_vec());
    for (files, words) in [
        (other, "`model_type` is `bert`, which is not supported"),
        (pickled, "pickled weights only (pytorch_model.bin)"),
        (escaping, "not a file name in this directory"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let hub = HubServer::start(files);
        let text = refusal(get(&hub.settings(dir.path()), "main"));
        assert!(text.contains(words), "{text}");
        assert_eq!(hub.take_requests("/elsewhere/").len(), 0);
    }
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(lacking);
    let text = refusal(get(&hub.settings(dir.path()), "main"));
    assert!(text.contains("shard `model-00002-of-00002.safetensors` is listed"), "{text}");
}

#[test]
fn the_shards_that_the_index_lists_are_fetched_and_a_renamed_repository_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(sharded());
    let found = fetch(OLD_ID, "main", &hub.settings(dir.path()), &|_| Ok(())).unwrap();
    assert!(found.dir.join("model-00002-of-00002.safetensors").exists());
    assert!(!found.dir.join("consolidated.safetensors").exists());
    safemed::model::assistant::Assistant::load(&found.dir, &|_| false, &candle_core::Device::Cpu).unwrap();
}

/// The program in `dir`, with that hub and a cache in `dir`.
fn program(dir: &Path, hub: &HubServer, arguments: &[&str]) -> Command {
    let mut command = safemed(dir);
    for name in
        ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"]
            .iter()
            .chain(&["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"])
    {
        command.env_remove(name);
    }
    command.env("HF_HOME", dir.join("hf")).env("HF_ENDPOINT", hub.endpoint());
    command.env("NO_PROXY", "127.0.0.1,localhost").args(arguments);
    command
}

fn run(command: &mut Command) -> (i32, String, String) {
    texts(&command.output().unwrap())
}

#[test]
fn the_program_takes_an_id_and_notes_the_commit() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    phantoms(&data);
    let hub = HubServer::start(TINY.clone());
    hub.state().revisions.insert("v1".to_owned(), commit('a'));
    let evaluate = |out: &str, more: &[&str]| {
        let mut command = program(dir.path(), &hub, &["eval", "--model", ID, "--omnimedvqa"]);
        command.arg(&data).args(["--limit", "2", "--max-new-tokens", "4", "--out", out]).args(more);
        command
    };
    let (status, _, err) = run(&mut evaluate("a", &["--revision", "v1"]));
    assert_eq!(status, 0, "{err}");
    assert!(!err.contains(WEIGHTS), "no bar without a terminal, no line for what is quick: {err}");
    let facts = |out: &str| -> Value {
        serde_json::from_slice(&std::fs::read(dir.path().join(out).join("run.json")).unwrap()).unwrap()
    };
    assert_eq!(facts("a")["model_revision"], commit('a'));
    let config = std::fs::read_to_string(dir.path().join("a/config.toml")).unwrap();
    assert!(config.contains("revision = \"v1\""), "{config}");
    let (status, _, err) = run(evaluate("b", &[]).env("HF_ENDPOINT", "http://127.0.0.1:9"));
    assert_eq!(status, 3, "main was never fetched: {err}");
    assert!(err.contains("the hub cannot be reached"), "{err}");
    let (status, _, err) =
        run(evaluate("b", &[]).env("SAFEMED_REVISION", "v1").env("HF_ENDPOINT", "http://127.0.0.1:9"));
    assert_eq!(status, 0, "{err}");
    assert!(err.contains("WARN") && err.contains("the cached copy of `owner/tiny` is used"), "{err}");
    let (status, _, err) = run(evaluate("c", &["--revision", "v1", "-q"]).env("HF_HUB_OFFLINE", "1"));
    assert_eq!((status, err.as_str()), (0, ""));
    assert_eq!(facts("c")["model_sha256"], sha256(&TINY[WEIGHTS]));
    // Local directories have no revision, and neither has what is no id.
    for model in [data.display().to_string(), "scratch:tiny".to_owned()] {
        let (status, _, err) =
            run(&mut program(dir.path(), &hub, &["eval", "--revision", "v1", "--model", &model]));
        assert_eq!(status, 2, "{err}");
        assert!(err.contains("leave `--revision` out"), "{err}");
    }
    let (status, _, err) =
        run(evaluate("d", &["--revision", "v1"]).env("TRANSFORMERS_OFFLINE", "1").env("HF_HOME", "none"));
    assert_eq!(status, 3, "{err}");
    assert!(err.contains("not in the local cache"), "{err}");
}

#[test]
fn a_killed_download_is_continued_and_two_at_once_share_one() {
    let dir = tempfile::tempdir().unwrap();
    let hub = HubServer::start(TINY.clone());
    hub.state().pause = Duration::from_millis(4);
    let export = |out: &str| program(dir.path(), &hub, &["export", "--model", ID, "--out", out]);
    let mut child = export("a").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let part = dir
        .path()
        .join("hf/hub/models--owner--tiny/blobs")
        .join(format!("{}.incomplete", sha256(&TINY[WEIGHTS])));
    let received = || std::fs::metadata(&part).map_or(0, |part| part.len());
    for _ in 0..3000 {
        if received() > 20_000 || child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let left = received();
    assert!(left > 20_000 && left < TINY[WEIGHTS].len() as u64, "{left}");
    hub.take_requests("");
    let mut both =
        ["a", "b"].map(|out| export(out).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let outputs = both.each_mut().map(|child| {
        let status = child.wait().unwrap();
        let mut text = String::new();
        std::io::Read::read_to_string(child.stderr.as_mut().unwrap(), &mut text).unwrap();
        (status.code(), text)
    });
    assert!(outputs.iter().all(|(status, _)| *status == Some(0)), "{outputs:?}");
    assert!(outputs.iter().any(|(_, text)| text.contains("another process is fetching")), "{outputs:?}");
    let transfers = hub.take_requests("/elsewhere/");
    assert_eq!(transfers, [format!("GET /elsewhere/{} from {left}", sha256(&TINY[WEIGHTS]))]);
    for out in ["a", "b"] {
        assert!(std::fs::read(dir.path().join(out).join(WEIGHTS)).unwrap() == TINY[WEIGHTS]);
    }
}
