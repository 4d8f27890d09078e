//! What one step of training reports, whatever its recipe.

use super::pictures::Pictures;
use serde_json::{Map, Value};

/// What a step reports: its metrics, and the seconds of its phases.
#[derive(Debug, Default)]
pub struct StepReport {
    /// One object of `metrics.jsonl`, without the step's number.
    pub metrics: Map<String, Value>,
    /// Tokens that went through the model: prompts, image tokens and completions.
    pub num_tokens: u64,
    /// Completions to write down.
    pub completions: Vec<Value>,
    /// Seconds by phase.
    pub phases: Vec<(&'static str, f64)>,
    /// Where a step makes several updates, what is each update's own, in their order.
    pub updates: Vec<Map<String, Value>>,
    /// Pictures to keep.
    pub pictures: Option<Pictures>,
}

/// The lines of a step in `metrics.jsonl`: one, or one for each of its updates, with the update's own figures in place of the
/// last one's.
pub fn lines_of(metrics: Map<String, Value>, updates: &[Map<String, Value>]) -> Vec<Map<String, Value>> {
    if updates.is_empty() {
        return vec![metrics];
    }
    let line = |own: &Map<String, Value>| {
        let mut line = Map::new();
        for (name, value) in &metrics {
            line.insert(name.clone(), own.get(name).unwrap_or(value).clone());
            if let Some(update) = own.get("update").filter(|_| name == "step") {
                line.insert("update".to_owned(), update.clone());
            }
        }
        line
    };
    updates.iter().map(line).collect()
}
