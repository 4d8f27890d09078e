//! Attacks that are sound, and ways in which they are not.

use super::*;
use candle_core::Device;
use serde_json::json;

/// A loss over pixels with its gradient by hand; broken above a threshold.
struct Toy {
    value: fn(&[f32]) -> f64,
    slope: fn(f32) -> f32,
    threshold: f64,
}

impl Toy {
    /// sum sin(3 x): rises up to x = 0.52.
    fn sound() -> Self {
        Self {
            value: |x| x.iter().map(|x| f64::from(3.0 * x).sin()).sum(),
            slope: |x| 3.0 * (3.0 * x).cos(),
            threshold: 11.0,
        }
    }
}

impl Objective for Toy {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        let slopes: Vec<f32> = pixels.flatten_all()?.to_vec1::<f32>()?.into_iter().map(self.slope).collect();
        Ok((self.loss(pixels, items)?, Tensor::from_vec(slopes, pixels.shape(), pixels.device())?))
    }
    fn loss(&self, pixels: &Tensor, _: &[usize]) -> Result<Vec<f32>> {
        let rows = pixels.flatten_from(1)?.to_vec2::<f32>()?;
        Ok(rows.iter().map(|row| (self.value)(row) as f32).collect())
    }
    fn is_broken(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        Ok(self.loss(pixels, items)?.iter().map(|&loss| f64::from(loss) > self.threshold).collect())
    }
}

fn probe_of(toy: &Toy, own: bool) -> Probe {
    let clean = Tensor::from_vec(vec![64.0f32 / 255.0; 12], (1, 3, 2, 2), &Device::Cpu).unwrap();
    let config = AttackConfig { num_steps: 20, ..AttackConfig::default() };
    examine(toy, &clean, 7, &config, own).unwrap()
}

fn seeing(probe: Probe) -> Examined {
    Examined { probe, is_blind: false, is_rounded: false }
}

fn status(checks: &[Check], name: &str) -> Status {
    checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("no {name}: {checks:?}")).status
}

#[test]
fn a_sound_attack_passes_every_check() {
    let probe = probe_of(&Toy::sound(), false);
    assert!(probe.gradient_error.unwrap() < 1e-2, "{probe:?}");
    assert!(probe.broken.unbounded && !probe.broken.pgd);
    let checks = of_probes(&[seeing(probe)]);
    assert_eq!(worst(&checks), Status::Pass, "{checks:#?}");
}

#[test]
fn a_gradient_that_lies_is_found_by_differences() {
    for slope in [|x: f32| -3.0 * (3.0 * x).cos(), |x: f32| 6.0 * (3.0 * x).cos(), |_| 1e-3] {
        let probe = || probe_of(&Toy { slope, ..Toy::sound() }, false);
        assert_eq!(status(&of_probes(&[seeing(probe())]), "gradient check"), Status::Fail);
        // Where rounding may be the reason, nothing is proven, neither way.
        let rounded = Examined { is_rounded: true, ..seeing(probe()) };
        assert_eq!(status(&of_probes(&[rounded]), "gradient check"), Status::Warn);
    }
}

#[test]
fn a_flat_loss_is_told_and_fails() {
    // Rounded to whole numbers, as a model that quantises its input.
    let stairs =
        Toy { value: |x| x.iter().map(|x| f64::from(*x).floor()).sum(), slope: |_| 0.0, threshold: 9.0 };
    let checks = of_probes(&[seeing(probe_of(&stairs, false))]);
    assert_eq!(status(&checks, "gradient check"), Status::Warn);
    assert_eq!(status(&checks, "unbounded attack"), Status::Fail, "{checks:#?}");
    // A model that does not look cannot be led astray: that is said, and is not the attack's failure.
    let checks = of_probes(&[Examined { is_blind: true, ..seeing(probe_of(&stairs, false)) }]);
    assert_eq!(status(&checks, "unbounded attack"), Status::Warn, "{checks:#?}");
}

#[test]
fn what_a_weaker_attack_breaks_and_the_runs_own_does_not_is_a_warning() {
    let weak = Toy { threshold: 8.9, ..Toy::sound() };
    let probe = probe_of(&weak, false);
    assert!(probe.broken.pgd && probe.broken.fgsm, "{probe:?}");
    let checks = of_probes(&[seeing(probe)]);
    assert_eq!(status(&checks, "simpler is weaker"), Status::Warn);
    assert_eq!(status(&of_probes(&[seeing(probe_of(&weak, true))]), "simpler is weaker"), Status::Pass);
    let blind = Probe {
        broken: Broken { square: true, pgd: false, ..probe_of(&weak, false).broken },
        ..probe_of(&weak, false)
    };
    assert_eq!(status(&of_probes(&[seeing(blind)]), "black box is weaker"), Status::Warn);
}

fn record(changes: &serde_json::Value) -> AttackRecord {
    let mut value = json!({
        "id": "q", "method": "pgd", "norm": "linf", "space": "original", "epsilon": 8.0 / 255.0, "step_size": 0.01,
        "num_steps": 10, "num_restarts": 1, "objective": "completion", "answer": "A", "clean_prediction": "A",
        "clean_correct": true, "adversarial_prediction": "A", "robust_correct": true, "loss_clean": 1.0,
        "loss_adversarial": 2.0, "linf": 8.0 / 255.0, "l2": 0.3, "image": "a.png", "adversarial_image": "b.png",
        "zero_gradient": false, "processor_difference": 0.001,
    });
    for (key, change) in changes.as_object().unwrap() {
        value[key] = change.clone();
    }
    serde_json::from_value(value).unwrap()
}

#[test]
fn records_tell_of_budgets_gradients_and_processors() {
    let sound = checks(&[record(&json!({}))]);
    assert_eq!(worst(&sound), Status::Warn, "nothing was examined: {sound:?}");
    let with = |name: &str, changes| status(&checks(&[record(&changes)]), name);
    assert_eq!(with("budget kept by files", json!({})), Status::Pass);
    assert_eq!(with("budget kept by files", json!({"linf": 9.0 / 255.0})), Status::Fail);
    assert_eq!(with("gradient is there", json!({"zero_gradient": true})), Status::Fail);
    assert_eq!(with("processor equality", json!({"processor_difference": 2.0 / 255.0})), Status::Fail);
    assert_eq!(with("loss rises", json!({"loss_adversarial": 1.0})), Status::Warn);
    assert_eq!(with("strength", json!({"method": "noise"})), Status::Warn);
    assert_eq!(with("budget", json!({"epsilon": 0.0, "linf": 0.0})), Status::Warn);
    assert_eq!(with("files are changed", json!({"linf": 0.0})), Status::Fail);
    let none = checks(&[record(&json!({"adversarial_image": null, "clean_correct": false}))]);
    assert_eq!(worst(&none), Status::Fail);
    let examined = json!({"probe": probe_of(&Toy::sound(), false)});
    assert_eq!(worst(&checks(&[record(&examined)])), Status::Pass);
}

#[test]
fn the_choice_of_items_depends_on_all_questions_alone() {
    let ids: Vec<String> = (0..30).map(|i| format!("q{i}")).collect();
    let of = |count| chosen(ids.iter().map(String::as_str), count);
    let turned = chosen(ids.iter().rev().map(String::as_str), 5);
    assert_eq!((of(5).len(), of(5)), (5, turned));
    assert!(of(5).is_subset(&of(9)) && of(0).is_empty());
}
