//! Reference numbers, read when they stand beside the checkout.

use serde_json::Value;

/// The parsed reference file, or `None` when this checkout stands alone.
pub(crate) fn reference(relative: &str) -> Option<Value> {
    let path = crate::files::shared()?.join("reference").join(relative);
    let bytes = std::fs::read(path).ok()?;
    Some(serde_json::from_slice(&bytes).expect("reference files are JSON"))
}

/// The numbers of a (nested) array in reading order; JSON `null` reads as NaN.
pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(numbers).collect(),
        other => vec![other.as_f64().unwrap_or(f64::NAN)],
    }
}

/// Asserts |got - want| <= tolerance * max(1, |want|) everywhere.
pub(crate) fn assert_close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths differ");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * w.abs().max(1.0), "{what}[{i}]: got {g}, want {w}");
    }
}
