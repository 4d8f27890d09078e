//! Cohen's CERTIFY and PREDICT over counter-based noise.
//!
//! Draw `d` of an item takes its noise from the stream (seed, "smoothing", item key, d): counts of disjoint ranges
//! of draws add up, and batch size, order and threads change nothing. Selection uses draws `0..n0`, estimation those
//! from `n0` on, as many as the mode takes; both ranges travel with the certificate. The noise is added to pixels in
//! [0, 1] and not clipped.

use super::BaseClassifier;
use super::radius::{radius, smallest_certifying_n};
use super::sequential::{Procedure, Sequential, Stop, Wins};
use crate::error::{ConfigError, Error, Result};
use crate::rng;
use crate::stats::binomial;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How an item is smoothed and how sure the answer must be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmoothingConfig {
    /// Standard deviation of the noise, in units of pixels in [0, 1]; has no default.
    pub sigma: f64,
    /// Draws that select the class.
    #[serde(default = "default_n0")]
    pub n0: u64,
    /// Draws that estimate its probability; the cap when sequential.
    #[serde(default = "default_n")]
    pub n: u64,
    /// Failure probability of one certificate, in (0, 1).
    #[serde(default = "default_alpha")]
    pub alpha: f64,
    /// Draws per call of the classifier; changes nothing but speed and memory.
    #[serde(default = "default_batch_size")]
    pub batch_size: usize,
    /// Seed of the noise.
    #[serde(default)]
    pub seed: u64,
    /// How to stop early; absent: exactly `n` draws (CERTIFY).
    #[serde(default)]
    pub sequential: Option<Sequential>,
}

fn default_n0() -> u64 {
    100
}
fn default_n() -> u64 {
    1000
}
fn default_alpha() -> f64 {
    0.001
}
fn default_batch_size() -> usize {
    32
}

impl SmoothingConfig {
    /// The contract's defaults at a given `sigma`.
    pub fn new(sigma: f64) -> Self {
        let (n0, n, alpha) = (default_n0(), default_n(), default_alpha());
        Self { sigma, n0, n, alpha, batch_size: default_batch_size(), seed: 0, sequential: None }
    }

    /// Every value that makes no sense, keys relative to this table.
    pub fn problems(&self) -> Vec<ConfigError> {
        let mut problems = Vec::new();
        if !(self.sigma > 0.0 && self.sigma.is_finite()) {
            let message = format!("`sigma` must be a positive finite number: {}", self.sigma);
            problems.push(ConfigError::new("sigma", message).with_help("a common choice is 0.25"));
        }
        if self.n0 == 0 {
            problems.push(ConfigError::new(
                "n0",
                "`n0` must be at least 1: the class is selected from these draws",
            ));
        }
        if self.batch_size == 0 {
            problems.push(ConfigError::new("batch_size", "`batch_size` must be at least 1"));
        }
        if !(self.alpha > 0.0 && self.alpha < 1.0) {
            let message = format!("`alpha` must lie strictly between 0 and 1: {}", self.alpha);
            problems.push(ConfigError::new("alpha", message));
        } else if let Some(sequential) = self.sequential {
            if self.sigma > 0.0 && self.sigma.is_finite() {
                problems.extend(sequential.problems(self));
            }
        } else if self.n < smallest_certifying_n(self.alpha) {
            let least = smallest_certifying_n(self.alpha);
            let message = format!(
                "n = {} can never answer at alpha = {}: even a unanimous vote would abstain",
                self.n, self.alpha
            );
            problems.push(ConfigError::new("n", message).with_help(format!("use at least {least} draws")));
        }
        if self.n0.checked_add(self.n).is_none() {
            problems.push(ConfigError::new("n", "`n0` and `n` together exceed what can be counted"));
        }
        problems
    }

    /// Refuses a configuration that makes no sense or can never answer.
    ///
    /// # Errors
    /// [`Error::Config`] with every problem at once.
    pub fn check(&self) -> Result<()> {
        let problems = self.problems();
        if problems.is_empty() { Ok(()) } else { Err(Error::Config(problems)) }
    }

    /// The draws that select the class.
    pub fn selection_draws(&self) -> Range<u64> {
        0..self.n0
    }

    /// The draws that estimate its probability, `n` at most: none of them selected it.
    pub fn estimation_draws(&self) -> Range<u64> {
        self.n0..self.n0 + self.n
    }

    /// Bound, schedule and stopping rule, when sequential.
    pub fn procedure(&self) -> Option<Procedure> {
        self.sequential.map(|settings| Procedure::new(settings, self.n, self.alpha, self.sigma))
    }
}

/// A certificate of one item, with the counts it rests on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// The smoothed classifier's class; none when it abstains.
    pub prediction: Option<usize>,
    /// L2 radius in units of pixels in [0, 1] within which the prediction cannot change; 0 when abstained.
    pub radius: f64,
    /// Lower confidence bound of the selected class's probability.
    pub p_lower: f64,
    /// The class with most selection draws (the lowest of equals), also when abstained.
    pub selected: usize,
    /// Class counts over the selection draws.
    pub counts_selection: Vec<u64>,
    /// Class counts over the estimation draws.
    pub counts: Vec<u64>,
    /// The selection draws, from and up to.
    pub draws_selection: Range<u64>,
    /// The estimation draws, from and up to.
    pub draws_estimation: Range<u64>,
    /// What a sequential certificate rests on.
    pub evidence: Option<Evidence>,
}

/// Where a sequential certificate stopped, and the look that its bound rests on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// Why no further draw was made.
    pub stop: Stop,
    /// Draws of the selected class among the first `n` estimation draws.
    pub count: u64,
    /// Draws up to the look that proves most.
    pub n: u64,
    /// Which estimation draws went to the selected class.
    pub wins: Wins,
}

impl Certificate {
    /// The certificate that these counts of a fixed number of draws give.
    ///
    /// # Errors
    /// Counts that do not add up to the configured draws, or differ in length.
    pub fn from_counts(config: &SmoothingConfig, selection: Vec<u64>, estimation: Vec<u64>) -> Result<Self> {
        let sums = [&selection, &estimation].map(|counts| counts.iter().sum::<u64>());
        if sums != [config.n0, config.n] || selection.len() != estimation.len() {
            return Err(Error::data(format!(
                "counts of {} and {} draws over {} and {} classes do not fit n0 = {}, n = {}",
                sums[0],
                sums[1],
                selection.len(),
                estimation.len(),
                config.n0,
                config.n
            )));
        }
        let selected = first_maximum(&selection);
        let row = radius(estimation[selected], config.n, config.alpha, config.sigma)?;
        Ok(Self {
            prediction: (!row.abstain).then_some(selected),
            radius: row.radius,
            p_lower: row.p_lower,
            selected,
            counts_selection: selection,
            counts: estimation,
            draws_selection: config.selection_draws(),
            draws_estimation: config.estimation_draws(),
            evidence: None,
        })
    }
}

/// The smoothed classifier's answer to one item, without a radius.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// The class; none when it abstains.
    pub prediction: Option<usize>,
    /// P-value of the two-sided exact test that the two leading classes are equally likely.
    pub p_value: f64,
    /// Class counts.
    pub counts: Vec<u64>,
}

impl Prediction {
    /// The prediction that these counts give: abstains when the test's p-value exceeds `alpha`; equality answers.
    ///
    /// # Errors
    /// No classes, or `alpha` outside (0, 1).
    pub fn from_counts(counts: Vec<u64>, alpha: f64) -> Result<Self> {
        if counts.is_empty() {
            return Err(Error::usage("a prediction needs at least one class"));
        }
        if !(alpha > 0.0 && alpha < 1.0) {
            return Err(Error::usage(format!("alpha must lie strictly between 0 and 1: {alpha}")));
        }
        // Among equals any order will do: a tie has p-value 1 and abstains.
        let first = first_maximum(&counts);
        let second = counts.iter().enumerate().filter(|&(class, _)| class != first).map(|(_, &c)| c).max();
        let p_value = binomial::two_sided_test(counts[first], second.unwrap_or(0));
        Ok(Self { prediction: (p_value <= alpha).then_some(first), p_value, counts })
    }
}

/// One item under the noise of any draw.
struct NoisyItem<'a> {
    classifier: &'a dyn BaseClassifier,
    clean: Vec<f32>,
    /// Channels, height, width.
    dims: (usize, usize, usize),
    device: Device,
    sigma: f32,
    seed: u64,
    key: u64,
}

impl<'a> NoisyItem<'a> {
    fn new(
        classifier: &'a dyn BaseClassifier,
        pixels: &Tensor,
        sigma: f64,
        seed: u64,
        key: u64,
    ) -> Result<Self> {
        let (dims, device) = (pixels.dims3()?, pixels.device().clone());
        if !(sigma > 0.0 && sigma.is_finite()) {
            return Err(Error::usage(format!("sigma must be a positive finite number: {sigma}")));
        }
        let clean = pixels.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if clean.iter().any(|value| !value.is_finite()) {
            return Err(Error::NonFinite("the pixels to be smoothed are not all finite".into()));
        }
        Ok(Self { classifier, clean, dims, device, sigma: sigma as f32, seed, key })
    }

    /// The class of each draw, from one call of the classifier.
    fn classes(&self, draws: Range<u64>) -> Result<Vec<usize>> {
        let size = (draws.end - draws.start) as usize;
        let (channels, height, width) = self.dims;
        let noisy = noisy_batch(&self.clean, self.sigma, self.seed, self.key, draws.start, size);
        let batch = Tensor::from_vec(noisy, (size, channels, height, width), &self.device)?;
        let classes = self.classifier.classify(&batch, draws)?;
        let num_classes = self.classifier.num_classes();
        if classes.len() != size || classes.iter().any(|&class| class >= num_classes) {
            return Err(Error::Other(anyhow::anyhow!(
                "the classifier gave {classes:?} for {size} images and {num_classes} classes"
            )));
        }
        Ok(classes)
    }
}

/// Is given the classes of each batch as soon as they are there; an error ends the certificate.
pub type Keep<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// The classes of an item's draws in order, from draw 0 on. What is known already is not computed again, so that a
/// certificate that was cut off goes on where it stopped.
pub struct Draws<'a> {
    item: NoisyItem<'a>,
    batch_size: u64,
    /// None is computed from here on.
    end: u64,
    known: Vec<u8>,
    keep: &'a mut Keep<'a>,
}

impl std::fmt::Debug for Draws<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Draws")
            .field("known", &self.known.len())
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}

impl<'a> Draws<'a> {
    /// The draws of one item, of which the first are `known`.
    ///
    /// # Shapes
    /// - `pixels`: `[3, height, width]`, values in [0, 1]
    ///
    /// # Errors
    /// A configuration that cannot answer, pixels that are not finite, or a known class that does not exist.
    pub fn new(
        classifier: &'a dyn BaseClassifier,
        pixels: &Tensor,
        item_key: u64,
        config: &SmoothingConfig,
        known: Vec<u8>,
        keep: &'a mut Keep<'a>,
    ) -> Result<Self> {
        config.check()?;
        let num_classes = classifier.num_classes();
        if num_classes > usize::from(u8::MAX) || known.iter().any(|&class| usize::from(class) >= num_classes)
        {
            return Err(Error::data(format!("draws of other classes than these {num_classes}")));
        }
        let item = NoisyItem::new(classifier, pixels, config.sigma, config.seed, item_key)?;
        let (batch_size, end) = (config.batch_size as u64, config.estimation_draws().end);
        Ok(Self { item, batch_size, end, known, keep })
    }

    /// The classes of a range of draws. Batches are filled beyond its end: what they cost is the same.
    fn classes(&mut self, draws: Range<u64>) -> Result<&[u8]> {
        while (self.known.len() as u64) < draws.end {
            let first = self.known.len() as u64;
            let classes = self.item.classes(first..(first + self.batch_size).min(self.end))?;
            let classes: Vec<u8> = classes.into_iter().map(|class| class as u8).collect();
            self.known.extend_from_slice(&classes);
            (self.keep)(&classes)?;
        }
        Ok(&self.known[draws.start as usize..draws.end as usize])
    }

    fn counts(&mut self, draws: Range<u64>) -> Result<Vec<u64>> {
        let mut counts = vec![0; self.item.classifier.num_classes()];
        for &class in self.classes(draws)? {
            counts[usize::from(class)] += 1;
        }
        Ok(counts)
    }
}

/// Counts the classes that `classifier` gives to `pixels` under the noise of `draws`.
///
/// Counts of disjoint ranges add up to the counts of their union.
///
/// # Shapes
/// - `pixels`: `[3, height, width]`, values in [0, 1]
/// - returns: one count per class
///
/// # Errors
/// `sigma` or `batch_size` not positive, pixels that are not finite, or a classifier that breaks its promise.
pub fn count_draws(
    classifier: &dyn BaseClassifier,
    pixels: &Tensor,
    sigma: f64,
    seed: u64,
    item_key: u64,
    draws: Range<u64>,
    batch_size: usize,
) -> Result<Vec<u64>> {
    if batch_size == 0 {
        return Err(Error::usage("the batch size must be at least 1"));
    }
    let item = NoisyItem::new(classifier, pixels, sigma, seed, item_key)?;
    let mut counts = vec![0u64; classifier.num_classes()];
    for first in draws.clone().step_by(batch_size) {
        for class in item.classes(first..(first + batch_size as u64).min(draws.end))? {
            counts[class] += 1;
        }
    }
    Ok(counts)
}

/// CERTIFY: selects a class with `n0` draws, bounds its probability with fresh ones, `n` or as many as the sequential
/// rule takes, certifies or abstains.
///
/// # Errors
/// Those of the classifier, and of whoever keeps the draws.
///
/// # References
/// Cohen et al. 2019, section 3.2.2.
pub fn certify(draws: &mut Draws<'_>, config: &SmoothingConfig) -> Result<Certificate> {
    let selection = draws.counts(config.selection_draws())?;
    let all = config.estimation_draws();
    let Some(procedure) = config.procedure() else {
        return Certificate::from_counts(config, selection, draws.counts(all)?);
    };
    let selected = first_maximum(&selection);
    let (mut seen, mut count) = (all.start, 0);
    let (n, bound, stop) = procedure.run(|n| {
        let fresh = draws.classes(seen..all.start + n)?;
        count += fresh.iter().filter(|class| usize::from(**class) == selected).count() as u64;
        seen = all.start + n;
        Ok(count)
    })?;
    let row = procedure.radius(&bound, stop, config.sigma);
    let draws_estimation = all.start..all.start + n;
    let classes = draws.classes(draws_estimation.clone())?;
    let wins = Wins::new(classes.iter().map(|class| usize::from(*class) == selected));
    Ok(Certificate {
        prediction: (!row.abstain).then_some(selected),
        radius: row.radius,
        p_lower: row.p_lower,
        selected,
        counts_selection: selection,
        counts: draws.counts(draws_estimation.clone())?,
        draws_selection: config.selection_draws(),
        draws_estimation,
        evidence: Some(Evidence { stop, count: bound.count, n: bound.n, wins }),
    })
}

/// The clean pixels `size` times, each with the noise of its own draw.
fn noisy_batch(clean: &[f32], sigma: f32, seed: u64, item_key: u64, first: u64, size: usize) -> Vec<f32> {
    let mut noisy = rng::normal_draws(seed, "smoothing", item_key, first, size, clean.len());
    noisy.par_chunks_mut(clean.len().max(1)).for_each(|values| {
        for (value, &pixel) in values.iter_mut().zip(clean) {
            *value = pixel + sigma * *value;
        }
    });
    noisy
}

/// Index of the largest count; the lowest of equals.
fn first_maximum(counts: &[u64]) -> usize {
    let mut best = 0;
    for (class, &count) in counts.iter().enumerate() {
        if count > counts[best] {
            best = class;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certify::{Rule, Sequential};
    use crate::stats::{Probability, normal};
    use std::cell::RefCell;

    /// Class 0 where the mean of all pixels is above a threshold. Under noise the mean is normal, so the smoothed
    /// class is known, and so is its radius: the distance to the plane, |mean - threshold| · sqrt(pixels).
    struct HalfSpace {
        threshold: f32,
        batches: RefCell<Vec<usize>>,
    }

    impl HalfSpace {
        fn new(threshold: f32) -> Self {
            Self { threshold, batches: RefCell::default() }
        }
    }

    impl BaseClassifier for HalfSpace {
        fn num_classes(&self) -> usize {
            3
        }
        fn classify(&self, noisy: &Tensor, _: Range<u64>) -> Result<Vec<usize>> {
            self.batches.borrow_mut().push(noisy.dims()[0]);
            let rows = noisy.flatten_from(1)?.to_vec2::<f32>()?;
            Ok(rows
                .iter()
                .map(|r| usize::from(r.iter().sum::<f32>() / r.len() as f32 <= self.threshold))
                .collect())
        }
    }

    fn gray(value: f32, side: usize) -> Tensor {
        Tensor::full(value, (3, side, side), &Device::Cpu).unwrap()
    }

    fn certified(
        classifier: &dyn BaseClassifier,
        pixels: &Tensor,
        key: u64,
        config: &SmoothingConfig,
    ) -> Certificate {
        let mut keep = |_: &[u8]| Ok(());
        certify(&mut Draws::new(classifier, pixels, key, config, Vec::new(), &mut keep).unwrap(), config)
            .unwrap()
    }

    fn config(sigma: f64, n0: u64, n: u64, alpha: f64) -> SmoothingConfig {
        SmoothingConfig { n0, n, alpha, ..SmoothingConfig::new(sigma) }
    }

    #[test]
    fn counts_do_not_depend_on_batches_or_ranges() {
        let (classifier, pixels) = (HalfSpace::new(0.5), gray(0.52, 2));
        let count = |draws, batch| count_draws(&classifier, &pixels, 0.25, 3, 9, draws, batch).unwrap();
        let whole = count(0..101, 101);
        assert!(
            whole[0] > 0 && whole[1] > 0,
            "both classes must occur for this test to see anything: {whole:?}"
        );
        for batch in [1, 7, 32, 1000] {
            assert_eq!(count(0..101, batch), whole);
            let parts = [count(0..40, batch), count(40..41, batch), count(41..101, batch)];
            let sum: Vec<u64> = (0..3).map(|class| parts.iter().map(|p| p[class]).sum()).collect();
            assert_eq!(sum, whole);
        }
        assert!(classifier.batches.borrow().contains(&(101 % 32)));
    }

    #[test]
    fn noise_depends_on_seed_item_and_draw_and_is_not_clipped() {
        let batch = |seed, key, draw| noisy_batch(&[0.0, 1.0, 0.5], 0.5, seed, key, draw, 1);
        let reference = batch(1, 2, 3);
        assert_eq!(reference, batch(1, 2, 3));
        assert_eq!(noisy_batch(&[0.0, 1.0, 0.5], 0.5, 1, 2, 2, 2)[3..], reference);
        for other in [batch(2, 2, 3), batch(1, 3, 3), batch(1, 2, 4)] {
            assert_ne!(reference, other);
        }
        let many = noisy_batch(&[0.0, 1.0], 0.5, 1, 2, 0, 20_000);
        let n = many.len() as f64 / 2.0;
        let mean = many.iter().step_by(2).map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = many.iter().step_by(2).map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        assert!(
            mean.abs() < 5.0 * 0.5 / n.sqrt(),
            "clipped noise around 0 would have a positive mean: {mean}"
        );
        assert!((variance - 0.25).abs() < 5.0 * 0.25 * (2.0 / n).sqrt());
    }

    #[test]
    fn selection_and_estimation_draws_are_disjoint_and_recorded() {
        let (classifier, pixels, config) = (HalfSpace::new(0.5), gray(0.52, 2), config(0.25, 40, 200, 0.01));
        let certificate = certified(&classifier, &pixels, 9, &config);
        assert_eq!(
            (certificate.draws_selection.clone(), certificate.draws_estimation.clone()),
            (0..40, 40..240)
        );
        let count = |draws| count_draws(&classifier, &pixels, 0.25, 0, 9, draws, 16).unwrap();
        assert_eq!(certificate.counts_selection, count(0..40));
        assert_eq!(certificate.counts, count(40..240));
    }

    #[test]
    fn the_certified_radius_exceeds_the_true_distance_at_most_as_often_as_alpha() {
        // Distance 0.2 from the plane at sigma 0.25. With alpha 0.05, 600 items: at most 30 expected above, and
        // more than 30 + 4 sd = 52 has a chance below 1e-4. A tight bound also must exceed sometimes (> 5).
        let (classifier, side) = (HalfSpace::new(0.5), 2usize);
        let distance = 0.2;
        let pixels = gray(0.5 + (distance / (3.0 * (side * side) as f64).sqrt()) as f32, side);
        let config = config(0.25, 10, 100, 0.05);
        let above = (0..600u64)
            .filter(|&item| {
                let certificate = certified(&classifier, &pixels, item, &config);
                certificate.selected != 0 || certificate.radius > distance + 1e-6
            })
            .count();
        assert!(above > 5 && above <= 52, "{above} of 600 above the true distance");
        let truth = normal::distribution(distance / 0.25).value;
        let counts = count_draws(&classifier, &pixels, 0.25, 0, 1, 0..20_000, 500).unwrap();
        assert!((counts[0] as f64 / 2e4 - truth).abs() < 5.0 * (truth * (1.0 - truth) / 2e4).sqrt());
    }

    fn sequential(rule: Rule, target_radius: Option<f64>, config: &SmoothingConfig) -> SmoothingConfig {
        let sequential = Some(Sequential { rule, target_radius, min_gain: 0.05 });
        SmoothingConfig { sequential, ..config.clone() }
    }

    #[test]
    fn a_sequential_certificate_does_not_depend_on_batches_and_goes_on_from_any_draw() {
        let (classifier, pixels) = (HalfSpace::new(0.5), gray(0.55, 2));
        for (rule, target) in [(Rule::Kt, None), (Rule::Kt, Some(0.1)), (Rule::ClopperPearson, Some(0.1))] {
            let config = sequential(rule, target, &config(0.25, 20, 3000, 0.01));
            let whole = certified(&classifier, &pixels, 9, &config);
            let n = whole.draws_estimation.end - whole.draws_estimation.start;
            assert!(whole.prediction.is_some() && n < 3000, "{whole:?}");
            assert_eq!(whole.counts.iter().sum::<u64>(), n);
            for batch_size in [1, 7, 500, 5000] {
                let config = SmoothingConfig { batch_size, ..config.clone() };
                let mut kept = Vec::new();
                let mut keep = |classes: &[u8]| {
                    kept.extend_from_slice(classes);
                    Ok(())
                };
                let mut draws = Draws::new(&classifier, &pixels, 9, &config, Vec::new(), &mut keep).unwrap();
                assert_eq!(certify(&mut draws, &config).unwrap(), whole);
                for cut in [1, 19, 20, 21, 50] {
                    classifier.batches.borrow_mut().clear();
                    let mut again = 0;
                    let mut keep = |classes: &[u8]| {
                        again += classes.len();
                        Ok(())
                    };
                    let known = kept[..cut].to_vec();
                    let mut draws = Draws::new(&classifier, &pixels, 9, &config, known, &mut keep).unwrap();
                    assert_eq!(certify(&mut draws, &config).unwrap(), whole, "cut at {cut}");
                    assert_eq!(again, classifier.batches.borrow().iter().sum::<usize>());
                    assert!(cut + again < 20 + n as usize + batch_size, "no known draw is made again");
                }
            }
        }
        let mut keep = |_: &[u8]| Ok(());
        let config = config(0.25, 20, 100, 0.01);
        assert!(Draws::new(&classifier, &pixels, 9, &config, vec![3], &mut keep).is_err());
    }

    #[test]
    fn an_error_while_keeping_draws_ends_the_certificate() {
        let (classifier, pixels, config) = (HalfSpace::new(0.5), gray(0.55, 2), config(0.25, 20, 100, 0.01));
        let mut keep = |_: &[u8]| Err(Error::Stopped);
        let mut draws = Draws::new(&classifier, &pixels, 9, &config, Vec::new(), &mut keep).unwrap();
        assert!(matches!(certify(&mut draws, &config), Err(Error::Stopped)));
    }

    #[test]
    fn a_stopper_who_waits_for_luck_is_wrong_as_rarely_as_alpha() {
        // Distance 0.2 at sigma 0.25, and a target just beyond it: whoever stops at the first look that proves it has
        // waited for luck. With alpha 0.05 and 400 items 20 expected; more than 40 has a chance below 1e-4.
        let (classifier, distance) = (HalfSpace::new(0.5), 0.2);
        let pixels = gray(0.5 + (distance / 12f64.sqrt()) as f32, 2);
        for rule in [Rule::Kt, Rule::ClopperPearson] {
            let target = Some(distance + 1e-5);
            let config = sequential(rule, target, &config(0.25, 10, 400, 0.05));
            let config = SmoothingConfig { batch_size: 200, ..config };
            let mut wrong = 0;
            for item in 0..400 {
                let certificate = certified(&classifier, &pixels, item, &config);
                let is_beyond = certificate.radius > distance + 5e-6;
                assert_eq!(is_beyond, certificate.evidence.unwrap().stop == Stop::Certified);
                wrong += usize::from(is_beyond);
            }
            assert!((1..=40).contains(&wrong), "{rule:?}: {wrong} of 400 beyond the true distance");
        }
    }

    #[test]
    fn no_shift_within_the_radius_changes_the_prediction() {
        // The worst shift there is: straight towards the plane. A changed prediction would take a certificate beyond the
        // true distance: 20 items at alpha 0.001 expect 0.02.
        let (classifier, sigma) = (HalfSpace::new(0.5), 0.25);
        let base = config(sigma, 20, 1000, 0.001);
        for config in [base.clone(), sequential(Rule::Kt, None, &base)] {
            let mut answered = 0;
            for item in 0..20u64 {
                let mean = 0.52 + 0.01 * item as f32;
                let certificate = certified(&classifier, &gray(mean, 2), item, &config);
                let Some(class) = certificate.prediction else { continue };
                let shift = (0.999 * certificate.radius / 12f64.sqrt()) as f32;
                let moved = gray(mean - shift, 2);
                let counts = count_draws(&classifier, &moved, sigma, 77, item, 0..2000, 500).unwrap();
                let found = Prediction::from_counts(counts, 0.001).unwrap();
                assert!(
                    found.prediction.is_none_or(|other| other == class),
                    "item {item}: class {class} certified to {}, but {found:?} within it",
                    certificate.radius
                );
                answered += 1;
            }
            assert!(answered > 10);
        }
    }

    #[test]
    fn noise_is_independent_across_pixels_draws_and_items() {
        let draws = 4000u64;
        let of = |key| -> Vec<f64> {
            noisy_batch(&[0.0; 4], 1.0, 5, key, 0, draws as usize).into_iter().map(f64::from).collect()
        };
        let (noise, other) = (of(1), of(2));
        let n = noise.len() as f64;
        let correlation = |pairs: &mut dyn Iterator<Item = (f64, f64)>| -> f64 {
            let (sum, count) = pairs.fold((0.0, 0.0), |(sum, count), (a, b)| (sum + a * b, count + 1.0));
            sum / f64::sqrt(count)
        };
        // Each is standard normal when independent; 4.5 deviations.
        let pixels = correlation(&mut noise.chunks(4).map(|draw| (draw[0], draw[1])));
        let neighbours = correlation(&mut noise.iter().zip(&noise[4..]).map(|(a, b)| (*a, *b)));
        let items = correlation(&mut noise.iter().zip(&other).map(|(a, b)| (*a, *b)));
        for (what, score) in [("pixels", pixels), ("draws", neighbours), ("items", items)] {
            assert!(score.abs() < 4.5, "{what}: {score}");
        }
        let moment = |power: i32| noise.iter().map(|value| value.powi(power)).sum::<f64>() / n;
        for (power, wanted, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0f64)] {
            assert!((moment(power) - wanted).abs() < 4.5 * (variance / n).sqrt(), "moment {power}");
        }
        assert!(noise.iter().any(|value| value.abs() > 3.5), "tails are not cut");
    }

    #[test]
    fn certify_selects_the_lowest_of_equals_and_never_looks_back() {
        let config = config(0.5, 4, 100, 0.001);
        let certificate = Certificate::from_counts(&config, vec![1, 1, 1, 1], vec![0, 100, 0, 0]).unwrap();
        assert_eq!((certificate.selected, certificate.prediction, certificate.radius), (0, None, 0.0));
        assert_eq!(certificate.p_lower, 0.0);
        let certificate = Certificate::from_counts(&config, vec![0, 2, 2, 0], vec![0, 100, 0, 0]).unwrap();
        assert_eq!(certificate.prediction, Some(1));
        let expected = 0.5 * normal::quantile(Probability::new(0.001f64.powf(0.01)));
        assert!((certificate.radius - expected).abs() < 1e-12);
        assert!(Certificate::from_counts(&config, vec![4, 0], vec![99, 0]).is_err());
        assert!(Certificate::from_counts(&config, vec![4, 0], vec![100]).is_err());
    }

    #[test]
    fn predict_abstains_exactly_when_the_p_value_exceeds_alpha() {
        let answer =
            |counts: &[u64], alpha| Prediction::from_counts(counts.to_vec(), alpha).unwrap().prediction;
        assert_eq!(answer(&[0, 10, 0], 0.001), None);
        assert_eq!(answer(&[0, 11, 0], 0.001), Some(1));
        let p = 2.0 * 0.5f64.powi(10);
        assert_eq!(answer(&[10], p), Some(0));
        assert_eq!(answer(&[10], p.next_down()), None);
        assert_eq!(answer(&[500, 500, 2], 0.999), None);
        assert_eq!(answer(&[0, 0], 0.5), None);
    }

    #[test]
    fn budgets_that_can_never_answer_are_refused() {
        assert!(config(0.25, 1, 10, 0.001).check().is_ok());
        let keys = |c: SmoothingConfig| c.problems().into_iter().map(|p| p.key).collect::<Vec<_>>();
        assert_eq!(keys(config(0.25, 1, 9, 0.001)), ["n"]);
        assert_eq!(keys(config(0.0, 0, 100, 1.0)), ["sigma", "n0", "alpha"]);
        assert_eq!(keys(config(f64::NAN, 1, 100, f64::NAN)), ["sigma", "alpha"]);
        assert!(toml::from_str::<SmoothingConfig>("sigma = 0.25\nsigmas = 1").is_err());
        assert!(toml::from_str::<SmoothingConfig>("n = 100").is_err(), "sigma has no default");
        let read: SmoothingConfig = toml::from_str("sigma = 0.25").unwrap();
        assert_eq!((read.n0, read.n, read.alpha), (100, 1000, 0.001));
    }
}
