//! AdamW on flat slices, in place, and gradient clipping by the global norm.
//!
//! Decoupled weight decay (Loshchilov and Hutter 2019) and bias correction in the order of operations of PyTorch's
//! `AdamW`, in single precision. Results do not depend on the number of threads: elements are independent, and sums
//! are taken over fixed chunks in a fixed order. Which tensors share a learning rate is the caller's business.

use crate::error::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Elements per unit of parallel work. Part of the definition of the norm's summation order: do not tune per machine.
const CHUNK: usize = 1 << 14;

/// Added to the norm before dividing by it (PyTorch's `clip_grad_norm_`).
const NORM_EPSILON: f64 = 1e-6;

/// Constants of the update. The defaults are PyTorch's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay of the running mean of gradients, in [0, 1).
    pub beta1: f64,
    /// Decay of the running mean of squared gradients, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the second moment, > 0.
    pub adam_epsilon: f64,
    /// Decoupled weight decay per unit of learning rate, >= 0.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, adam_epsilon: 1e-8, weight_decay: 0.01 }
    }
}

/// Running moments of one tensor's gradient: what a checkpoint must hold besides the step count.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Moments {
    /// Running mean of the gradient, one value per parameter.
    pub m: Vec<f32>,
    /// Running mean of its square, one value per parameter.
    pub v: Vec<f32>,
}

impl Moments {
    /// The moments before the first step of a tensor of `len` elements.
    pub fn zeros(len: usize) -> Self {
        Self { m: vec![0.0; len], v: vec![0.0; len] }
    }
}

impl AdamWConfig {
    /// One update of one tensor: step number `t` counts from 1.
    ///
    /// θ ← θ·(1 − lr·decay); m ← m + (1−β1)(g − m); v ← β2·v + (1−β2)g²;
    /// θ ← θ − lr/(1−β1ᵗ) · m / (√v/√(1−β2ᵗ) + ε).
    ///
    /// Fails when the lengths disagree, when `t` is 0 or when `learning_rate` is not finite. Gradients are taken as
    /// they are: see [`global_norm`] for the check that they are finite.
    pub fn step(
        &self,
        t: u64,
        learning_rate: f64,
        params: &mut [f32],
        grads: &[f32],
        moments: &mut Moments,
    ) -> Result<()> {
        let lengths = [grads.len(), moments.m.len(), moments.v.len()];
        if lengths.iter().any(|&len| len != params.len()) {
            let message = format!(
                "AdamW: {} parameters, but gradient and moments have lengths {lengths:?}",
                params.len()
            );
            return Err(Error::Other(anyhow::anyhow!(message)));
        }
        if t == 0 {
            return Err(Error::Other(anyhow::anyhow!("AdamW: steps count from 1, got step 0")));
        }
        if !learning_rate.is_finite() {
            return Err(Error::NonFinite(format!("learning rate of step {t} is {learning_rate}")));
        }
        // The power runs over f64: `t` beyond 2^53 has long had a correction of exactly 1.
        let correction = |beta: f64| 1.0 - beta.powf(t as f64);
        let update = Update {
            keep: (1.0 - learning_rate * self.weight_decay) as f32,
            take1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            take2: (1.0 - self.beta2) as f32,
            root_correction2: correction(self.beta2).sqrt() as f32,
            epsilon: self.adam_epsilon as f32,
            step_size: (learning_rate / correction(self.beta1)) as f32,
        };
        params
            .par_chunks_mut(CHUNK)
            .zip_eq(grads.par_chunks(CHUNK))
            .zip_eq(moments.m.par_chunks_mut(CHUNK).zip_eq(moments.v.par_chunks_mut(CHUNK)))
            .for_each(|((params, grads), (m, v))| update.apply(params, grads, m, v));
        Ok(())
    }
}

/// The scalars of one step, in the precision of the parameters.
struct Update {
    keep: f32,
    take1: f32,
    beta2: f32,
    take2: f32,
    root_correction2: f32,
    epsilon: f32,
    step_size: f32,
}

impl Update {
    fn apply(&self, params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((param, &grad), m), v) in params.iter_mut().zip(grads).zip(m).zip(v) {
            *m += self.take1 * (grad - *m);
            *v = *v * self.beta2 + self.take2 * grad * grad;
            let denominator = v.sqrt() / self.root_correction2 + self.epsilon;
            *param = *param * self.keep - self.step_size * (*m / denominator);
        }
    }
}

/// The Euclidean norm over all `tensors` (name, gradient) together, summed in double precision.
///
/// A value that is not finite is [`Error::NonFinite`], naming the tensor and the place.
fn global_norm<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a [f32])>) -> Result<f64> {
    let mut sum = 0.0;
    for (name, grad) in tensors {
        let partial: Vec<f64> = grad
            .par_chunks(CHUNK)
            .map(|chunk| chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum())
            .collect();
        let square: f64 = partial.iter().sum();
        // Squares of single-precision values cannot overflow in f64: only a bad element makes a bad sum.
        if !square.is_finite() {
            let place = grad.iter().position(|g| !g.is_finite()).unwrap_or_default();
            let value = grad.get(place).copied().unwrap_or(f32::NAN);
            return Err(Error::NonFinite(format!("the gradient of `{name}` is {value} at element {place}")));
        }
        sum += square;
    }
    Ok(sum.sqrt())
}

/// What gradients of norm `norm` must be multiplied with so that the norm is at most `max_norm`:
/// min(1, max_norm / (norm + 1e-6)).
fn clip_factor(norm: f64, max_norm: f64) -> f32 {
    (max_norm / (norm + NORM_EPSILON)).min(1.0) as f32
}

/// Scales all `tensors` (name, gradient) so that their global norm is at most `max_norm`; gives the norm before.
///
/// Without `max_norm` the norm is only measured (and non-finite gradients refused).
pub fn clip_global_norm(tensors: &mut [(&str, &mut [f32])], max_norm: Option<f64>) -> Result<f64> {
    let norm = global_norm(tensors.iter().map(|(name, grad)| (*name, &**grad)))?;
    let factor = max_norm.map_or(1.0, |max_norm| clip_factor(norm, max_norm));
    if factor < 1.0 {
        for (_, grad) in tensors {
            grad.par_chunks_mut(CHUNK).for_each(|chunk| chunk.iter_mut().for_each(|g| *g *= factor));
        }
    }
    Ok(norm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::schedule::{Schedule, ScheduleKind};
    use crate::train::test_support::{assert_close, numbers, reference};

    #[test]
    fn the_first_step_moves_each_parameter_by_the_learning_rate_against_its_gradient() {
        let config = AdamWConfig { weight_decay: 0.5, ..AdamWConfig::default() };
        let (mut params, mut moments) = (vec![1.0, -2.0, 3.0], Moments::zeros(3));
        config.step(1, 0.1, &mut params, &[1e-3, -5.0, 0.0], &mut moments).unwrap();
        let got: Vec<f64> = params.iter().map(|&p| f64::from(p)).collect();
        // decay alone: 0.95, -1.9, 2.85; then -sign(g)·lr (g = 1e-3 is large beside epsilon), nothing where g = 0
        assert_close(&got, &[0.85, -1.8, 2.85], 2e-6, "params");
        assert_eq!(moments.m[2], 0.0);
    }

    #[test]
    fn chunks_and_threads_change_no_bit() {
        let len = 3 * CHUNK + 17;
        let mut grads = vec![0.0; len];
        crate::rng::fill_standard_normal(&mut crate::rng::stream(1, "grads", &[]), &mut grads);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut params, mut moments) = (vec![0.5; len], Moments::zeros(len));
                let mut clipped = grads.clone();
                let norm = clip_global_norm(&mut [("w", &mut clipped)], Some(1.0)).unwrap();
                for t in 1..4 {
                    AdamWConfig::default().step(t, 1e-2, &mut params, &clipped, &mut moments).unwrap();
                }
                (norm.to_bits(), params, moments)
            })
        };
        let one = run(1);
        assert!(one == run(3));
        // an element far into the third chunk is what it would be alone
        let (mut param, mut moments) = (vec![0.5], Moments::zeros(1));
        let factor = clip_factor(f64::from_bits(one.0), 1.0);
        for t in 1..4 {
            let grad = [grads[len - 1] * factor];
            AdamWConfig::default().step(t, 1e-2, &mut param, &grad, &mut moments).unwrap();
        }
        assert_eq!(param[0], one.1[len - 1]);
    }

    #[test]
    fn clipping_bounds_the_norm_and_keeps_small_gradients() {
        let (mut a, mut b) = (vec![3.0f32, 0.0], vec![4.0f32]);
        let norm = clip_global_norm(&mut [("a", &mut a), ("b", &mut b)], Some(1.0)).unwrap();
        assert_eq!(norm, 5.0);
        let after = global_norm([("a", &a[..]), ("b", &b[..])]).unwrap();
        assert!(after <= 1.0 && after > 1.0 - 1e-6, "{after}");
        let before = a.clone();
        clip_global_norm(&mut [("a", &mut a)], Some(1.0)).unwrap();
        clip_global_norm(&mut [("a", &mut a)], None).unwrap();
        assert_eq!(a, before);
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_refused_by_name() {
        for bad in [f32::NAN, f32::INFINITY] {
            let error = global_norm([("good", &[1.0][..]), ("layers.3.q", &[0.0, bad][..])]).unwrap_err();
            assert_eq!(error.status(), crate::error::ExitStatus::NonFinite);
            let text = error.to_string();
            assert!(text.contains("layers.3.q") && text.contains("element 1"), "{text}");
        }
        // the largest finite gradients are fine
        assert!(global_norm([("big", &[f32::MAX; 4][..])]).unwrap().is_finite());
    }

    #[test]
    fn wrong_lengths_and_steps_are_refused() {
        let config = AdamWConfig::default();
        let mut params = [0.0; 2];
        assert!(config.step(1, 0.1, &mut params, &[0.0], &mut Moments::zeros(2)).is_err());
        assert!(config.step(0, 0.1, &mut params, &[0.0; 2], &mut Moments::zeros(2)).is_err());
        assert!(config.step(1, f64::NAN, &mut params, &[0.0; 2], &mut Moments::zeros(2)).is_err());
    }

    #[test]
    fn trajectories_equal_the_reference() {
        let Some(reference) = reference("fixtures/optim.json") else { return };
        let (a, b) = (numbers(&reference["A"]), numbers(&reference["b"]));
        let dim = b.len();
        for (name, run) in reference["runs"].as_object().unwrap() {
            let settings = &run["settings"];
            let value = |key: &str| settings[key].as_f64().unwrap();
            let betas = numbers(&settings["betas"]);
            let config = AdamWConfig {
                beta1: betas[0],
                beta2: betas[1],
                adam_epsilon: value("eps"),
                weight_decay: value("weight_decay"),
            };
            let steps = run["steps"].as_array().unwrap();
            let kind = match run["schedule"].as_str() {
                Some("cosine") => ScheduleKind::Cosine,
                Some("linear") => ScheduleKind::Linear,
                _ => ScheduleKind::Constant,
            };
            let warmup_steps = if run["schedule"].is_null() { 0 } else { run["warmup"].as_u64().unwrap() };
            let schedule = Schedule { kind, warmup_steps, final_fraction: 0.0 };
            let mut x: Vec<f32> = numbers(&reference["x0"]).iter().map(|&v| v as f32).collect();
            let mut moments = Moments::zeros(dim);
            for (i, want) in steps.iter().enumerate() {
                let d: Vec<f64> = x.iter().zip(&b).map(|(&x, b)| f64::from(x) - b).collect();
                let mut grad: Vec<f32> =
                    (0..dim).map(|r| (0..dim).map(|c| a[r * dim + c] * d[c]).sum::<f64>() as f32).collect();
                let norm = clip_global_norm(&mut [("x", &mut grad)], run["max_norm"].as_f64()).unwrap();
                let rate = value("lr") * schedule.factor(i as u64, steps.len() as u64);
                assert_close(&[rate], &[want["lr"].as_f64().unwrap()], 1e-12, name);
                let norm_want = want["grad_norm_before_clip"].as_f64().unwrap();
                assert!((norm - norm_want).abs() <= 2e-6 * norm_want, "{name} step {i}: {norm} {norm_want}");
                config.step(i as u64 + 1, rate, &mut x, &grad, &mut moments).unwrap();
                let got: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
                assert_close(&got, &numbers(&want["x"]), 1e-6, &format!("{name} step {i}"));
            }
        }
    }

    #[test]
    fn clipping_equals_the_reference() {
        let Some(reference) = reference("fixtures/optim.json") else { return };
        let clip = &reference["clip"];
        let before = clip["before"].as_array().unwrap();
        let mut tensors: Vec<Vec<f32>> =
            before.iter().map(|t| numbers(t).iter().map(|&v| v as f32).collect()).collect();
        let mut named: Vec<(&str, &mut [f32])> = tensors.iter_mut().map(|t| ("t", &mut t[..])).collect();
        let norm = clip_global_norm(&mut named, clip["max_norm"].as_f64()).unwrap();
        assert_close(&[norm], &[clip["total_norm"].as_f64().unwrap()], 1e-6, "norm");
        let got: Vec<f64> = tensors.iter().flatten().map(|&v| f64::from(v)).collect();
        assert_close(&got, &numbers(&clip["after"]), 1e-6, "after");
    }
}
