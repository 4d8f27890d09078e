//! Conversations to prompt text, through the checkpoint's own Jinja template, and placeholders to image tokens.
//!
//! Templates are written for Python's jinja2 as transformers sets it up: blocks trimmed, Python's string methods,
//! `raise_exception`, `tojson`. Tokens are not known here beyond the image placeholder.

use super::tokenizer::{IMAGE_PAD, optional_json};
use crate::error::{Error, Result};
use crate::files;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, context};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;

/// Longest template, in bytes; published ones have a few thousand.
const MOST_TEMPLATE: usize = 1 << 16;
/// Longest text that a template may write, in bytes.
const MOST_TEXT: usize = 1 << 24;

/// The template of models built here: a user turn holds images and text, nothing is added on its own.
pub const DEFAULT_TEMPLATE: &str = "\
{%- set images = namespace(count=0) -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part -%}
{%- set images.count = images.count + 1 -%}
{%- if add_vision_id -%}Picture {{ images.count }}: {% endif -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
";

/// One piece of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// An image stands here; which one follows from the order.
    Image,
    /// Text.
    Text(String),
}

/// What a turn says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// Images and texts in order.
    Parts(Vec<Part>),
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What it says.
    pub content: Content,
}

impl Message {
    /// A turn of plain text.
    pub fn text(role: &str, text: impl Into<String>) -> Self {
        Self { role: role.to_string(), content: Content::Text(text.into()) }
    }

    /// A user's turn of one image and the text about it.
    pub fn image_question(text: impl Into<String>) -> Self {
        Self { role: "user".to_string(), content: Content::Parts(vec![Part::Image, Part::Text(text.into())]) }
    }

    fn to_json(&self) -> Value {
        let content = match &self.content {
            Content::Text(text) => json!(text),
            Content::Parts(parts) => parts
                .iter()
                .map(|part| match part {
                    Part::Image => json!({"type": "image"}),
                    Part::Text(text) => json!({"type": "text", "text": text}),
                })
                .collect(),
        };
        json!({"role": self.role, "content": content})
    }
}

/// How to render a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RenderOptions {
    /// Open the assistant's turn at the end.
    pub add_generation_prompt: bool,
    /// Number the images (`Picture 1: `).
    pub add_vision_id: bool,
}

/// A checkpoint's chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// `bos_token`, `eos_token` and the like, which templates may mention.
    tokens: Map<String, Value>,
}

impl ChatTemplate {
    /// A template from its text.
    ///
    /// # Errors
    /// A data error when it is not valid Jinja.
    pub fn new(source: &str) -> Result<Self> {
        if source.len() > MOST_TEMPLATE {
            return Err(Error::data(format!(
                "the chat template is {} bytes long, more than the {MOST_TEMPLATE} allowed",
                source.len()
            )));
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment.add_filter("indent", indent);
        // They fill up to any length asked for, and no conversation needs them.
        environment.remove_filter("batch");
        environment.remove_filter("slice");
        // So that neither time nor text is without end: every instruction may write a piece of the template.
        let fuel = (MOST_TEXT as u64 * 16 / source.len().max(1) as u64).clamp(10_000, 1_000_000);
        environment.set_fuel(Some(fuel));
        environment.set_recursion_limit(100);
        // The parser recurses for every operator of a chain.
        files::on_deep_stack(|| environment.add_template_owned("chat", source.to_string()))?
            .map_err(|error| Error::data(format!("the chat template is not valid: {error:#}")))?;
        Ok(Self { environment, source: source.to_string(), tokens: Map::new() })
    }

    /// The template of `dir`, from `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`, whichever
    /// is found first.
    ///
    /// # Errors
    /// A data error when there is none, or it is not valid.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = optional_json(&dir.join("tokenizer_config.json"))?;
        let jinja = dir.join("chat_template.jinja");
        let source = if jinja.exists() {
            files::read_text(&jinja, "cannot read the chat template")?
        } else {
            let nested = optional_json(&dir.join("chat_template.json"))?;
            template_text(nested.get("chat_template")).or_else(|| template_text(config.get("chat_template"))).ok_or_else(
                || {
                    Error::data(format!(
                        "no chat template\n  --> {}\n   = help: chat_template.jinja, chat_template.json or tokenizer_config.json must hold one",
                        dir.display()
                    ))
                },
            )?
        };
        let mut template = Self::new(&source).map_err(|error| match error {
            Error::Data(message) => Error::data(format!("{message}\n  --> {}", dir.display())),
            other => other,
        })?;
        for key in ["bos_token", "eos_token", "pad_token", "unk_token"] {
            let text = config.get(key).and_then(|token| token.get("content").unwrap_or(token).as_str());
            if let Some(text) = text {
                template.tokens.insert(key.to_string(), json!(text));
            }
        }
        Ok(template)
    }

    /// The template of models built here.
    ///
    /// # Errors
    /// None in practice: [`DEFAULT_TEMPLATE`] is valid.
    pub fn default_template() -> Result<Self> {
        Self::new(DEFAULT_TEMPLATE)
    }

    /// The template's text, for saving and for provenance.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for `messages`, with one placeholder per image.
    ///
    /// # Errors
    /// A data error when the template refuses the conversation.
    pub fn render(&self, messages: &[Message], options: RenderOptions) -> Result<String> {
        let messages: Vec<Value> = messages.iter().map(Message::to_json).collect();
        self.render_json(&Value::Array(messages), options)
    }

    /// As [`Self::render`], for messages in the form of transformers' `apply_chat_template`.
    ///
    /// # Errors
    /// As [`Self::render`].
    pub fn render_json(&self, messages: &Value, options: RenderOptions) -> Result<String> {
        let wrong = |error: minijinja::Error| {
            let detail = match error.kind() {
                ErrorKind::OutOfFuel => "it does not come to an end".to_owned(),
                _ => error.detail().map_or_else(|| error.to_string(), String::from),
            };
            Error::data(format!("the chat template refuses the conversation: {detail}"))
        };
        let values = || {
            context! {
                messages => minijinja::Value::from_serialize(messages),
                add_generation_prompt => options.add_generation_prompt,
                add_vision_id => options.add_vision_id,
                ..minijinja::Value::from_serialize(&self.tokens),
            }
        };
        // A template can make values as deep as it likes.
        let text = files::on_deep_stack(|| {
            let mut text = Bounded(Vec::new());
            self.environment.get_template("chat")?.render_captured_to(values(), &mut text)?;
            Ok(text.0)
        })?;
        String::from_utf8(text.map_err(wrong)?).map_err(|error| Error::Other(error.into()))
    }
}

/// Text up to [`MOST_TEXT`] bytes.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MOST_TEXT {
            return Err(std::io::Error::other("it writes without end"));
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// minijinja's filter, for indents of this world.
#[expect(clippy::needless_pass_by_value, reason = "the form of a filter's arguments")]
fn indent(
    value: &str,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let width = checked_indent(width.map_or_else(|| options.get("width"), |width| Ok(Some(width)))?)?;
    let is_first =
        first.map_or_else(|| options.get::<Option<bool>>("first"), |is| Ok(Some(is)))? == Some(true);
    let is_blank =
        blank.map_or_else(|| options.get::<Option<bool>>("blank"), |is| Ok(Some(is)))? == Some(true);
    options.assert_all_used()?;
    let space = " ".repeat(width.unwrap_or(4));
    let line = |(index, line): (usize, &str)| match (index, line) {
        (0, _) if !is_first => line.to_owned(),
        (_, "") if !is_blank => String::new(),
        _ => format!("{space}{line}"),
    };
    Ok(value
        .strip_suffix('\n')
        .unwrap_or(value)
        .split('\n')
        .enumerate()
        .map(line)
        .collect::<Vec<_>>()
        .join("\n"))
}

fn checked_indent(width: Option<usize>) -> std::result::Result<Option<usize>, minijinja::Error> {
    match width {
        Some(width) if width > 64 => {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("an indent of {width} is absurd")))
        }
        width => Ok(width),
    }
}

/// The template in a JSON value: a string, or a list of named ones of which `default` is ours.
fn template_text(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(String::from),
        _ => None,
    }
}

/// Python's `json.dumps(value, ensure_ascii=False)`: a space after commas and colons, nothing escaped for HTML.
#[expect(clippy::needless_pass_by_value, reason = "the form of a filter's arguments")]
fn to_json(
    value: &minijinja::Value,
    options: Kwargs,
) -> std::result::Result<minijinja::Value, minijinja::Error> {
    let indent = checked_indent(options.get("indent")?)?;
    for ignored in ["ensure_ascii", "sort_keys", "separators"] {
        let _: Option<minijinja::Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let value = serde_json::to_value(value)
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut text = String::new();
    write_python_json(&value, indent, 0, &mut text);
    Ok(minijinja::Value::from_safe_string(text))
}

fn write_python_json(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) {
    let newline = |out: &mut String, depth: usize| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let separator = if indent.is_some() { "," } else { ", " };
    match value {
        Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index > 0 { separator } else { "" });
                newline(out, depth + 1);
                write_python_json(item, indent, depth + 1, out);
            }
            newline(out, depth);
            out.push(']');
        }
        Value::Object(entries) if !entries.is_empty() => {
            out.push('{');
            for (index, (key, entry)) in entries.iter().enumerate() {
                out.push_str(if index > 0 { separator } else { "" });
                newline(out, depth + 1);
                out.push_str(&json!(key).to_string());
                out.push_str(": ");
                write_python_json(entry, indent, depth + 1, out);
            }
            newline(out, depth);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

/// Replaces the one placeholder of each image by as many as it has tokens: `t · h · w / spatial_merge_size²`.
///
/// # Errors
/// A data error when there are not exactly as many placeholders as images.
pub fn expand_image_tokens(ids: &[u32], image_token_id: u32, tokens_per_image: &[usize]) -> Result<Vec<u32>> {
    let found = ids.iter().filter(|&&id| id == image_token_id).count();
    if found != tokens_per_image.len() {
        return Err(Error::data(format!(
            "the prompt has {found} `{IMAGE_PAD}` placeholders for {} images\n   = help: the question's text must not contain `{IMAGE_PAD}`",
            tokens_per_image.len()
        )));
    }
    let mut counts = tokens_per_image.iter();
    let mut out = Vec::with_capacity(ids.len() + tokens_per_image.iter().sum::<usize>());
    for &id in ids {
        let count = if id == image_token_id { counts.next().copied().unwrap_or(0) } else { 1 };
        out.extend(std::iter::repeat_n(id, count));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::positions::image_tokens;
    use crate::model::test_support::{fixture_json, fixtures, numbers};
    use crate::model::tokenizer::Tokenizer;
    use tempfile::tempdir;

    const GENERATE: RenderOptions = RenderOptions { add_generation_prompt: true, add_vision_id: false };

    #[test]
    fn the_default_template_writes_turns_images_and_the_opening_of_the_answer() {
        let template = ChatTemplate::default_template().unwrap();
        let messages = [
            Message::text("system", " Be brief.\n"),
            Message::image_question("What is this?"),
            Message::text("assistant", "<answer>B</answer>"),
        ];
        let text = template.render(&messages, RenderOptions::default()).unwrap();
        assert_eq!(
            text,
            "<|im_start|>system\n Be brief.\n<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n<answer>B</answer><|im_end|>\n"
        );
        let prompt = template.render(&messages[..2], GENERATE).unwrap();
        assert!(text.starts_with(&prompt) && prompt.ends_with("<|im_start|>assistant\n"), "{prompt:?}");
        let numbered = RenderOptions { add_vision_id: true, ..GENERATE };
        assert!(template.render(&messages, numbered).unwrap().contains("\nPicture 1: <|vision_start|>"));
    }

    #[test]
    fn python_idioms_of_published_templates_work() {
        let render = |source: &str| {
            let messages = [Message::text("user", "  Hi there\n")];
            ChatTemplate::new(source).unwrap().render(&messages, GENERATE)
        };
        let first = "{% set text = messages[0].content %}";
        for (source, want) in [
            ("{{ text.strip() }}", "Hi there"),
            ("{{ text.split(' ')[-1].rstrip('\\n') }}", "there"),
            ("{% if text.startswith('  ') %}yes{% endif %}", "yes"),
            ("{{ messages[::-1][0]['role'] }}", "user"),
            ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
            ("{{ {'a': [1, '<ü>', none]} | tojson }}", r#"{"a": [1, "<ü>", null]}"#),
            ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
            ("{% if tools %}no{% else %}none{% endif %}", "none"),
            ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
            ("{% if true %}\n    {% if true %}\nx{% endif %}{% endif %}", "x"),
        ] {
            assert_eq!(render(&format!("{first}{source}")).unwrap(), want, "{source}");
        }
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert!(
            matches!(error, Error::Data(_)) && error.to_string().contains("roles must alternate"),
            "{error}"
        );
        assert!(ChatTemplate::new("{% if %}").unwrap_err().to_string().contains("not valid"));
    }

    #[test]
    fn a_template_is_found_in_its_three_places_in_order() {
        let dir = tempdir().unwrap();
        let rendered =
            || ChatTemplate::load(dir.path()).map(|template| template.render(&[], GENERATE).unwrap());
        assert!(rendered().unwrap_err().to_string().contains("no chat template"));
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "tokenizer_config.json",
            r#"{"chat_template": "config {{ eos_token }}", "eos_token": {"content": "<e>"}}"#,
        );
        assert_eq!(rendered().unwrap(), "config <e>");
        let named = r#"{"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "named"}]}"#;
        write("tokenizer_config.json", named);
        assert_eq!(rendered().unwrap(), "named");
        write("chat_template.json", r#"{"chat_template": "json"}"#);
        assert_eq!(rendered().unwrap(), "json");
        write("chat_template.jinja", "jinja\n");
        assert_eq!(rendered().unwrap(), "jinja");
    }

    #[test]
    fn placeholders_are_expanded_one_image_at_a_time() {
        assert_eq!(expand_image_tokens(&[1, 9, 2, 9], 9, &[3, 1]).unwrap(), [1, 9, 9, 9, 2, 9]);
        assert_eq!(expand_image_tokens(&[1, 2], 9, &[]).unwrap(), [1, 2]);
        assert!(expand_image_tokens(&[1, 9], 9, &[]).is_err());
        assert!(expand_image_tokens(&[1, 9], 9, &[1, 1]).is_err());
    }

    #[test]
    fn every_rendered_prompt_of_the_reference_is_equal() {
        let Some(dir) = fixtures() else { return };
        let tokenizer = Tokenizer::load(&dir.join("tokenizer/tiny")).unwrap();
        for case in fixture_json(&dir.join("chat_cases.json")).as_array().unwrap() {
            let family = case["family"].as_str().unwrap();
            let template = ChatTemplate::load(&dir.join("checkpoints").join(family)).unwrap();
            let flag = |key: &str| case[key].as_bool().unwrap();
            let options = RenderOptions {
                add_generation_prompt: flag("add_generation_prompt"),
                add_vision_id: flag("add_vision_id"),
            };
            let text = template.render_json(&case["messages"], options).unwrap();
            assert_eq!(case["text"], text, "{family} {}", case["case"]);
            assert_eq!(tokenizer.encode(&text).unwrap(), numbers::<u32>(&case["ids"]));
        }
        assert!(ChatTemplate::load(&dir.join("checkpoints/qwen2_5_vl_legacy")).is_ok());
    }

    #[test]
    fn expanded_prompts_of_the_reference_are_equal() {
        let Some(dir) = fixtures() else { return };
        for name in ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] {
            let tokenizer = Tokenizer::load(&dir.join("checkpoints").join(name)).unwrap();
            let image = tokenizer.require(IMAGE_PAD).unwrap();
            let expected = fixture_json(&dir.join(format!("expected/{name}.json")));
            for (case, row) in expected["cases"].as_object().unwrap() {
                let ids = tokenizer.encode(row["prompt"].as_str().unwrap()).unwrap();
                let grids = row.get("image_grid_thw").map_or(&[][..], |grids| grids.as_array().unwrap());
                let counts: Vec<usize> =
                    grids.iter().map(|grid| image_tokens(numbers(grid).try_into().unwrap(), 2)).collect();
                let expanded = expand_image_tokens(&ids, image, &counts).unwrap();
                assert_eq!(expanded, numbers::<u32>(&row["input_ids"]), "{name} {case}");
            }
        }
    }
}
