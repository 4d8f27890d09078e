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

/// A size that was measured or counted; else why it is not there: `summary` tells on what device memory was to be measured.
fn size_of_value(value: &Value, summary: &Value) -> String {
    match (value.as_f64(), summary["device"].as_str()) {
        (Some(bytes), _) => size(bytes as u64),
        (None, Some(device)) if device != CPU => format!("not measured on {device}"),
        (None, _) => "unknown on this system".to_owned(),
    }
}

/// The same of a peak: a measurement that ran out of memory tells that it is more than there is.
fn peak_of_value(value: &Value, has_run_out: bool, summary: &Value) -> String {
    if has_run_out && value.is_null() {
        "more than there is".to_owned()
    } else {
        size_of_value(value, summary)
    }
}

/// A count, where it is known.
fn count_of_value(value: &Value) -> String {
    if value.is_null() { "unknown".to_owned() } else { value.to_string() }
}

/// The only device whose memory the system tells.
const CPU: &str = "cpu";

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
    let trained = count_of_value(&summary["parameters_trained"]);
    line("parameters", format!("{}, of which {trained} train", number("parameters")));
    let has_run_out = summary["ran_out_of_memory"] == true;
    if !has_run_out {
        let bytes = |name: &str| size_of_value(&summary[name], summary);
        line(
            "memory",
            format!(
                "weights {}, optimiser {}, kept images {}, kept features {}",
                bytes("weights_bytes"),
                bytes("optimizer_bytes"),
                bytes("kept_images_bytes"),
                bytes("kept_features_bytes")
            ),
        );
    }
    line("peak memory", peak_of_value(&summary["peak_memory_bytes"], has_run_out, summary));
    let verdict = match summary["fits"].as_bool() {
        Some(true) => ": fits",
        Some(false) => ": DOES NOT FIT",
        None => "",
    };
    line("free memory", format!("{}{verdict}", size_of_value(&summary["free_memory_bytes"], summary)));
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
                Some(times) if times > 0 => {
                    format!("{times} validations {}", duration(&summary["seconds_validation"]))
                }
                _ => "no validation".to_owned(),
            }
        ),
    );
    if let (Some(seconds), Ok(now)) =
        (summary["seconds_total"].as_f64(), SystemTime::now().duration_since(UNIX_EPOCH))
    {
        line("begun now, ends", format!("{} UTC", timestamp(now.as_secs() + seconds as u64)));
    }
    let nothing = nothing_fits(summary);
    let name = if nothing.is_some() { "tried" } else { "to make it fit" };
    for (place, advice) in summary["advice"].as_array().into_iter().flatten().enumerate() {
        let has_run_out = advice["fits"] == false;
        let fits = if advice["fits"] == true { ": fits" } else { "" };
        let and = if place == 0 { "" } else { "and " };
        line(
            name,
            format!(
                "{and}--set {} needs {}{fits}",
                word(&advice["change"]),
                peak_of_value(&advice["peak_memory_bytes"], has_run_out, summary)
            ),
        );
    }
    if let Some(nothing) = nothing {
        line("to make it fit", nothing);
    }
    text
}

/// That nothing fits of what was tried, with what the smallest of it needs; none where something may fit, or nothing was tried.
fn nothing_fits(summary: &Value) -> Option<String> {
    let tried = summary["advice"].as_array().filter(|tried| !tried.is_empty())?;
    if tried.iter().any(|advice| advice["fits"] != false) {
        return None;
    }
    let least = tried.iter().filter_map(|advice| advice["peak_memory_bytes"].as_u64()).min();
    let needs = least.map_or_else(|| "more than there is".to_owned(), size);
    Some(format!("none of these settings is enough: the smallest needs {needs}"))
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
    let is_cpu = summary["device"].as_str().is_none_or(|device| device == CPU);
    let peak = |work: &Value| {
        if is_cpu {
            peak_of_value(&work["peak_memory_bytes"], work["ran_out_of_memory"] == true, summary)
        } else {
            "-".to_owned()
        }
    };
    let _ = writeln!(text, "{:<20}{:>14}  {:<12}{:>16}", "work", "time", "per", "peak memory");
    for work in summary["works"].as_array().into_iter().flatten() {
        let _ = writeln!(
            text,
            "{:<20}{:>14}  {:<12}{:>16}",
            word(&work["work"]),
            duration(&work["seconds"]),
            word(&work["unit"]),
            peak(work)
        );
    }
    if !is_cpu {
        let device = word(&summary["device"]);
        let _ = writeln!(text, "memory        not measured on {device}, only on the processor");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_training_is_told_with_its_validations() {
        let mut summary = json!({
            "device": "cpu", "peak_memory_bytes": 3u64 << 30, "free_memory_bytes": 4u64 << 30, "fits": true,
            "seconds_total": 100.0, "validations": 4, "seconds_validation": 12.5, "parameters_trained": 7,
        });
        let text = training(&summary);
        assert!(text.contains("4 validations 12.50 s)"), "{text}");
        assert!(text.contains("3.00 GiB") && text.contains("4.00 GiB: fits"), "{text}");
        summary["validations"] = json!(0);
        assert!(training(&summary).contains("; no validation)"));
    }

    #[test]
    fn what_ran_out_of_memory_needs_more_than_there_is() {
        let summary = json!({
            "device": "cpu", "peak_memory_bytes": null, "free_memory_bytes": 4u64 << 30, "fits": false,
            "ran_out_of_memory": true, "seconds_total": null,
            "advice": [
                {"change": "train.micro_batch_size=1", "peak_memory_bytes": null, "fits": false},
                {"change": "train.recompute=true", "peak_memory_bytes": 1u64 << 30, "fits": true},
            ],
        });
        let text = training(&summary);
        for words in [
            "peak memory       more than there is\n",
            "4.00 GiB: DOES NOT FIT",
            "--set train.micro_batch_size=1 needs more than there is\n",
            "and --set train.recompute=true needs 1.00 GiB: fits",
            "of which unknown train",
        ] {
            assert!(text.contains(words), "{words}\n{text}");
        }
    }

    #[test]
    fn settings_of_which_none_fits_are_told_as_such_with_what_the_smallest_needs() {
        let mut summary = json!({
            "device": "cpu", "peak_memory_bytes": 9u64 << 30, "free_memory_bytes": 1u64 << 30, "fits": false,
            "advice": [
                {"change": "train.micro_batch_size=1", "peak_memory_bytes": 5u64 << 30, "fits": false},
                {"change": "train.recompute=true", "peak_memory_bytes": 3u64 << 30, "fits": false},
            ],
        });
        let text = training(&summary);
        for words in [
            "tried             --set train.micro_batch_size=1 needs 5.00 GiB\n",
            "tried             and --set train.recompute=true needs 3.00 GiB\n",
            "to make it fit    none of these settings is enough: the smallest needs 3.00 GiB\n",
        ] {
            assert!(text.contains(words), "{words}\n{text}");
        }
        for advice in summary["advice"].as_array_mut().unwrap() {
            advice["peak_memory_bytes"] = Value::Null;
        }
        assert!(training(&summary).contains("the smallest needs more than there is\n"));
        // It fits, or whether it does is not known.
        for fits in [json!(true), Value::Null] {
            summary["advice"][1]["fits"] = fits;
            let text = training(&summary);
            assert!(!text.contains("tried") && !text.contains("none of these"), "{text}");
            assert!(text.contains("to make it fit    --set train.micro_batch_size=1"), "{text}");
        }
        summary["advice"] = json!([]);
        assert!(!training(&summary).contains("to make it fit"));
    }

    #[test]
    fn no_memory_of_a_gpu_is_made_up() {
        let text =
            training(&json!({"device": "cuda:0", "peak_memory_bytes": null, "weights_bytes": 1u64 << 30}));
        assert!(text.contains("peak memory       not measured on cuda:0\n"), "{text}");
        assert!(text.contains("weights 1.00 GiB"), "{text}");
        let work = json!({"work": "load", "unit": "checkpoint", "seconds": 1.5, "peak_memory_bytes": null});
        let mut summary = json!({"device": "metal", "works": [work]});
        let text = inference(&summary);
        assert!(text.contains("not measured on metal, only on the processor"), "{text}");
        assert!(!text.contains("unknown on this system") && !text.contains("GiB"), "{text}");
        summary["device"] = json!("cpu");
        assert!(inference(&summary).contains("unknown on this system"));
        summary["works"][0]["ran_out_of_memory"] = json!(true);
        assert!(inference(&summary).contains("more than there is"));
    }
}
