//! Estimates as tables for people; every number is one of the summary.

use crate::recipes::run::timestamp;
use serde_json::Value;
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

/// `3.21 GiB`, `40.5 MiB`.
pub(in crate::recipes) fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    if bytes >= f64::from(1 << 30) {
        format!("{:.2} GiB", bytes / f64::from(1 << 30))
    } else {
        format!("{:.1} MiB", bytes / f64::from(1 << 20))
    }
}

/// The size that is estimated, or that it is unknown.
fn size_of_value(value: &Value) -> String {
    value.as_f64().map_or_else(|| "unknown on this system".to_owned(), |bytes| size(bytes as u64))
}

/// `4 h 05 min`, `12.3 s`, `2.5 ms`.
fn duration(value: &Value) -> String {
    let Some(seconds) = value.as_f64() else { return "unknown".to_owned() };
    let minutes = (seconds / 60.0).round() as u64;
    match seconds {
        s if s < 0.1 => format!("{:.2} ms", s * 1e3),
        s if s < 120.0 => format!("{s:.2} s"),
        s if s < 7200.0 => format!("{minutes} min"),
        s if s < 172_800.0 => format!("{} h {:02} min", minutes / 60, minutes % 60),
        s => format!("{:.1} days", s / 86_400.0),
    }
}

/// The table of `train --dry-run`.
pub(super) fn training(summary: &Value) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<18}{value}");
    };
    let number = |name: &str| summary[name].to_string();
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    line("recipe", format!("{} of {}", word(&summary["recipe"]), word(&summary["model"])));
    line("measured on", word(&summary["measured_on"]));
    for assumption in summary["assumptions"].as_array().into_iter().flatten() {
        line("assumed", word(assumption));
    }
    let epochs = summary["epochs"].as_f64().unwrap_or(0.0);
    line("items", number("items"));
    line("steps", format!("{} of {} items ({epochs:.2} epochs)", number("num_steps"), number("batch_size")));
    line(
        "tokens per item",
        format!(
            "median {}, longest {}; of it the image {}, at most {}",
            number("item_tokens_median"),
            number("item_tokens_longest"),
            number("image_tokens_median"),
            number("image_tokens_longest")
        ),
    );
    line("parameters", format!("{}, of which {} train", number("parameters"), number("parameters_trained")));
    line(
        "memory",
        format!(
            "weights {}, optimiser {}, kept images {}, kept features {}",
            size_of_value(&summary["weights_bytes"]),
            size_of_value(&summary["optimizer_bytes"]),
            size_of_value(&summary["kept_images_bytes"]),
            size_of_value(&summary["kept_features_bytes"])
        ),
    );
    line("peak memory", size_of_value(&summary["peak_memory_bytes"]));
    let verdict = match summary["fits"].as_bool() {
        Some(true) => ": fits",
        Some(false) => ": DOES NOT FIT",
        None => "",
    };
    line("free memory", format!("{}{verdict}", size_of_value(&summary["free_memory_bytes"])));
    line("time per step", duration(&summary["seconds_per_step"]));
    line(
        "total time",
        format!(
            "{} (start {}, images {}, checkpoints {}; {})",
            duration(&summary["seconds_total"]),
            duration(&summary["seconds_start"]),
            duration(&summary["seconds_images"]),
            duration(&summary["seconds_checkpoints"]),
            match summary["validations"].as_u64() {
                Some(times) if times > 0 => format!("{times} validations come on top"),
                _ => "no validation".to_owned(),
            }
        ),
    );
    if let (Some(seconds), Ok(now)) =
        (summary["seconds_total"].as_f64(), SystemTime::now().duration_since(UNIX_EPOCH))
    {
        line("begun now, ends", format!("{} UTC", timestamp(now.as_secs() + seconds as u64)));
    }
    for (place, advice) in summary["advice"].as_array().into_iter().flatten().enumerate() {
        let fits = if advice["fits"] == true { ": fits" } else { "" };
        let and = if place == 0 { "" } else { "and " };
        line(
            "to make it fit",
            format!(
                "{and}--set {} needs {}{fits}",
                word(&advice["change"]),
                size_of_value(&advice["peak_memory_bytes"])
            ),
        );
    }
    text
}

/// The table of `doctor --model`.
pub(super) fn inference(summary: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let mut text = format!(
        "\nmodel         {}, {} parameters\nmeasured on   {}; image {}\n",
        word(&summary["model"]),
        summary["parameters"],
        word(&summary["measured_on"]),
        word(&summary["image"])
    );
    for assumption in summary["assumptions"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "assumed       {}", word(assumption));
    }
    let _ = writeln!(text, "{:<20}{:>14}  {:<12}{:>16}", "work", "time", "per", "peak memory");
    for work in summary["works"].as_array().into_iter().flatten() {
        let _ = writeln!(
            text,
            "{:<20}{:>14}  {:<12}{:>16}",
            word(&work["work"]),
            duration(&work["seconds"]),
            word(&work["unit"]),
            size_of_value(&work["peak_memory_bytes"])
        );
    }
    text
}
