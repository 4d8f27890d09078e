//! TensorBoard event files: the same bytes for the same run, at any time on any machine. Scalars are made from metrics, texts
//! from completions, images from the PNG files under `images/`, so that the file can always be made anew.
//!
//! Deviation: `wall_time` holds the step instead of the clock, so that a resumed run leaves the same file. Framing comes
//! from `tensorboard-rs`; its writer is not used, since it names files by host and clock and panics on a full disk.

use crate::error::{Error, Result};
use serde_json::Value;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use tensorboard_rs::record_writer::RecordWriter;

/// Pictures of a step, in the order shown, each `NAME.png` in the step's folder.
pub(super) const PICTURES: [&str; 3] = ["clean", "adversarial", "difference"];

/// Bytes gathered before they are written.
const AT_ONCE: usize = 1 << 20;

/// Writes `tensorboard/` of a run directory.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    /// Lines of metrics written: the step of TensorBoard's axis. One is one update of the optimiser, so it is the training step
    /// where a step makes one update.
    lines: u64,
}

/// What one training step shows.
#[derive(Debug, Default)]
pub(super) struct Shown<'a> {
    /// Its lines of `metrics.jsonl`, at least one.
    pub(super) metrics: &'a [Value],
    /// Its lines of `completions.jsonl`; none where it shows no text.
    pub(super) completions: &'a [Value],
    /// The folder that holds its pictures, if it has any.
    pub(super) pictures: PathBuf,
    /// Where it stands on TensorBoard's axis, if not behind the line before.
    pub(super) at: Option<u64>,
}

impl EventFile {
    /// The event file under `dir`; it is created by the first event.
    pub(super) fn new(dir: &Path) -> Self {
        Self { path: dir.join("events.out.tfevents.0000000000.safemed"), lines: 0 }
    }

    /// Adds training steps: of each every number of its metrics under its own name, then texts, then pictures.
    pub(super) fn write<'a>(&mut self, steps: impl IntoIterator<Item = Shown<'a>>) -> Result<()> {
        let path = self.path.clone();
        let io = |error| Error::io("cannot write the event file", &path, error);
        let mut bytes = Vec::new();
        let mut is_new = !path.exists();
        for step in steps {
            let mut writer = RecordWriter::new(&mut bytes);
            if std::mem::take(&mut is_new) {
                writer.write(&version_event()).map_err(io)?;
            }
            for metrics in step.metrics {
                self.lines = step.at.unwrap_or(self.lines + 1);
                let mut scalars = Vec::new();
                push_scalars(&mut scalars, "", metrics);
                writer.write(&event(self.lines, &scalars)).map_err(io)?;
            }
            for summary in [text_summary(step.completions), picture_summary(&step.pictures)?] {
                if !summary.is_empty() {
                    writer.write(&event(self.lines, &summary)).map_err(io)?;
                }
            }
            if bytes.len() > AT_ONCE {
                append_bytes(&path, &std::mem::take(&mut bytes)).map_err(io)?;
            }
        }
        if bytes.is_empty() { Ok(()) } else { append_bytes(&path, &bytes).map_err(io) }
    }

    /// Removes the file, to be written anew from the first step.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.lines = 0;
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("cannot replace the event file", &self.path, error))
            }
            _ => Ok(()),
        }
    }
}

fn append_bytes(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut file: File = OpenOptions::new().create(true).append(true).open(path)?;
    std::io::Write::write_all(&mut file, bytes)
}

/// Event { 1: wall_time double, 3: file_version string }.
fn version_event() -> Vec<u8> {
    let mut event = vec![0x09];
    event.extend(0.0f64.to_le_bytes());
    push_bytes(&mut event, 3, b"brain.Event:2");
    event
}

/// Event { 1: wall_time double, 2: step varint, 5: Summary }.
fn event(step: u64, summary: &[u8]) -> Vec<u8> {
    let mut event = vec![0x09];
    event.extend((step as f64).to_le_bytes());
    event.push(0x10);
    push_varint(&mut event, step);
    push_bytes(&mut event, 5, summary);
    event
}

/// Summary { 1: Value { 1: tag string, 2: simple_value float } }, a value for each number. Numbers of nested objects are named
/// by path: `rewards/accuracy`.
fn push_scalars(summary: &mut Vec<u8>, prefix: &str, metrics: &Value) {
    for (name, value) in metrics.as_object().into_iter().flatten() {
        let tag = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
        match value {
            // What places a line, not what it measures.
            Value::Number(number) if tag != "step" && tag != "update" => {
                let mut scalar = Vec::new();
                push_bytes(&mut scalar, 1, tag.as_bytes());
                scalar.push(0x15);
                scalar.extend((number.as_f64().unwrap_or(f64::NAN) as f32).to_le_bytes());
                push_bytes(summary, 1, &scalar);
            }
            Value::Object(_) => push_scalars(summary, &tag, value),
            _ => {}
        }
    }
}

/// A summary with one text for each question, `completions/1` and so on; empty without completions.
fn text_summary(completions: &[Value]) -> Vec<u8> {
    let mut summary = Vec::new();
    for group in completions.chunk_by(|a, b| a["group"] == b["group"]) {
        let place = group[0]["group"].as_u64().unwrap_or(0);
        let text = markdown(group);
        push_tensor(
            &mut summary,
            &format!("completions/{}", place.saturating_add(1)),
            "text",
            &[text.as_bytes()],
        );
    }
    summary
}

/// A question and its completions, with whatever was measured about each. What people and models wrote is indented, so that
/// nothing in it is taken for Markdown.
fn markdown(group: &[Value]) -> String {
    let first = &group[0];
    let word = |value: &Value| match value {
        Value::String(text) => text.replace('`', "'").replace('\n', " "),
        other => other.to_string(),
    };
    let mut text = format!("`{}`", word(&first["id"]));
    if first["attacked"] == true {
        text.push_str(", attacked");
    }
    let _ = write!(text, ", right answer `{}`\n\n{}", word(&first["answer"]), indented(&first["prompt"]));
    for line in group {
        let mut facts = Vec::new();
        for (name, value) in line.as_object().into_iter().flatten() {
            match value.as_f64() {
                Some(_) if ["step", "group", "seed"].contains(&name.as_str()) => {}
                Some(number) if name == "length" => facts.push(format!("{number} tokens")),
                Some(number) => facts.push(format!("{name} {}", (number * 1e4).round() / 1e4)),
                None => {}
            }
        }
        if line["is_finished"] == false {
            facts.push("cut off".to_owned());
        }
        let _ = write!(text, "\n***\n\n{}\n\n{}", facts.join(", "), indented(&line["completion"]));
    }
    text
}

/// A text as a code block of Markdown.
fn indented(text: &Value) -> String {
    text.as_str().unwrap_or_default().lines().fold(String::new(), |mut block, line| {
        let _ = writeln!(block, "    {line}");
        block
    })
}

/// A summary with the pictures of one step as the images plugin wants them: width, height and the PNG file. Empty without any.
fn picture_summary(folder: &Path) -> Result<Vec<u8>> {
    let mut summary = Vec::new();
    for name in PICTURES {
        let path = folder.join(format!("{name}.png"));
        let png = match fs::read(&path) {
            Ok(png) => png,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io("cannot read the picture", &path, error)),
        };
        let [width, height] = png_size(&png)
            .ok_or_else(|| {
                Error::data(format!(
                    "the picture is no PNG file\n  --> {}\n   = help: remove it: TensorBoard's events are then made without it",
                    path.display()
                ))
            })?
            .map(|side| side.to_string());
        push_tensor(
            &mut summary,
            &format!("images/{name}"),
            "images",
            &[width.as_bytes(), height.as_bytes(), &png],
        );
    }
    Ok(summary)
}

/// Width and height, from the header chunk that a PNG file begins with.
fn png_size(png: &[u8]) -> Option<[u32; 2]> {
    let is_png = png.starts_with(b"\x89PNG\r\n\x1a\n") && png.get(12..16)? == b"IHDR";
    let side = |at: usize| Some(u32::from_be_bytes(png.get(at..at + 4)?.try_into().ok()?));
    if is_png { Some([side(16)?, side(20)?]) } else { None }
}

/// DataType DT_STRING.
const DT_STRING: u8 = 7;

/// Summary { 1: Value { 1: tag, 9: SummaryMetadata { 1: PluginData { 1: plugin_name }, 4: data_class }, 8: TensorProto { 1: dtype,
/// 2: TensorShapeProto { 2: Dim { 1: size } }, 8: string_val ... } } }: a scalar text, or a list of byte strings.
fn push_tensor(summary: &mut Vec<u8>, tag: &str, plugin: &str, strings: &[&[u8]]) {
    // DATA_CLASS_TENSOR, DATA_CLASS_BLOB_SEQUENCE.
    let data_class = if plugin == "text" { 2 } else { 3 };
    let (mut plugin_data, mut metadata) = (Vec::new(), Vec::new());
    push_bytes(&mut plugin_data, 1, plugin.as_bytes());
    push_bytes(&mut metadata, 1, &plugin_data);
    metadata.extend([0x20, data_class]);
    let (mut shape, mut tensor) = (Vec::new(), vec![0x08, DT_STRING]);
    if plugin != "text" {
        let mut dim = vec![0x08];
        push_varint(&mut dim, strings.len() as u64);
        push_bytes(&mut shape, 2, &dim);
    }
    push_bytes(&mut tensor, 2, &shape);
    for string in strings {
        push_bytes(&mut tensor, 8, string);
    }
    let mut value = Vec::new();
    push_bytes(&mut value, 1, tag.as_bytes());
    push_bytes(&mut value, 9, &metadata);
    push_bytes(&mut value, 8, &tensor);
    push_bytes(summary, 1, &value);
}

fn push_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn push_bytes(bytes: &mut Vec<u8>, field: u8, content: &[u8]) {
    bytes.push(field << 3 | 2);
    push_varint(bytes, content.len() as u64);
    bytes.extend_from_slice(content);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pixels::RgbImage8;
    use crate::pixels::decode::{decode_file, encode_png};
    use protobuf::Message as _;
    use serde_json::json;
    use tensorboard_proto::event::Event;
    use tensorboard_proto::summary::Summary_Value;
    use tensorboard_proto::tensor_shape::TensorShapeProto_Dim;

    /// The records of an event file (TFRecord: length, its checksum, data, its checksum), read by the schema that TensorBoard
    /// publishes.
    fn events(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let (mut rest, mut events) = (bytes.as_slice(), Vec::new());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            events.push(Event::parse_from_bytes(&rest[12..12 + length]).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    fn strings(value: &Summary_Value) -> Vec<Vec<u8>> {
        value.get_tensor().get_string_val().to_vec()
    }

    #[test]
    fn an_event_is_the_protobuf_message_that_tensorboard_reads() {
        // Encoded by hand from event.proto and summary.proto.
        let expected = [
            &[0x09][..],
            &300.0f64.to_le_bytes(),
            &[0x10, 0xac, 0x02, 0x2a, 0x0d, 0x0a, 0x0b, 0x0a, 0x04],
            b"loss",
            &[0x15],
            &0.25f32.to_le_bytes(),
        ]
        .concat();
        let mut scalars = Vec::new();
        push_scalars(&mut scalars, "", &json!({"step": 300, "update": 2, "loss": 0.25, "note": "x"}));
        assert_eq!(event(300, &scalars), expected);
    }

    #[test]
    fn texts_and_pictures_are_read_back_by_tensorboards_schema() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = EventFile::new(&dir.path().join("tensorboard"));
        let folder = dir.path().join("images/step-2");
        fs::create_dir_all(&folder).unwrap();
        let picture = RgbImage8::new(3, 2, (0..18).collect()).unwrap();
        for name in ["clean", "difference"] {
            fs::write(folder.join(format!("{name}.png")), encode_png(&picture).unwrap()).unwrap();
        }
        let line = |group: usize, text: &str, advantage: f64| {
            json!({"step": 2, "group": group, "id": "a`b", "attacked": group == 0, "answer": "B", "prompt": "Which?\n# A", "seed": 9,
                   "completion": text, "reward": 1.5, "advantage": advantage, "is_finished": group == 0, "length": 7})
        };
        let completions = [line(0, "<think> x\n* y", 0.12346), line(0, "B", -0.5), line(1, "", 0.0)];
        let one = [json!({"step": 1, "loss": 0.5})];
        file.write([Shown { metrics: &one, ..Shown::default() }]).unwrap();
        let two =
            [json!({"step": 2, "update": 1, "loss": 0.25}), json!({"step": 2, "update": 2, "loss": 0.125})];
        file.write([Shown { metrics: &two, completions: &completions, pictures: folder.clone(), at: None }])
            .unwrap();

        let events = events(&file.path);
        assert_eq!(events[0].get_file_version(), "brain.Event:2");
        let steps: Vec<i64> = events.iter().map(Event::get_step).collect();
        assert_eq!(steps, [0, 1, 2, 3, 3, 3], "each update has a step of its own");
        let scalar = &events[3].get_summary().get_value()[0];
        assert_eq!((scalar.get_tag(), scalar.get_simple_value()), ("loss", 0.125));

        let texts = events[4].get_summary().get_value();
        let tags: Vec<&str> = texts.iter().map(Summary_Value::get_tag).collect();
        assert_eq!(tags, ["completions/1", "completions/2"]);
        assert_eq!(texts[0].get_metadata().get_plugin_data().get_plugin_name(), "text");
        assert_eq!(texts[0].get_tensor().get_dtype(), tensorboard_proto::types::DataType::DT_STRING);
        assert!(texts[0].get_tensor().has_tensor_shape());
        assert!(
            texts[0].get_tensor().get_tensor_shape().get_dim().is_empty(),
            "a scalar, or it becomes a table"
        );
        let text = String::from_utf8(strings(&texts[0]).remove(0)).unwrap();
        assert_eq!(
            text,
            "`a'b`, attacked, right answer `B`\n\n    Which?\n    # A\n\n***\n\nreward 1.5, advantage 0.1235, 7 tokens\n\n    \
             <think> x\n    * y\n\n***\n\nreward 1.5, advantage -0.5, 7 tokens\n\n    B\n"
        );
        assert!(strings(&texts[1])[0].ends_with(b"reward 1.5, advantage 0, 7 tokens, cut off\n\n"));

        let pictures = events[5].get_summary().get_value();
        let tags: Vec<&str> = pictures.iter().map(Summary_Value::get_tag).collect();
        assert_eq!(tags, ["images/clean", "images/difference"]);
        assert_eq!(pictures[0].get_metadata().get_plugin_data().get_plugin_name(), "images");
        let shape = pictures[0].get_tensor().get_tensor_shape().get_dim();
        assert_eq!(shape.iter().map(TensorShapeProto_Dim::get_size).collect::<Vec<_>>(), [3]);
        let values = strings(&pictures[0]);
        assert_eq!((&values[0][..], &values[1][..]), (&b"3"[..], &b"2"[..]));
        fs::write(dir.path().join("read.png"), &values[2]).unwrap();
        assert_eq!(decode_file(&dir.path().join("read.png")).unwrap(), picture);
        // data_class 3, a field that is younger than the schema at hand: kept among what it does not know.
        let unknown = |value: &Summary_Value| value.get_metadata().unknown_fields.get(4).unwrap().varint[0];
        assert_eq!((unknown(&texts[0]), unknown(&pictures[0])), (2, 3));

        fs::write(folder.join("clean.png"), b"GIF89a").unwrap();
        let error =
            file.write([Shown { metrics: &two, completions: &[], pictures: folder, at: None }]).unwrap_err();
        assert!(error.to_string().contains("no PNG file"), "{error}");
    }

    #[test]
    fn completions_of_any_shape_become_text() {
        for line in [json!({}), json!({"group": u64::MAX, "completion": 3}), json!([1]), json!(null)] {
            assert!(!text_summary(&[line]).is_empty());
        }
        assert_eq!(text_summary(&[]), Vec::<u8>::new());
    }
}
