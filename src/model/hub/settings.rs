//! Where the hub is, where its cache is, and who asks: the variables that Hugging Face's own libraries read.

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How the hub is reached and where its files are kept.
#[derive(Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// Address of the hub, without a slash at the end.
    pub endpoint: String,
    /// Directory of the cache, which holds a directory for each repository.
    pub cache: PathBuf,
    /// What proves who asks.
    pub token: Option<String>,
    /// Whether the network must not be used.
    pub offline: bool,
    /// How often a request is tried, of a download: without one more byte.
    pub attempts: u32,
    /// Pause after the first failed attempt; it doubles with each further one.
    pub first_pause: Duration,
}

impl std::fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The token is a secret.
        f.debug_struct("HubSettings")
            .field("endpoint", &self.endpoint)
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .finish_non_exhaustive()
    }
}

impl HubSettings {
    /// The settings of this process's environment:
    ///
    /// - cache: `HF_HUB_CACHE` (older `HUGGINGFACE_HUB_CACHE`), else `hub` in `HF_HOME`, which is `huggingface` in
    ///   `XDG_CACHE_HOME`, which is `~/.cache`;
    /// - token: `HF_TOKEN` (older `HUGGING_FACE_HUB_TOKEN`), else the file `HF_TOKEN_PATH`, which is `token` in
    ///   `HF_HOME`; none at all under `HF_HUB_DISABLE_IMPLICIT_TOKEN`;
    /// - address: `HF_ENDPOINT`, else `https://huggingface.co`;
    /// - offline: `HF_HUB_OFFLINE`, else `TRANSFORMERS_OFFLINE`.
    ///
    /// # Errors
    /// A data error when neither the variables nor a home directory say where the cache is.
    pub fn from_env() -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name).and_then(|value| value.into_string().ok());
        Self::from_variables(&variable, std::env::home_dir().as_deref())
    }

    /// The same from any variables and any home directory. A variable set to nothing counts as absent.
    ///
    /// # Errors
    /// As [`HubSettings::from_env`].
    pub fn from_variables(variable: &dyn Fn(&str) -> Option<String>, home: Option<&Path>) -> Result<Self> {
        let text = |name: &str| variable(name).filter(|value| !value.is_empty());
        let path = |name: &str| text(name).map(|value| expanded(&value, variable, home));
        let hugging_face = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|dir| dir.join("huggingface")))
            .or_else(|| home.map(|home| home.join(".cache/huggingface")));
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| hugging_face.as_ref().map(|dir| dir.join("hub")))
            .ok_or_else(|| {
                Error::data(
                    "there is no home directory to keep downloaded models in\n   = help: set HF_HOME to a directory, or pass a local one with `--model`",
                )
            })?;
        let token_file = path("HF_TOKEN_PATH").or_else(|| hugging_face.map(|dir| dir.join("token")));
        let token = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]
            .iter()
            .find_map(|name| text(name))
            .or_else(|| std::fs::read_to_string(token_file?).ok())
            .map(|token| token.replace(['\r', '\n'], "").trim().to_owned())
            .filter(|token| !token.is_empty() && !is_true(text("HF_HUB_DISABLE_IMPLICIT_TOKEN").as_deref()));
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache,
            token,
            offline: is_true(text("HF_HUB_OFFLINE").or_else(|| text("TRANSFORMERS_OFFLINE")).as_deref()),
            attempts: 5,
            first_pause: Duration::from_millis(500),
        })
    }
}

fn is_true(value: Option<&str>) -> bool {
    value.is_some_and(|value| matches!(value.to_uppercase().as_str(), "1" | "TRUE" | "YES" | "ON"))
}

/// A path with its leading `~` and its `$NAME` and `${NAME}` replaced; unknown names stay as they are.
fn expanded(path: &str, variable: &dyn Fn(&str) -> Option<String>, home: Option<&Path>) -> PathBuf {
    let path = match (path.strip_prefix('~'), home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            format!("{}{rest}", home.display())
        }
        _ => path.to_owned(),
    };
    let mut text = String::new();
    let mut rest = path.as_str();
    while let Some(at) = rest.find('$') {
        text.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
        let (name, length) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, _)) => (name, name.len() + 2),
            None => (&after[..end], end),
        };
        match variable(name).filter(|_| !name.is_empty()) {
            Some(value) => text.push_str(&value),
            None => text.push_str(&rest[at..=at + length]),
        }
        rest = &after[length..];
    }
    text.push_str(rest);
    PathBuf::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> HubSettings {
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        HubSettings::from_variables(&variable, Some(Path::new("/home/a"))).unwrap()
    }

    #[test]
    fn the_cache_is_where_transformers_looks() {
        for (variables, cache) in [
            (&[][..], "/home/a/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/hf")], "/home/a/hf/hub"),
            (&[("HF_HOME", "/hf"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "/new")], "/new"),
            (&[("HF_HOME", "")], "/home/a/.cache/huggingface/hub"),
            (&[("BIG", "/big"), ("HF_HUB_CACHE", "$BIG/${BIG}x/$NO/${NO}")], "/big//bigx/$NO/${NO}"),
            (&[("HF_HUB_CACHE", "~b/$")], "~b/$"),
        ] {
            assert_eq!(of(variables).cache, Path::new(cache), "{variables:?}");
        }
        let error = HubSettings::from_variables(&|_| None, None).unwrap_err();
        assert!(error.to_string().contains("set HF_HOME"), "{error}");
    }

    #[test]
    fn the_token_is_found_in_variables_and_files_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().display().to_string();
        let file = dir.path().join("other").display().to_string();
        std::fs::write(dir.path().join("token"), " from_home\r\n").unwrap();
        std::fs::write(&file, "from_path\n").unwrap();
        let at_home = ("HF_HOME", home.as_str());
        for (variables, token) in [
            (vec![at_home], Some("from_home")),
            (vec![at_home, ("HF_TOKEN_PATH", file.as_str())], Some("from_path")),
            (vec![at_home, ("HUGGING_FACE_HUB_TOKEN", "old")], Some("old")),
            (vec![("HUGGING_FACE_HUB_TOKEN", "old"), ("HF_TOKEN", " new\n")], Some("new")),
            (vec![("HF_TOKEN", "new"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")], None),
            (vec![("HF_HOME", "/no/such")], None),
        ] {
            let settings = of(&variables);
            assert_eq!(settings.token.as_deref(), token, "{variables:?}");
            assert!(!format!("{settings:?}").contains("from_") && !format!("{settings:?}").contains("new"));
        }
    }

    #[test]
    fn offline_and_address_come_from_variables() {
        for (variables, offline) in [
            (&[("HF_HUB_OFFLINE", "1")][..], true),
            (&[("HF_HUB_OFFLINE", "yes")], true),
            (&[("TRANSFORMERS_OFFLINE", "on")], true),
            (&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")], false),
            (&[("HF_HUB_OFFLINE", ""), ("TRANSFORMERS_OFFLINE", "true")], true),
            (&[], false),
        ] {
            assert_eq!(of(variables).offline, offline, "{variables:?}");
        }
        assert_eq!(of(&[]).endpoint, "https://huggingface.co");
        assert_eq!(of(&[("HF_ENDPOINT", "http://mirror/hf/")]).endpoint, "http://mirror/hf");
    }
}
