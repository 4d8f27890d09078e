//! TensorBoard event files made from metrics: the same bytes for the same metrics, at any time on any machine.
//!
//! Deviation: `wall_time` holds the step instead of the clock, so that a resumed run leaves the same file. Framing comes
//! from `tensorboard-rs`; its writer is not used, since it names files by host and clock and panics on a full disk.

use crate::error::{Error, Result};
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use tensorboard_rs::record_writer::RecordWriter;

/// Writes `tensorboard/` of a run directory.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
}

impl EventFile {
    /// The event file under `dir`; it is created by the first event.
    pub(super) fn new(dir: &Path) -> Self {
        Self { path: dir.join("events.out.tfevents.0000000000.safemed") }
    }

    /// Adds every number of one metrics object under its own name, at the object's `step`.
    pub(super) fn append(&self, metrics: &Value) -> Result<()> {
        self.write(std::slice::from_ref(metrics))
    }

    /// Writes the file anew from all metrics.
    pub(super) fn rebuild(&self, metrics: &[Value]) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("cannot replace the event file", &self.path, error))
            }
            _ if metrics.is_empty() => Ok(()),
            _ => self.write(metrics),
        }
    }

    fn write(&self, metrics: &[Value]) -> Result<()> {
        let mut bytes = Vec::new();
        let mut writer = RecordWriter::new(&mut bytes);
        let framed = (|| {
            if !self.path.exists() {
                writer.write(&version_event())?;
            }
            metrics.iter().try_for_each(|metrics| writer.write(&scalar_event(metrics)))
        })();
        framed
            .and_then(|()| append_bytes(&self.path, &bytes))
            .map_err(|error| Error::io("cannot write the event file", &self.path, error))
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

/// Event { 1: wall_time double, 2: step varint, 5: Summary { 1: Value { 1: tag string, 2: simple_value float } } }.
fn scalar_event(metrics: &Value) -> Vec<u8> {
    let step = metrics["step"].as_u64().unwrap_or(0);
    let mut event = vec![0x09];
    event.extend((step as f64).to_le_bytes());
    event.push(0x10);
    push_varint(&mut event, step);
    let mut summary = Vec::new();
    push_scalars(&mut summary, "", metrics);
    push_bytes(&mut event, 5, &summary);
    event
}

/// Numbers of nested objects are named by path: `rewards/accuracy`.
fn push_scalars(summary: &mut Vec<u8>, prefix: &str, metrics: &Value) {
    for (name, value) in metrics.as_object().into_iter().flatten() {
        let tag = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
        match value {
            Value::Number(number) if tag != "step" => {
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
    use serde_json::json;

    #[test]
    fn events_appended_one_by_one_equal_events_rebuilt() {
        let dir = tempfile::tempdir().unwrap();
        let metrics: Vec<Value> = (1..=300)
            .map(|step| json!({"step": step, "loss": 1.0 / f64::from(step), "phase": {"kl": 0.5}}))
            .collect();
        let one = EventFile::new(&dir.path().join("one"));
        let all = EventFile::new(&dir.path().join("all"));
        for metrics in &metrics {
            one.append(metrics).unwrap();
        }
        all.rebuild(&metrics).unwrap();
        all.rebuild(&metrics).unwrap();
        assert_eq!(fs::read(&one.path).unwrap(), fs::read(&all.path).unwrap());
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
        assert_eq!(scalar_event(&json!({"step": 300, "loss": 0.25, "note": "x"})), expected);
    }
}
