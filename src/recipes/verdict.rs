//! Whether a robust accuracy may be believed: the attack itself examined on a few items, and on all records.
//!
//! A robust accuracy is an upper bound that an attack happened to reach. An attack that is broken looks like a robust
//! model; the checks here are the ways in which published ones were (Carlini et al. 2019, Croce and Hein 2020).

use super::records::AttackRecord;
use crate::attack::{AttackConfig, Ball, Fraction, Method, Norm, Objective, PgdOutput, Problem, attack, pgd};
use crate::error::Result;
use crate::rng;
use candle_core::Tensor;
use rand::Rng;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// Directions along which the gradient is compared with differences.
const DIRECTIONS: u64 = 20;
/// Length of half a difference in every pixel that moves: a sixteenth of an 8-bit level.
const HALF_STEP: f32 = 1.0 / 4096.0;
/// Losses that the black-box attack may ask for.
const QUERIES: usize = 200;
/// Steps of the examination's own attacks, whatever the run's own.
const STEPS: std::ops::RangeInclusive<usize> = 10..=40;
/// Losses in nats are no lower than this below what they should exceed, before a check complains.
const SLACK: f64 = 1e-3;

/// The attack examined on one item that is right when clean. Losses are the attack's own objective.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Sum of |difference - gradient| over sum of |difference|, over 20 directions; none where the loss is flat.
    pub gradient_error: Option<f64>,
    /// Loss of the clean image.
    pub loss_clean: f64,
    /// Best loss of one random point of the ball.
    pub loss_noise: f64,
    /// Best loss of FGSM.
    pub loss_fgsm: f64,
    /// Loss at the start, halfway and at the end of PGD.
    pub loss_by_steps: [f64; 3],
    /// Best loss of PGD at half the budget, at the budget, and at twice the budget.
    pub loss_by_epsilon: [f64; 3],
    /// Whether each breaks the item: the run's own attack, and below it in strength.
    pub broken: Broken,
}

/// Which attacks break an item.
#[expect(clippy::struct_excessive_bools, reason = "one answer for each attack")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broken {
    /// The run's attack.
    pub own: bool,
    /// One random point of the ball.
    pub noise: bool,
    /// FGSM.
    pub fgsm: bool,
    /// PGD.
    pub pgd: bool,
    /// Square, with few queries.
    pub square: bool,
    /// The blank image, brought into the ball.
    pub blank: bool,
    /// PGD without a budget, from the blank image and from where twice the budget led.
    pub unbounded: bool,
}

/// The items to examine among all of the run: a choice that depends on these alone.
pub fn chosen<'a>(ids: impl Iterator<Item = &'a str>, count: usize) -> HashSet<String> {
    let mut keyed: Vec<(u64, &str)> = ids.map(|id| (rng::key_of(&format!("verdict/{id}")), id)).collect();
    keyed.sort_unstable();
    keyed.into_iter().take(count).map(|(_, id)| id.to_owned()).collect()
}

/// Examines an attack on one item.
///
/// # Shapes
/// - `clean`: `[1, 3, height, width]` in [0, 1]
///
/// # Errors
/// When a loss or gradient is not finite.
pub fn examine(
    objective: &dyn Objective,
    clean: &Tensor,
    key: u64,
    config: &AttackConfig,
    own: bool,
) -> Result<Probe> {
    let keys = [key];
    let problem = Problem { clean, items: &[0], keys: &keys, start: None, judge_8bit: true };
    let base = AttackConfig {
        num_steps: config.num_steps.clamp(*STEPS.start(), *STEPS.end()),
        num_restarts: 1,
        step_size: None,
        early_stop: true,
        check_every: 0,
        output: PgdOutput::Best,
        ..config.clone()
    };
    let run = |config: &AttackConfig, start: Option<&Tensor>| {
        attack(objective, &Problem { start, ..problem }, config)
    };
    let noise = run(&AttackConfig { method: Method::Noise, ..base.clone() }, None)?;
    let fgsm = run(&AttackConfig { method: Method::Fgsm, ..base.clone() }, None)?;
    let mut loss_by_steps = [0.0; 3];
    let observed = [0, base.num_steps / 2, base.num_steps];
    let found = pgd(objective, &problem, &base, &mut |iterate| {
        for (loss, step) in loss_by_steps.iter_mut().zip(observed) {
            if iterate.step == step {
                *loss = f64::from(iterate.loss[0]);
            }
        }
        Ok(())
    })?;
    let epsilon = config.epsilon.0;
    let at = |epsilon: f64| AttackConfig { epsilon: Fraction(epsilon), ..base.clone() };
    let widest = match config.norm {
        Norm::Linf => 1.0,
        Norm::L2 => (clean.elem_count() as f64).sqrt(),
    };
    let half = run(&at(0.5 * epsilon), None)?;
    let twice = run(&at((2.0 * epsilon).min(widest)), None)?;
    let square = run(&AttackConfig { method: Method::Square, num_steps: QUERIES, ..base.clone() }, None)?;
    let blank = (clean.zeros_like()? + 0.5)?;
    let brought = run(&AttackConfig { num_steps: 0, ..base.clone() }, Some(&blank))?;
    let unbounded = run(&at(widest), Some(&blank))?;
    // What breaks an item within a budget breaks it without one; else a second try, from where twice the budget led.
    let tried = [&noise, &fgsm, &half, &found, &twice, &square, &brought, &unbounded];
    let is_broken =
        own || tried.iter().any(|found| found.broken[0]) || run(&at(widest), Some(&twice.pixels))?.broken[0];
    let steepest = if unbounded.loss[0] > twice.loss[0] { &unbounded } else { &twice };
    Ok(Probe {
        gradient_error: gradient_error(objective, &steepest.pixels, key, config)?,
        loss_clean: f64::from(found.loss_clean[0]),
        loss_noise: f64::from(noise.loss[0]),
        loss_fgsm: f64::from(fgsm.loss[0]),
        loss_by_steps,
        loss_by_epsilon: [&half, &found, &twice].map(|found| f64::from(found.loss[0])),
        broken: Broken {
            own,
            noise: noise.broken[0],
            fgsm: fgsm.broken[0],
            pgd: found.broken[0],
            square: square.broken[0],
            blank: brought.broken[0],
            unbounded: is_broken,
        },
    })
}

/// Compares the gradient with central differences near `image`, which is an attacked one: at a clean image a sure model's
/// loss is too flat for differences. A direction moves a random half of the
/// pixels along the gradient's signs, so that differences are far above rounding and every pixel counts in some of them.
fn gradient_error(
    objective: &dyn Objective,
    image: &Tensor,
    key: u64,
    config: &AttackConfig,
) -> Result<Option<f64>> {
    let original: Vec<f32> = image.flatten_all()?.to_vec1()?;
    let mut point = original.clone();
    let ball = Ball { norm: Norm::Linf, epsilon: 1.0 / 255.0 };
    ball.random_start(&original, &mut point, &mut rng::stream(config.seed, "verdict", &[key]));
    // Differences step to both sides of it.
    for value in &mut point {
        *value = value.clamp(HALF_STEP, 1.0 - HALF_STEP);
    }
    let tensor = |pixels: Vec<f32>| Tensor::from_vec(pixels, image.shape(), image.device());
    let (_, gradient) = objective.loss_and_gradient(&tensor(point.clone())?, &[0])?;
    let gradient: Vec<f32> = gradient.flatten_all()?.to_vec1()?;
    let (mut wrong, mut total) = (0.0, 0.0);
    for direction in 0..DIRECTIONS {
        let mut stream = rng::stream(config.seed, "verdict_direction", &[key, direction]);
        let signs: Vec<f32> = gradient
            .iter()
            .map(|&g| if g != 0.0 && stream.random::<bool>() { g.signum() } else { 0.0 })
            .collect();
        let moved = |by: f32| -> Result<f64> {
            let pixels = point.iter().zip(&signs).map(|(p, s)| p + by * s).collect();
            Ok(f64::from(objective.loss(&tensor(pixels)?, &[0])?[0]))
        };
        let difference = (moved(HALF_STEP)? - moved(-HALF_STEP)?) / (2.0 * f64::from(HALF_STEP));
        let slope: f64 = gradient.iter().zip(&signs).map(|(g, s)| f64::from(*g) * f64::from(*s)).sum();
        wrong += (difference - slope).abs();
        total += difference.abs();
    }
    // Below this the differences are rounding errors of the loss.
    let flat = 1e-4 * DIRECTIONS as f64;
    Ok((total * f64::from(HALF_STEP) > flat).then_some(wrong / total))
}

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Status {
    /// As it should be.
    Pass,
    /// Read the evidence before believing the number.
    Warn,
    /// The number says nothing.
    Fail,
}

impl Status {
    /// As it is written.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        }
    }
}

/// One check with its evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What is checked.
    pub name: String,
    /// What it came to.
    pub status: Status,
    /// In words and numbers.
    pub evidence: String,
}

/// The worst status of all.
pub fn worst(checks: &[Check]) -> Status {
    checks.iter().map(|check| check.status).max().unwrap_or(Status::Fail)
}

/// The checks that records allow.
pub fn checks(records: &[AttackRecord]) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut add = |name: &str, status: Status, evidence: String| {
        checks.push(Check { name: name.to_owned(), status, evidence });
    };
    let attacked: Vec<&AttackRecord> =
        records.iter().filter(|record| record.adversarial_image.is_some()).collect();
    if attacked.is_empty() {
        add("items attacked", Status::Fail, "no item was right when clean: nothing was attacked".to_owned());
        return checks;
    }
    let of_attacked = |count: usize| format!("{count} of {} attacked items", attacked.len());
    let size = |record: &AttackRecord| if record.norm == "l2" { record.l2 } else { record.linf };
    let beyond = attacked.iter().filter(|record| size(record) > record.epsilon * (1.0 + 1e-9)).count();
    let status = if beyond > 0 { Status::Fail } else { Status::Pass };
    add("budget kept by files", status, format!("{} beyond the budget", of_attacked(beyond)));

    let first = attacked[0];
    if first.epsilon == 0.0 {
        add("budget", Status::Warn, "the budget is 0: nothing was tried".to_owned());
    }
    // An attack that eight bits cannot hold tried nothing, whatever its losses before rounding were.
    let untouched = attacked.iter().filter(|record| record.linf == 0.0).count();
    let status = match untouched {
        0 => Status::Pass,
        untouched if 10 * untouched > attacked.len() => Status::Fail,
        _ => Status::Warn,
    };
    add("files are changed", status, format!("{} whose file equals the original", of_attacked(untouched)));
    let difference =
        attacked.iter().filter_map(|r| r.more.get("processor_difference")?.as_f64()).fold(0.0, f64::max);
    // The processor rounds to eight bits after each of its two passes: half a level, spread by the second, and half again.
    let status = if difference <= 1.75 / 255.0 { Status::Pass } else { Status::Fail };
    let evidence = format!(
        "the attacked function and the model's own processor differ by at most {:.2} levels of 255 on the files",
        255.0 * difference
    );
    add("processor equality", status, evidence);

    let uses_gradients = !matches!(first.method.as_str(), "noise" | "square");
    if uses_gradients {
        let is_true = |record: &AttackRecord| record.more.get("zero_gradient") == Some(&true.into());
        let zero = attacked.iter().filter(|record| is_true(record)).count();
        let status = match zero {
            0 => Status::Pass,
            zero if 10 * zero > attacked.len() => Status::Fail,
            _ => Status::Warn,
        };
        add("gradient is there", status, format!("{} with a gradient of zero", of_attacked(zero)));
        let stuck = attacked.iter().filter(|r| r.loss_adversarial <= r.loss_clean).count();
        let status = if 10 * stuck > attacked.len() { Status::Warn } else { Status::Pass };
        add("loss rises", status, format!("{} whose loss did not rise", of_attacked(stuck)));
    } else {
        let evidence = format!("`{}` uses no gradients: compare with pgd or auto", first.method);
        add("strength", Status::Warn, evidence);
    }

    let of = |record: &AttackRecord| -> Option<Examined> {
        let probe = serde_json::from_value(record.more.get("probe")?.clone()).ok()?;
        let blank = record.more.get("controls").and_then(|controls| controls["blank_image"].as_str());
        let is_rounded = record.more.get("arithmetic").and_then(|word| word.as_str()) == Some("bf16");
        Some(Examined { probe, is_blind: blank == Some(record.answer.as_str()), is_rounded })
    };
    let probes: Vec<Examined> = records.iter().filter_map(of).collect();
    if probes.is_empty() {
        add("examination", Status::Warn, "no item was examined: see `--verdict-items`".to_owned());
        return checks;
    }
    checks.extend(of_probes(&probes));
    checks
}

/// An examined item.
struct Examined {
    probe: Probe,
    /// Whether the model gives the right answer to a blank image too: no change of the image need break it.
    is_blind: bool,
    /// Whether its products were of bfloat16: the loss goes in steps, and differences say little about its slope.
    is_rounded: bool,
}

/// The checks that rest on examined items.
fn of_probes(examined: &[Examined]) -> Vec<Check> {
    let n = examined.len();
    let probes: Vec<&Probe> = examined.iter().map(|item| &item.probe).collect();
    let count = |is: fn(&Probe) -> bool| probes.iter().filter(|probe| is(probe)).count();
    let mean = |loss: fn(&Probe) -> f64| probes.iter().map(|probe| loss(probe)).sum::<f64>() / n as f64;
    let mut checks = Vec::new();
    let mut add = |name: &str, status: Status, evidence: String| {
        checks.push(Check { name: name.to_owned(), status, evidence });
    };
    let warn_if = |is_wrong: bool| if is_wrong { Status::Warn } else { Status::Pass };

    let errors: Vec<f64> = probes.iter().filter_map(|probe| probe.gradient_error).collect();
    let flat = n - errors.len();
    let mut sorted = errors.clone();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    let worst = sorted.last().copied().unwrap_or(0.0);
    let is_rounded = examined.iter().any(|item| item.is_rounded);
    let status = match worst {
        worst if is_rounded && worst > 0.05 => Status::Warn,
        _ if middle > 0.2 => Status::Fail,
        // One item may stand at a kink of its loss.
        worst if worst > 0.05 || 2 * flat > n => Status::Warn,
        _ => Status::Pass,
    };
    let rounding = if is_rounded {
        "; products of bfloat16 hide the slope from differences: ask the same attack in float32"
    } else {
        ""
    };
    let evidence = format!(
        "off by {middle:.1e} in the middle, {worst:.1e} at most, from differences along {DIRECTIONS} directions of {n} items; loss flat in {flat}{rounding}"
    );
    add("gradient check", status, evidence);

    let [start, middle, end] =
        [0, 1, 2].map(|i| probes.iter().map(|p| p.loss_by_steps[i]).sum::<f64>() / n as f64);
    let evidence =
        format!("mean loss {start:.3} at the start of pgd, {middle:.3} halfway, {end:.3} at the end");
    add("loss by steps", warn_if(middle < start - SLACK || end < middle - SLACK), evidence);

    let [half, own, twice] =
        [0, 1, 2].map(|i| probes.iter().map(|p| p.loss_by_epsilon[i]).sum::<f64>() / n as f64);
    let evidence =
        format!("mean loss {half:.3} at half the budget, {own:.3} at the budget, {twice:.3} at twice");
    add("loss by budget", warn_if(own < half - SLACK || twice < own - SLACK), evidence);

    let unbounded = count(|probe| probe.broken.unbounded);
    let stand = |is_blind| {
        examined.iter().filter(|item| !item.probe.broken.unbounded && item.is_blind == is_blind).count()
    };
    // What is answered without the image can stand any change of it: that speaks against the model, not the attack.
    let (seeing, blind) = (stand(false), stand(true));
    let status = match seeing {
        seeing if 5 * seeing > n => Status::Fail,
        0 if blind == 0 => Status::Pass,
        _ => Status::Warn,
    };
    let unseen = match blind {
        0 => String::new(),
        blind => format!("; {blind} that stand are answered the same without an image"),
    };
    add("unbounded attack", status, format!("without a budget {unbounded} of {n} items break{unseen}"));

    let [noise, fgsm, pgd, own] = [
        count(|probe| probe.broken.noise),
        count(|probe| probe.broken.fgsm),
        count(|probe| probe.broken.pgd),
        count(|probe| probe.broken.own),
    ];
    let losses = [mean(|p| p.loss_noise), mean(|p| p.loss_fgsm), mean(|p| p.loss_by_epsilon[1])];
    let is_wrong = noise > fgsm.max(own)
        || fgsm > pgd.max(own)
        || losses[0] > losses[1] + SLACK
        || losses[1] > losses[2] + SLACK;
    let evidence = format!(
        "of {n} items noise breaks {noise}, fgsm {fgsm}, pgd {pgd}, the run's attack {own}; mean loss {:.3}, {:.3}, {:.3}",
        losses[0], losses[1], losses[2]
    );
    add("order of strength", warn_if(is_wrong), evidence);

    let missed = |is: fn(&Broken) -> bool| probes.iter().filter(|p| is(&p.broken) && !p.broken.own).count();
    for (name, what, found) in [
        ("black box is weaker", "square with few queries", missed(|b| b.square)),
        ("blank image is weaker", "the blank image brought into the ball", missed(|b| b.blank)),
        ("simpler is weaker", "noise, fgsm or pgd", missed(|b| b.noise || b.fgsm || b.pgd)),
    ] {
        let evidence = format!("{what} breaks {found} of {n} items that the run's attack leaves");
        add(name, warn_if(found > 0), evidence);
    }
    checks
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
