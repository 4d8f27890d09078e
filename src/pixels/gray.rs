//! Gray that is deeper than eight bits, made eight bits: which of its values are black, which white.
//!
//! transformers reads sixteen-bit gray as Pillow's `convert("RGB")` does: values above 255 are white. That is the default for such
//! pictures, so that a model sees what it would see there; what a radiologist would look at is an option. DICOM files,
//! which transformers does not read at all, say themselves what to show.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How deep gray is read.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct GrayReading {
    /// What is done without a window.
    pub rule: GrayRule,
    /// Shown instead, whatever the file says.
    pub window: Option<Window>,
}

/// What is done with deep gray that has no window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GrayRule {
    /// As transformers: values above 255 are white. DICOM: the file's own window, else from its least to its largest value.
    #[default]
    AsStored,
    /// The whole range that the file could hold, 0 to 65535 as a rule.
    FullRange,
    /// From the picture's least to its largest value.
    MinMax,
}

/// A window in the picture's own units (Hounsfield units for CT): `CENTER/WIDTH`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Window {
    /// The value shown as middle gray.
    pub center: f64,
    /// How many values lie between black and white; at least 1.
    pub width: f64,
}

impl FromStr for Window {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(center, width)| {
            Some(Self { center: center.trim().parse().ok()?, width: width.trim().parse().ok()? })
        });
        match parsed {
            Some(window) if window.center.is_finite() && window.width.is_finite() && window.width >= 1.0 => {
                Ok(window)
            }
            Some(_) => Err(format!("the window `{text}` must have a width of at least 1")),
            None => Err(format!("`{text}` is no window; write CENTER/WIDTH, such as \"40/400\"")),
        }
    }
}

impl TryFrom<String> for Window {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Window> for String {
    fn from(window: Window) -> Self {
        window.to_string()
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.center, self.width)
    }
}

/// The curve of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Curve {
    /// DICOM's `LINEAR`: `width` whole values, both ends included.
    Linear,
    /// DICOM's `LINEAR_EXACT`: from `center - width/2` to `center + width/2`.
    LinearExact,
    /// DICOM's `SIGMOID`.
    Sigmoid,
}

impl Window {
    /// Where `value` lies between black (0) and white (1): DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3.
    pub(super) fn apply(self, curve: Curve, value: f64) -> f64 {
        let Self { center, width } = self;
        match curve {
            Curve::Linear if width <= 1.0 => f64::from(u8::from(value > center - 0.5)),
            Curve::Linear => ((value - (center - 0.5)) / (width - 1.0) + 0.5).clamp(0.0, 1.0),
            Curve::LinearExact => ((value - center) / width + 0.5).clamp(0.0, 1.0),
            Curve::Sigmoid => 1.0 / (1.0 + (-4.0 * (value - center) / width).exp()),
        }
    }
}

/// A share of white as one of 256 levels, to the nearest.
pub(super) fn level(share: f64) -> u8 {
    (share * 255.0 + 0.5).floor().clamp(0.0, 255.0) as u8
}

/// The share of white of each value between `low` and `high`.
pub(super) fn stretched(values: impl Iterator<Item = f64>, low: f64, high: f64) -> Vec<u8> {
    let span = high - low;
    values.map(|value| level(if span > 0.0 { (value - low) / span } else { 0.0 })).collect()
}

/// Least and largest value; of nothing, zeros.
pub(super) fn extremes(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low <= high { (low, high) } else { (0.0, 0.0) }
}

/// Levels of sixteen-bit gray from a file that says nothing about how to show it, and in words how it was read.
pub(super) fn read_gray16(values: &[u16], reading: GrayReading) -> (Vec<u8>, String) {
    let numbers = || values.iter().copied().map(f64::from);
    match (reading.window, reading.rule) {
        (Some(window), _) => {
            let levels = numbers().map(|value| level(window.apply(Curve::Linear, value))).collect();
            (levels, format!("window {window}"))
        }
        (None, GrayRule::AsStored) => {
            (values.iter().map(|&value| value.min(255) as u8).collect(), "16-bit, white above 255".to_owned())
        }
        (None, GrayRule::FullRange) => (stretched(numbers(), 0.0, 65535.0), "range 0 to 65535".to_owned()),
        (None, GrayRule::MinMax) => {
            let (low, high) = extremes(numbers());
            (stretched(numbers(), low, high), format!("range {low} to {high}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_the_standard_at_their_ends_and_in_the_middle() {
        // PS3.3 C.11.2.1.2.1: center 2048, width 4096: 0 is black, 4095 white.
        let window = Window { center: 2048.0, width: 4096.0 };
        let shown = |value: f64| window.apply(Curve::Linear, value);
        assert_eq!((shown(0.0), shown(4095.0), shown(-5.0), shown(9000.0)), (0.0, 1.0, 0.0, 1.0));
        assert_eq!(shown(2047.5), 0.5);
        let narrow = Window { center: 10.0, width: 1.0 };
        assert_eq!([9.0, 9.5, 10.0].map(|value| narrow.apply(Curve::Linear, value)), [0.0, 0.0, 1.0]);
        let exact = Window { center: 50.0, width: 100.0 };
        assert_eq!([0.0, 25.0, 100.0].map(|value| exact.apply(Curve::LinearExact, value)), [0.0, 0.25, 1.0]);
        assert_eq!(exact.apply(Curve::Sigmoid, 50.0), 0.5);
        assert!((exact.apply(Curve::Sigmoid, 75.0) - 1.0 / (1.0 + (-1f64).exp())).abs() < 1e-15);
    }

    #[test]
    fn sixteen_bits_are_clipped_stretched_or_windowed() {
        let values = [0, 100, 255, 256, 1000, 65535];
        let read = |rule, window| read_gray16(&values, GrayReading { rule, window });
        assert_eq!(read(GrayRule::AsStored, None).0, [0, 100, 255, 255, 255, 255]);
        assert_eq!(read(GrayRule::FullRange, None).0, [0, 0, 1, 1, 4, 255]);
        let (levels, said) = read_gray16(&[10, 20, 30], GrayReading { rule: GrayRule::MinMax, window: None });
        assert_eq!((levels.as_slice(), said.as_str()), (&[0, 128, 255][..], "range 10 to 30"));
        let (levels, said) = read(GrayRule::MinMax, Some("500/1000".parse().unwrap()));
        assert_eq!(levels, [0, 26, 65, 65, 255, 255]);
        assert_eq!(said, "window 500/1000");
        assert_eq!(read_gray16(&[7, 7], GrayReading { rule: GrayRule::MinMax, window: None }).0, [0, 0]);
    }

    #[test]
    fn a_window_is_written_as_center_and_width() {
        let window: Window = "-600/1500".parse().unwrap();
        assert_eq!((window.center, window.width, window.to_string().as_str()), (-600.0, 1500.0, "-600/1500"));
        for nonsense in ["", "40", "40/0", "40/-3", "nan/5", "40/inf", "a/b"] {
            assert!(nonsense.parse::<Window>().is_err(), "{nonsense}");
        }
    }
}
