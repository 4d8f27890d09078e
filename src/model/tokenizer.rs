//! Text to token ids and back, and the training of a small tokenizer in Qwen's style.
//!
//! A checkpoint's `tokenizer.json` is used as it is; `tokenizer_config.json` and `generation_config.json` say which
//! tokens end an answer. Prompts are not built here: see [`super::chat`].

use super::weights::write_atomically;
use crate::error::{Error, Result};
use crate::files;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

/// Opens a turn; its role and a newline follow.
pub const TURN_START: &str = "<|im_start|>";
/// Ends a turn, and an answer.
pub const TURN_END: &str = "<|im_end|>";
/// Ends a document; also the padding token.
pub const DOCUMENT_END: &str = "<|endoftext|>";
/// The placeholder of a merged image patch.
pub const IMAGE_PAD: &str = "<|image_pad|>";

/// Special tokens of a tokenizer trained here, in the order of their ids.
pub const SPECIAL_TOKENS: [&str; 8] = [
    DOCUMENT_END,
    TURN_START,
    TURN_END,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_PAD,
    "<|video_pad|>",
];

/// Whole tokens of a tokenizer trained here that are ordinary text.
pub const REASONING_TOKENS: [&str; 4] = ["<think>", "</think>", "<answer>", "</answer>"];

/// Cuts text into pieces that merges do not cross. As in Qwen's tokenizers, but letters joined by hyphens are one
/// piece, so that a frequent `upper-left` becomes one token.
const PIECES: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+(?:-\p{L}+)*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What `generation_config.json` says; absent values are the caller's choice.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationDefaults {
    /// Whether to sample rather than take the best token.
    pub do_sample: Option<bool>,
    /// Divisor of the logits.
    pub temperature: Option<f64>,
    /// Mass of the nucleus.
    pub top_p: Option<f64>,
    /// Number of best tokens to choose from.
    pub top_k: Option<usize>,
    /// Factor against tokens that have occurred.
    pub repetition_penalty: Option<f64>,
}

/// A checkpoint's tokenizer.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    config: Value,
    stop_ids: Vec<u32>,
    generation: GenerationDefaults,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("len", &self.len())
            .field("stop_ids", &self.stop_ids)
            .finish_non_exhaustive()
    }
}

/// A JSON file of the checkpoint, or null when it is not there.
pub(crate) fn optional_json(path: &Path) -> Result<Value> {
    match files::read_text(path, "cannot read the file") {
        Ok(text) => serde_json::from_str(&text)
            .map_err(|error| Error::data(format!("not valid JSON: {error}\n  --> {}", path.display()))),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(error),
    }
}

/// Refuses stages that no byte-level tokenizer of this family has: some grow text without end, some fail on damage.
fn check_stages(file: &[u8]) -> std::result::Result<(), String> {
    /// Longest pattern of a split, in bytes; Qwen's has 110.
    const MOST_PATTERN: usize = 2048;
    /// Most stages one after another; Qwen's have two.
    const MOST_STAGES: usize = 16;
    #[derive(Deserialize)]
    struct Kind {
        #[serde(rename = "type")]
        name: Option<String>,
    }
    #[derive(Deserialize)]
    struct Stages {
        #[serde(default)]
        normalizer: Value,
        #[serde(default)]
        pre_tokenizer: Value,
        #[serde(default)]
        post_processor: Value,
        #[serde(default)]
        decoder: Value,
        model: Kind,
    }
    fn leaves<'a>(stage: &'a Value, into: &mut Vec<&'a Value>) {
        let parts =
            ["normalizers", "pretokenizers", "processors", "decoders"].map(|list| stage[list].as_array());
        match parts.into_iter().flatten().next() {
            Some(parts) if stage["type"] == "Sequence" => parts.iter().for_each(|part| leaves(part, into)),
            _ => into.push(stage),
        }
    }
    fn check(stage: &Value, key: &str, known: &[&str]) -> std::result::Result<(), String> {
        let mut all = Vec::new();
        leaves(stage, &mut all);
        all.retain(|stage| !stage.is_null());
        let kinds: Vec<&str> = all.iter().map(|stage| stage["type"].as_str().unwrap_or_default()).collect();
        if let Some(kind) = kinds.iter().find(|kind| !known.contains(kind)) {
            return Err(format!(
                "its `{key}` is of type `{kind}`, which is not supported\n   = help: known are {}",
                known.join(", ")
            ));
        }
        // Each writes two letters for every byte beyond ASCII.
        if all.len() > MOST_STAGES || kinds.iter().filter(|kind| **kind == "ByteLevel").count() > 1 {
            return Err(format!("its `{key}` has more than {MOST_STAGES} stages, or `ByteLevel` twice"));
        }
        let pattern = |stage: &&Value| Some(stage["pattern"].as_object()?.values().next()?.as_str()?.len());
        match all.iter().filter_map(pattern).max() {
            Some(length) if length > MOST_PATTERN => {
                Err(format!("a pattern of its `{key}` is longer than {MOST_PATTERN} bytes"))
            }
            _ => Ok(()),
        }
    }
    let stages: Stages = serde_json::from_slice(file).map_err(|error| error.to_string())?;
    check(&stages.normalizer, "normalizer", &["NFC", "NFD", "NFKC", "NFKD"])?;
    check(&stages.pre_tokenizer, "pre_tokenizer", &["Split", "ByteLevel", "Digits"])?;
    check(&stages.post_processor, "post_processor", &["ByteLevel", "TemplateProcessing"])?;
    check(&stages.decoder, "decoder", &["ByteLevel"])?;
    match stages.model.name.as_deref() {
        None | Some("BPE") => Ok(()),
        Some(kind) => {
            Err(format!("its model is of type `{kind}`, which is not supported\n   = help: BPE is"))
        }
    }
}

/// An error of the library that no input should cause.
#[expect(clippy::needless_pass_by_value, reason = "the form that `map_err` takes")]
fn unexpected(error: tokenizers::Error) -> Error {
    Error::Other(anyhow::anyhow!("{error}"))
}

impl Tokenizer {
    /// Reads `dir/tokenizer.json`, and `tokenizer_config.json` and `generation_config.json` when they are there.
    ///
    /// # Errors
    /// A data error when the tokenizer is missing or damaged.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            return Err(Error::data(format!(
                "no tokenizer.json\n  --> {}\n   = help: a checkpoint needs it; `AutoTokenizer.from_pretrained(…).save_pretrained(…)` writes it",
                dir.display()
            )));
        }
        let bytes = files::read(&path, "cannot read the tokenizer")?;
        let wrong =
            |why: String| Error::data(format!("not a sound tokenizer.json: {why}\n  --> {}", path.display()));
        check_stages(&bytes).map_err(wrong)?;
        let mut inner = files::guarded(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .unwrap_or_else(|| Err("its parts contradict each other".into()))
            .map_err(|error| wrong(error.to_string()))?;
        // Some files carry the settings of the last training run.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(unexpected)?;
        let config = optional_json(&dir.join("tokenizer_config.json"))?;
        add_configured_tokens(&mut inner, &config, dir)?;
        let generation = optional_json(&dir.join("generation_config.json"))?;
        Ok(Self::assemble(inner, config, &generation))
    }

    fn assemble(inner: tokenizers::Tokenizer, config: Value, generation: &Value) -> Self {
        let listed = match generation.get("eos_token_id") {
            Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).collect(),
            Some(id) => id.as_u64().into_iter().collect::<Vec<_>>(),
            None => Vec::new(),
        };
        let mut stop_ids: Vec<u32> = listed.into_iter().filter_map(|id| u32::try_from(id).ok()).collect();
        stop_ids.extend(configured_token(&config, "eos_token").and_then(|token| inner.token_to_id(&token)));
        let mut seen = std::collections::BTreeSet::new();
        stop_ids.retain(|&id| seen.insert(id));
        let number = |key: &str| generation.get(key).and_then(Value::as_f64);
        let generation = GenerationDefaults {
            do_sample: generation.get("do_sample").and_then(Value::as_bool),
            temperature: number("temperature"),
            top_p: number("top_p"),
            top_k: generation.get("top_k").and_then(Value::as_u64).map(|k| k as usize),
            repetition_penalty: number("repetition_penalty"),
        };
        Self { inner, config, stop_ids, generation }
    }

    /// Ids of `text`; special tokens written out in it become their ids, nothing is added.
    ///
    /// # Errors
    /// A data error when the tokenizer cannot encode it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        // The library panics where a pattern of tokenizer.json backtracks without end.
        match files::guarded(|| self.inner.encode(text, false)) {
            Some(Ok(encoding)) => Ok(encoding.get_ids().to_vec()),
            Some(Err(error)) => Err(Error::data(format!("the text cannot be tokenized: {error}"))),
            None => Err(Error::data(
                "the text cannot be tokenized: tokenizer.json is damaged, or one of its patterns backtracks without end",
            )),
        }
    }

    /// Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary become nothing.
    ///
    /// # Errors
    /// A data error when the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        files::guarded(|| self.inner.decode(ids, skip_special_tokens))
            .unwrap_or_else(|| Err("tokenizer.json is damaged".into()))
            .map_err(|error| Error::data(format!("the tokens cannot be decoded: {error}")))
    }

    /// Id of a token, when there is one of exactly this text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Id of a token that must be there.
    ///
    /// # Errors
    /// A data error that names it.
    pub fn require(&self, token: &str) -> Result<u32> {
        self.id(token).ok_or_else(|| Error::data(format!("the tokenizer has no token `{token}`")))
    }

    /// Ids that end an answer: those of `generation_config.json`, then the tokenizer's own.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// The padding token's id, when there is one.
    pub fn pad_id(&self) -> Option<u32> {
        configured_token(&self.config, "pad_token").and_then(|token| self.id(&token))
    }

    /// What `generation_config.json` says about sampling.
    pub fn generation(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// Number of ids, added tokens included; a model's `vocab_size` may be larger.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The contents of `tokenizer_config.json`; null when there was none.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` to `dir`.
    ///
    /// # Errors
    /// An I/O error.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let text = self.inner.to_string(true).map_err(unexpected)?;
        write_text(&dir.join("tokenizer.json"), &text)?;
        write_json(&dir.join("tokenizer_config.json"), &self.config)?;
        let generation = json!({
            "do_sample": self.generation.do_sample,
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.pad_id(),
            "repetition_penalty": self.generation.repetition_penalty,
            "temperature": self.generation.temperature,
            "top_k": self.generation.top_k,
            "top_p": self.generation.top_p,
        });
        let stated: Map<String, Value> = match generation {
            Value::Object(map) => map.into_iter().filter(|(_, value)| !value.is_null()).collect(),
            _ => Map::new(),
        };
        write_json(&dir.join("generation_config.json"), &Value::Object(stated))
    }
}

/// Writes `text` to `path` in one step.
pub(crate) fn write_text(path: &Path, text: &str) -> Result<()> {
    write_atomically(path, |out| {
        out.write_all(text.as_bytes()).map_err(|error| Error::io("cannot write the file", path, error))
    })
}

/// Writes `value` to `path`, indented, in one step.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_text(path, &format!("{value:#}\n"))
}

/// The text of a token in `tokenizer_config.json`, which may be a string or an object.
fn configured_token(config: &Value, key: &str) -> Option<String> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str)).map(String::from)
}

/// Adds the tokens that only `tokenizer_config.json` lists, as older checkpoints have them.
fn add_configured_tokens(inner: &mut tokenizers::Tokenizer, config: &Value, dir: &Path) -> Result<()> {
    let Some(listed) = config.get("added_tokens_decoder").and_then(Value::as_object) else { return Ok(()) };
    let by_id: BTreeMap<u32, &Value> =
        listed.iter().filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
    for (id, token) in by_id {
        let Some(content) = token.get("content").and_then(Value::as_str) else { continue };
        let flag = |key: &str| token.get(key).and_then(Value::as_bool).unwrap_or(false);
        if inner.token_to_id(content).is_none() {
            let added = AddedToken::from(content, flag("special"))
                .normalized(flag("normalized"))
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .single_word(flag("single_word"));
            inner.add_tokens([added]).map_err(unexpected)?;
        }
        if inner.token_to_id(content) != Some(id) {
            return Err(Error::data(format!(
                "tokenizer.json and tokenizer_config.json disagree on the id of `{content}` ({id} in the latter)\n  --> {}",
                dir.display()
            )));
        }
    }
    Ok(())
}

/// Trains a byte-level BPE tokenizer on `texts`: at most `vocab_size` ids, [`SPECIAL_TOKENS`] and `added_tokens`
/// (whole, not special) included, which come after the merges. The same texts give the same tokenizer.
///
/// # Errors
/// A usage error when `vocab_size` cannot hold the 256 bytes and the added tokens.
pub fn train_bpe(texts: &[String], vocab_size: usize, added_tokens: &[&str]) -> Result<Tokenizer> {
    let extra = SPECIAL_TOKENS.len() + added_tokens.len();
    if vocab_size < 256 + extra {
        return Err(Error::usage(format!(
            "a vocabulary of {vocab_size} is too small: 256 bytes and {extra} added tokens need {}",
            256 + extra
        )));
    }
    let mut inner = tokenizers::Tokenizer::new(BPE::default());
    let pieces = Split::new(SplitPattern::Regex(PIECES.to_string()), SplitDelimiterBehavior::Isolated, false)
        .map_err(unexpected)?;
    let bytes = ByteLevel::new(false, false, false);
    inner.with_normalizer(Some(NFC)).map_err(unexpected)?;
    inner.with_pre_tokenizer(Some(Sequence::new(vec![pieces.into(), bytes.into()])));
    inner.with_decoder(Some(bytes));
    inner.with_post_processor(Some(bytes));
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size - extra)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    inner.train(&mut TrainerWrapper::from(trainer), texts.iter()).map_err(unexpected)?;
    let special = SPECIAL_TOKENS.iter().map(|token| AddedToken::from(*token, true).normalized(false));
    let ordinary = added_tokens.iter().map(|token| AddedToken::from(*token, false).normalized(false));
    inner.add_tokens(special.chain(ordinary)).map_err(unexpected)?;
    let config = json!({
        "add_prefix_space": false,
        "additional_special_tokens": SPECIAL_TOKENS[1..].to_vec(),
        "bos_token": null,
        "clean_up_tokenization_spaces": false,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_max_length": 131_072,
        "pad_token": DOCUMENT_END,
        "split_special_tokens": false,
        // The generic class keeps the pieces above; Qwen's own class would put back its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": null,
    });
    let generation = json!({
        "do_sample": false,
        "eos_token_id": [inner.token_to_id(TURN_END), inner.token_to_id(DOCUMENT_END)],
    });
    Ok(Tokenizer::assemble(inner, config, &generation))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::test_support::{fixture_json, fixtures, numbers};
    use tempfile::tempdir;

    fn corpus() -> Vec<String> {
        let mut texts = Vec::new();
        for place in ["upper-left", "upper-right", "lower-left"] {
            for thing in ["nodule", "bleed", "fracture"] {
                for _ in 0..5 {
                    texts.push(format!("There is a {thing} in the {place} part. A) {thing}\nB) none"));
                }
            }
        }
        texts
    }

    #[test]
    fn hyphenated_and_frequent_words_become_single_tokens() {
        let tokenizer = train_bpe(&corpus(), 500, &REASONING_TOKENS).unwrap();
        for word in [" upper-left", " lower-left", " nodule", " fracture", "<think>", "</answer>", IMAGE_PAD]
        {
            assert_eq!(tokenizer.encode(word).unwrap().len(), 1, "{word:?}");
        }
        assert!(tokenizer.encode(" lower-right").unwrap().len() > 1);
        assert_eq!(
            tokenizer.stop_ids(),
            [tokenizer.id(TURN_END).unwrap(), tokenizer.id(DOCUMENT_END).unwrap()]
        );
        assert_eq!(tokenizer.pad_id(), tokenizer.id(DOCUMENT_END));
        assert!(tokenizer.len() <= 500);
    }

    #[test]
    fn any_text_comes_back_and_special_tokens_can_be_left_out() {
        let tokenizer = train_bpe(&corpus(), 300, &REASONING_TOKENS).unwrap();
        for text in ["", " x  y\n\n", "Grüße 患者 😀", "<think>\na\n</think><answer>B</answer>"] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
        let ids = tokenizer.encode("B<|im_end|>").unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "B");
        assert_eq!(tokenizer.decode(&[100_000], false).unwrap(), "");
    }

    #[test]
    fn training_repeats_exactly_and_survives_saving() {
        let dir = tempdir().unwrap();
        let bytes = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
        let first = train_bpe(&corpus(), 400, &REASONING_TOKENS).unwrap();
        first.save(dir.path()).unwrap();
        let saved = bytes("tokenizer.json");
        for _ in 0..5 {
            train_bpe(&corpus(), 400, &REASONING_TOKENS).unwrap().save(dir.path()).unwrap();
            assert!(saved == bytes("tokenizer.json"));
        }
        let again = Tokenizer::load(dir.path()).unwrap();
        let text = "<|im_start|>user\nThe upper-left nodule<|im_end|>\n";
        assert_eq!(again.encode(text).unwrap(), first.encode(text).unwrap());
        assert_eq!(again.stop_ids(), first.stop_ids());
        assert_eq!(again.generation(), first.generation());
        again.save(dir.path()).unwrap();
        assert!(saved == bytes("tokenizer.json"));
    }

    #[test]
    fn a_vocabulary_without_room_for_bytes_is_refused() {
        assert!(matches!(train_bpe(&corpus(), 200, &[]), Err(Error::Usage(_))));
        assert!(train_bpe(&[], 264, &[]).is_ok());
    }

    #[test]
    fn missing_and_damaged_files_are_named() {
        let dir = tempdir().unwrap();
        assert!(Tokenizer::load(dir.path()).unwrap_err().to_string().contains("no tokenizer.json"));
        std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Data(_)) && error.to_string().contains("tokenizer.json"), "{error}");
        train_bpe(&corpus(), 300, &[]).unwrap().save(dir.path()).unwrap();
        std::fs::write(dir.path().join("generation_config.json"), "[").unwrap();
        assert!(Tokenizer::load(dir.path()).unwrap_err().to_string().contains("generation_config.json"));
    }

    #[test]
    fn tokens_of_the_configuration_alone_are_added_and_contradictions_refused() {
        let dir = tempdir().unwrap();
        let trained = train_bpe(&corpus(), 300, &[]).unwrap();
        trained.save(dir.path()).unwrap();
        let write = |id: usize| {
            let mut config = trained.config().clone();
            config["added_tokens_decoder"] = json!({id.to_string(): {"content": "<extra>", "special": true}});
            write_json(&dir.path().join("tokenizer_config.json"), &config).unwrap();
            Tokenizer::load(dir.path())
        };
        let extended = write(trained.len()).unwrap();
        assert_eq!(extended.encode("a<extra>").unwrap().last(), Some(&(trained.len() as u32)));
        assert!(write(trained.len() + 5).unwrap_err().to_string().contains("`<extra>`"));
    }

    #[test]
    fn every_case_of_the_reference_tokenizers_is_equal() {
        let Some(dir) = fixtures() else { return };
        for name in ["tiny", "qwen_real"] {
            let tokenizer = Tokenizer::load(&dir.join("tokenizer").join(name)).unwrap();
            let cases = fixture_json(&dir.join(format!("tokenizer/{name}_cases.json")));
            assert_eq!(cases["vocab_size_with_added"], tokenizer.len(), "{name}");
            for case in cases["cases"].as_array().unwrap() {
                let ids: Vec<u32> = numbers(&case["ids"]);
                assert_eq!(tokenizer.encode(case["text"].as_str().unwrap()).unwrap(), ids, "{name} {case}");
                assert_eq!(case["decoded"], tokenizer.decode(&ids, false).unwrap(), "{name}");
                assert_eq!(case["decoded_skip_special"], tokenizer.decode(&ids, true).unwrap(), "{name}");
            }
            for case in cases["decode_only"].as_array().unwrap() {
                assert_eq!(case["decoded"], tokenizer.decode(&numbers::<u32>(&case["ids"]), false).unwrap());
            }
        }
        let checkpoint = Tokenizer::load(&dir.join("checkpoints/qwen2_5_vl")).unwrap();
        assert_eq!(checkpoint.stop_ids(), [2014, 2012]);
        assert_eq!(checkpoint.generation().repetition_penalty, Some(1.05));
    }
}
