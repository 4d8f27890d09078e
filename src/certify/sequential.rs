//! Sequential certificates: what the draws so far prove, when to look, and when to stop.
//!
//! Bound, schedule and stopping rule follow from the configuration alone, before the first draw; a look depends on the
//! number of draws, never on batches. The bound holds at all looks together with confidence `1 - alpha`, so stopping at
//! any of them is sound, whatever made one stop:
//!
//! - `kt`: the bound of [`anytime_lower_bound`] at three quarters of `alpha`, looked at after every number of draws with at
//!   most three significant digits (1 to 999, 1000, 1010, …), and at the cap a Clopper-Pearson bound at the last quarter
//!   (a union bound): it decides the close cases that the price of looking always would leave open;
//! - `clopper_pearson`: exact bounds at `alpha / J` after `J` stages, each twice the one before (a union bound).
//!
//! Futility is not soundness: an item is given up when the same bound on the other classes says that the goal is out of
//! reach, wrongly with probability `alpha` at most. It is left undecided before the cap when even unanimous draws up to
//! there could not reach the goal.

use super::radius::RadiusRow;
use super::smooth::SmoothingConfig;
use crate::error::{ConfigError, Result};
use crate::stats::sequential::{MAX_ALPHA, anytime_lower_bound, log_e_value};
use crate::stats::{Probability, binomial, normal};
use serde::{Deserialize, Serialize};

/// Share of `alpha` that rule `kt` keeps for the fixed bound at the cap. Measured on published images: without it up to 0.6
/// points of certified accuracy are lost against a fixed number of draws, with it none, for 1 to 5 % more draws.
const CAP_SHARE: f64 = 0.25;
/// No stage of Clopper-Pearson bounds is shorter, unless it is the only one.
const FIRST_STAGE: u64 = 100;
/// Without a target an item is hopeless when no class has a majority.
const HALF: Probability = Probability { value: 0.5, complement: 0.5 };

/// Which draws went to the selected class, one bit each, in hexadecimal: the first draw is the highest bit of the first
/// digit. With them a certificate can be made again look by look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Wins(Vec<bool>);

impl Wins {
    /// Of draws in order.
    pub fn new(wins: impl Iterator<Item = bool>) -> Self {
        Self(wins.collect())
    }

    /// Wins among the first `n` draws, at place `n`.
    pub fn counts(&self) -> Vec<u64> {
        let mut count = 0;
        let after = self.0.iter().map(|win| {
            count += u64::from(*win);
            count
        });
        std::iter::once(0).chain(after).collect()
    }
}

impl From<Wins> for String {
    fn from(wins: Wins) -> Self {
        let digit = |four: &[bool]| {
            let value = four.iter().enumerate().fold(0, |sum, (i, win)| sum | u32::from(*win) << (3 - i));
            char::from_digit(value, 16).unwrap_or('0')
        };
        wins.0.chunks(4).map(digit).collect()
    }
}

impl TryFrom<String> for Wins {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let mut wins = Vec::with_capacity(4 * text.len());
        for digit in text.chars() {
            let value = digit.to_digit(16).ok_or_else(|| format!("`{digit}` is no hexadecimal digit"))?;
            wins.extend((0..4).map(|i| value >> (3 - i) & 1 == 1));
        }
        Ok(Self(wins))
    }
}

/// Which bound holds at all looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// Krichevsky-Trofimov e-value, cut off at the bound; at the cap a Clopper-Pearson bound beside it.
    Kt,
    /// Clopper-Pearson bounds that share `alpha` over stages.
    ClopperPearson,
}

/// How a sequential certificate spends its draws.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sequential {
    /// The bound.
    pub rule: Rule,
    /// Decide only whether the radius is at least this; otherwise the radius is what grows.
    pub target_radius: Option<f64>,
    /// Without a target: stop when twice the draws would, at the present share, raise the radius by less than this
    /// share of it.
    pub min_gain: f64,
}

/// Why no further draw was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// The target radius is certified.
    Certified,
    /// The other classes are too likely for the target radius, or for any.
    Futile,
    /// Twice the draws would gain too little.
    Gain,
    /// The cap is reached, or even unanimous draws up to it would not be enough.
    Cap,
}

/// The look that proves most.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// Draws of the selected class among the first `n`.
    pub count: u64,
    /// Draws up to that look.
    pub n: u64,
    /// Lower bound of the class's probability.
    pub p_lower: Probability,
}

/// Bound, schedule and stopping rule of one certificate, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Procedure {
    settings: Sequential,
    n_max: u64,
    /// Spent on one stage of Clopper-Pearson; by KT on everything.
    alpha: f64,
    /// `Φ(target_radius / sigma)`.
    target: Option<Probability>,
    /// Looks of Clopper-Pearson, ascending; empty for KT.
    stages: Vec<u64>,
}

impl Procedure {
    /// What `settings` mean under a cap of `n_max` draws.
    pub fn new(settings: Sequential, n_max: u64, alpha: f64, sigma: f64) -> Self {
        let stages = match settings.rule {
            Rule::Kt => Vec::new(),
            Rule::ClopperPearson => stages(n_max),
        };
        Self {
            settings,
            n_max,
            alpha: alpha / stages.len().max(1) as f64,
            target: settings.target_radius.map(|radius| normal::distribution(radius / sigma)),
            stages,
        }
    }

    /// The probability that certifies the target radius.
    pub fn target(&self) -> Option<Probability> {
        self.target
    }

    /// The first look after `n` draws; the cap is always one.
    pub fn next_look(&self, n: u64) -> u64 {
        match self.settings.rule {
            Rule::Kt => {
                let unit = 10u64.pow(n.max(1).ilog10().saturating_sub(2));
                ((n / unit + 1) * unit).min(self.n_max)
            }
            Rule::ClopperPearson => *self.stages.iter().find(|stage| **stage > n).unwrap_or(&self.n_max),
        }
    }

    /// Whether one looks after `n` draws.
    pub fn is_look(&self, n: u64) -> bool {
        n > 0 && n <= self.n_max && self.next_look(n - 1) == n
    }

    /// The schedule in records: the stages, or the words for KT's.
    pub fn schedule(&self) -> serde_json::Value {
        match self.settings.rule {
            Rule::Kt => "three_significant_digits".into(),
            Rule::ClopperPearson => self.stages.clone().into(),
        }
    }

    /// Whether `count` of `n` draws prove a probability of at least `p`, by the test that [`Self::lower_bound`] inverts.
    pub fn proves(&self, count: u64, n: u64, p: Probability) -> bool {
        match self.settings.rule {
            _ if p.complement <= 0.0 => false,
            Rule::Kt => {
                let at_cap = n == self.n_max && binomial::upper_tail(count, n, p) <= CAP_SHARE * self.alpha;
                at_cap || log_e_value(count, n, p) >= -((1.0 - CAP_SHARE) * self.alpha).ln()
            }
            Rule::ClopperPearson => binomial::upper_tail(count, n, p) <= self.alpha,
        }
    }

    /// The largest probability that `count` of `n` draws prove.
    ///
    /// # Errors
    /// An impossible count, or an `alpha` for which the bound is not proved.
    pub fn lower_bound(&self, count: u64, n: u64) -> Result<Probability> {
        match self.settings.rule {
            Rule::Kt => {
                let anytime = anytime_lower_bound(count, n, (1.0 - CAP_SHARE) * self.alpha)?;
                if n < self.n_max {
                    return Ok(anytime);
                }
                let at_cap = binomial::lower_bound(count, n, CAP_SHARE * self.alpha)?;
                Ok(if at_cap.value > anytime.value { at_cap } else { anytime })
            }
            Rule::ClopperPearson => binomial::lower_bound(count, n, self.alpha),
        }
    }

    /// Why no draw after `count` of `n` would help towards the goal (the target, or a majority), if so.
    fn hopeless(&self, count: u64, n: u64) -> Option<Stop> {
        let goal = self.target.unwrap_or(HALF);
        if self.proves(n - count, n, goal.opposite()) {
            return Some(Stop::Futile);
        }
        let is_lost = !self.proves(count + (self.n_max - n), self.n_max, goal);
        is_lost.then_some(Stop::Cap)
    }

    /// Why one stops after `count` of `n` draws, if so; `best` is the look that proves most so far.
    ///
    /// # Errors
    /// Those of [`Self::lower_bound`].
    pub fn stop(&self, count: u64, n: u64, best: &Bound) -> Result<Option<Stop>> {
        if self.target.is_some_and(|target| self.proves(count, n, target)) {
            return Ok(Some(Stop::Certified));
        }
        if n >= self.n_max {
            return Ok(Some(Stop::Cap));
        }
        if self.target.is_none() && best.p_lower.value > 0.5 {
            let ahead = (2 * n).min(self.n_max);
            let same_share = (u128::from(count) * u128::from(ahead) / u128::from(n)) as u64;
            let promised = normal::quantile(self.lower_bound(same_share, ahead)?);
            let enough = promised <= (1.0 + self.settings.min_gain) * normal::quantile(best.p_lower);
            return Ok(enough.then_some(Stop::Gain));
        }
        Ok(self.hopeless(count, n))
    }

    /// Draws until a reason to stop, given the number of successes among the first so many draws. Gives the number of
    /// draws, the look that proves most (the first of equals), and the reason.
    ///
    /// # Errors
    /// Those of `successes`.
    pub fn run(&self, mut successes: impl FnMut(u64) -> Result<u64>) -> Result<(u64, Bound, Stop)> {
        let mut n = 0;
        let mut best: Option<Bound> = None;
        loop {
            n = self.next_look(n);
            let count = successes(n)?;
            let is_better = best.is_none_or(|best| {
                best.p_lower.value <= 0.0 && count > 0 || self.proves(count, n, best.p_lower)
            });
            let now = match best.filter(|_| !is_better) {
                Some(best) => best,
                None => Bound { count, n, p_lower: self.lower_bound(count, n)? },
            };
            best = Some(now);
            if let Some(stop) = self.stop(count, n, &now)? {
                return Ok((n, now, stop));
            }
        }
    }

    /// The radius that a bound certifies. A certified target is certified whole, however the bound was rounded.
    pub fn radius(&self, bound: &Bound, stop: Stop, sigma: f64) -> RadiusRow {
        let mut row = RadiusRow::of_bound(bound.p_lower, sigma);
        if let (Stop::Certified, Some(target), Some(radius)) =
            (stop, self.target, self.settings.target_radius)
        {
            row.abstain = false;
            row.p_lower = row.p_lower.max(target.value);
            row.radius = row.radius.max(radius);
        }
        row
    }

    /// Whether unanimous draws reach the goal within the cap.
    fn is_reachable(&self) -> bool {
        self.proves(self.n_max, self.n_max, self.target.unwrap_or(HALF))
    }
}

impl Sequential {
    /// Every value that makes no sense or can never answer, with the keys of [`SmoothingConfig`], whose other values are
    /// sound.
    pub(super) fn problems(&self, config: &SmoothingConfig) -> Vec<ConfigError> {
        let mut problems = Vec::new();
        if !(self.min_gain >= 0.0 && self.min_gain.is_finite()) {
            let message = format!("`min_gain` must be a finite number of at least 0: {}", self.min_gain);
            problems.push(ConfigError::new("min_gain", message));
        }
        if self.target_radius.is_some_and(|radius| !(radius > 0.0 && radius.is_finite())) {
            let message = "`target_radius` must be a positive finite number";
            problems.push(ConfigError::new("target_radius", message));
        }
        if self.rule == Rule::Kt && config.alpha > MAX_ALPHA {
            let message = format!(
                "`alpha` {} is too large for rule `kt`, which is proved up to {MAX_ALPHA:.4}",
                config.alpha
            );
            problems.push(ConfigError::new("alpha", message));
        }
        if problems.is_empty() {
            problems.extend(self.unreachable(config));
        }
        problems
    }

    /// That even a unanimous vote would not reach the goal, and what would.
    fn unreachable(&self, config: &SmoothingConfig) -> Option<ConfigError> {
        let SmoothingConfig { n, alpha, sigma, .. } = *config;
        let under = |n_max| Procedure::new(*self, n_max, alpha, sigma);
        if n > 0 && under(n).is_reachable() {
            return None;
        }
        // The least cap that is enough lies between a power of two and its half.
        let enough = (0..40).map(|power| 1u64 << power).find(|&n| under(n).is_reachable());
        let least = enough.map(|enough| {
            let (mut low, mut high) = (enough / 2, enough);
            while high - low > 1 {
                let middle = low + (high - low) / 2;
                if under(middle).is_reachable() { high = middle } else { low = middle }
            }
            high
        });
        let Some(target) = self.target_radius else {
            let message =
                format!("n = {n} can never answer at alpha = {alpha}: even a unanimous vote would abstain");
            let help = format!("use at least {} draws", least.unwrap_or(u64::MAX));
            return Some(ConfigError::new("n", message).with_help(help));
        };
        let largest = (n > 0).then(|| under(n).lower_bound(n, n).ok()).flatten();
        let largest = largest.map_or(0.0, |p| RadiusRow::of_bound(p, sigma).radius);
        // Rounded down, so that what is suggested can be reached.
        let digits = 10f64.powi(4 - largest.max(1e-300).log10().ceil() as i32);
        let largest = (largest * digits).floor() / digits;
        let message = format!(
            "a radius of {target} can never be certified with n = {n} at alpha = {alpha}, sigma = {sigma}: the largest that a unanimous vote reaches is {largest}"
        );
        let draws = least.map_or_else(String::new, |least| format!("use at least {least} draws, or "));
        let help = format!("{draws}lower the target radius or raise `sigma`");
        Some(ConfigError::new("target_radius", message).with_help(help))
    }
}

/// `n_max`, its half, its quarter and so on (rounded up) down to [`FIRST_STAGE`], ascending.
fn stages(n_max: u64) -> Vec<u64> {
    let mut stages = vec![n_max];
    while let Some(&last) = stages.last().filter(|last| **last >= 2 * FIRST_STAGE) {
        stages.push(last.div_ceil(2));
    }
    stages.reverse();
    stages
}

#[cfg(test)]
mod tests;
