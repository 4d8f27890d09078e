//! The settings of an attack, their defaults and their ranges.

use super::ball::Norm;
use crate::error::ConfigError;
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use std::str::FromStr;

/// A non-negative number that may be written as a fraction, such as `8/255`. It is stored as a plain number.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize)]
#[serde(transparent)]
pub struct Fraction(pub f64);

impl FromStr for Fraction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| part.trim().parse::<f64>().ok().filter(|value| value.is_finite());
        let value = match text.split_once('/') {
            Some((numerator, denominator)) => match (number(numerator), number(denominator)) {
                (Some(_), Some(0.0)) => return Err(format!("`{text}` divides by zero")),
                (Some(numerator), Some(denominator)) => Some(numerator / denominator),
                _ => None,
            },
            None => number(text),
        };
        value.map(Self).ok_or_else(|| format!("`{text}` is neither a number nor a fraction such as 8/255"))
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Fraction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Fraction;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number or a fraction such as \"8/255\"")
            }
            fn visit_f64<E>(self, value: f64) -> Result<Fraction, E> {
                Ok(Fraction(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Fraction, E> {
                Ok(Fraction(value as f64))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Fraction, E> {
                Ok(Fraction(value as f64))
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Fraction, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// How the perturbation is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Random points of the budget, one per restart; needs no gradient. The baseline of every attack.
    Noise,
    /// One step of length `epsilon` from the clean image (Goodfellow et al. 2015).
    Fgsm,
    /// Projected gradient steps (Madry et al. 2018).
    #[default]
    Pgd,
    /// Steps whose length adapts, with momentum (Croce and Hein 2020).
    Apgd,
    /// Random squares, without gradients (Andriushchenko et al. 2020).
    Square,
}

/// Which iterate of a restart counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PgdOutput {
    /// The one with the highest loss, the clean image included.
    #[default]
    Best,
    /// The last one, as torchattacks and Foolbox return it.
    Last,
}

/// Settings of an attack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AttackConfig {
    /// How the perturbation is found.
    pub method: Method,
    /// In which norm the perturbation is bounded.
    pub norm: Norm,
    /// Its bound, in units of the pixel range [0, 1].
    pub epsilon: Fraction,
    /// Length of a step in that norm; default 2.5 · epsilon / num_steps, at most epsilon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_size: Option<Fraction>,
    /// Gradient steps per restart (`pgd`, `apgd`); losses asked for per restart (`square`).
    pub num_steps: usize,
    /// Share of the last direction that is kept (`pgd`; MI-FGSM uses 1); 0 is plain PGD.
    pub momentum: f64,
    /// Starts, at least 1.
    pub num_restarts: usize,
    /// Whether the first start is random too; further ones always are.
    pub random_start: bool,
    /// Whether the model's answer is asked for after each restart, and items it gets wrong are left alone.
    pub early_stop: bool,
    /// With `early_stop`, ask also after every so many steps; 0 asks at the end of a restart only.
    pub check_every: usize,
    /// Which iterate counts.
    pub output: PgdOutput,
    /// Names the random numbers.
    pub seed: u64,
}

impl Default for AttackConfig {
    fn default() -> Self {
        Self {
            method: Method::Pgd,
            norm: Norm::Linf,
            epsilon: Fraction(8.0 / 255.0),
            step_size: None,
            num_steps: 10,
            momentum: 0.0,
            num_restarts: 1,
            random_start: true,
            early_stop: true,
            check_every: 0,
            output: PgdOutput::Best,
            seed: 0,
        }
    }
}

impl AttackConfig {
    /// Every value out of its range.
    pub fn check(&self) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        let epsilon = self.epsilon.0;
        if !(epsilon >= 0.0 && epsilon.is_finite()) {
            errors.push(ConfigError::new("epsilon", format!("epsilon must be at least 0, got {epsilon}")));
        } else if self.norm == Norm::Linf && epsilon > 1.0 {
            let message = format!("an linf epsilon must lie in [0, 1], got {epsilon}");
            let help = format!("pixels run from 0 to 1; for 8-bit levels write {epsilon}/255");
            errors.push(ConfigError::new("epsilon", message).with_help(help));
        }
        if let Some(Fraction(step_size)) = self.step_size {
            let too_long = step_size > 2.0 * epsilon;
            if !(step_size > 0.0 && step_size.is_finite()) {
                let message = format!("step_size must be positive, got {step_size}");
                errors.push(ConfigError::new("step_size", message));
            } else if too_long {
                let message = format!("step_size {step_size} exceeds the budget's width {}", 2.0 * epsilon);
                let help = "steps longer than 2 * epsilon only jump between faces; leave step_size out for the default";
                errors.push(ConfigError::new("step_size", message).with_help(help));
            }
        }
        if !(0.0..=1.0).contains(&self.momentum) {
            let message = format!("momentum must lie in [0, 1], got {}", self.momentum);
            errors.push(ConfigError::new("momentum", message));
        }
        if self.num_restarts == 0 {
            errors.push(ConfigError::new("num_restarts", "num_restarts must be at least 1"));
        }
        errors
    }

    /// The length of a step: as set, or else 2.5 · epsilon / num_steps but at most epsilon.
    pub fn effective_step_size(&self) -> f64 {
        let Fraction(epsilon) = self.epsilon;
        match (self.method, self.step_size) {
            (Method::Fgsm, _) => epsilon,
            (_, Some(Fraction(step_size))) => step_size,
            (_, None) => epsilon * (2.5 / self.num_steps.max(1) as f64).min(1.0),
        }
    }

    /// Gradient steps of a restart under the method.
    pub fn effective_num_steps(&self) -> usize {
        match self.method {
            Method::Noise => 0,
            Method::Fgsm => 1,
            Method::Pgd | Method::Apgd | Method::Square => self.num_steps,
        }
    }

    /// Whether restart number `restart` begins at a random point.
    pub fn starts_randomly(&self, restart: usize) -> bool {
        match self.method {
            Method::Noise | Method::Square => true,
            Method::Fgsm => restart > 0,
            Method::Pgd | Method::Apgd => restart > 0 || self.random_start,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_read_in_every_spelling_and_written_as_numbers() {
        for (text, value) in
            [("8/255", 8.0 / 255.0), (" 8 / 255 ", 8.0 / 255.0), ("0.03", 0.03), ("1e-2", 0.01)]
        {
            assert_eq!(text.parse(), Ok(Fraction(value)), "{text}");
        }
        for text in ["", "8/", "/255", "8/0", "8/255/2", "eight", "nan", "inf", "1/inf"] {
            assert!(text.parse::<Fraction>().is_err(), "{text}");
        }
        let read: Vec<Fraction> = serde_json::from_str(r#"["8/255", 0.5, 1]"#).unwrap();
        assert_eq!(read, [Fraction(8.0 / 255.0), Fraction(0.5), Fraction(1.0)]);
        let written = serde_json::to_string(&read).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Fraction>>(&written).unwrap(), read);
        assert!(!written.contains('"'), "{written}");
        assert!(serde_json::from_str::<Fraction>("\"8/0\"").unwrap_err().to_string().contains("zero"));
    }

    #[test]
    fn settings_out_of_range_are_all_reported_and_unknown_ones_refused() {
        assert!(AttackConfig::default().check().is_empty());
        let keys = |config: AttackConfig| config.check().into_iter().map(|e| e.key).collect::<Vec<_>>();
        let base = AttackConfig::default;
        assert_eq!(keys(AttackConfig { epsilon: Fraction(8.0), ..base() }), ["epsilon"]);
        assert!(keys(AttackConfig { epsilon: Fraction(8.0), norm: Norm::L2, ..base() }).is_empty());
        for bad in [-0.1, f64::NAN, f64::INFINITY] {
            assert_eq!(keys(AttackConfig { epsilon: Fraction(bad), norm: Norm::L2, ..base() }), ["epsilon"]);
        }
        for bad in [0.0, -1.0, f64::NAN, 0.2] {
            assert_eq!(keys(AttackConfig { step_size: Some(Fraction(bad)), ..base() }), ["step_size"]);
        }
        assert_eq!(keys(AttackConfig { num_restarts: 0, ..base() }), ["num_restarts"]);
        for bad in [-0.1, 1.1, f64::NAN] {
            assert_eq!(keys(AttackConfig { momentum: bad, ..base() }), ["momentum"]);
        }
        assert!(serde_json::from_str::<AttackConfig>(r#"{"num_stepz": 3}"#).is_err());
    }

    #[test]
    fn the_default_step_crosses_the_budget_and_methods_overrule_the_settings() {
        let config = AttackConfig { epsilon: Fraction(0.4), ..AttackConfig::default() };
        assert!((config.effective_step_size() - 0.1).abs() < 1e-15);
        assert_eq!(AttackConfig { num_steps: 1, ..config.clone() }.effective_step_size(), 0.4);
        let fgsm = AttackConfig { method: Method::Fgsm, step_size: Some(Fraction(0.1)), ..config.clone() };
        assert_eq!((fgsm.effective_num_steps(), fgsm.effective_step_size()), (1, 0.4));
        assert!(!fgsm.starts_randomly(0));
        let noise = AttackConfig { method: Method::Noise, random_start: false, ..config };
        assert!(noise.starts_randomly(0) && noise.effective_num_steps() == 0);
    }
}
