//! Budgets around a clean image: random points, steepest steps, projection, per image on flat slices.
//!
//! Everything that depends on the norm is here. The arithmetic is that of torchattacks' PGD and PGDL2 in single
//! precision, so a coordinate of clean + offset may pass its bound by its rounding error (at most 6e-8, half a unit
//! in the last place of a number below 1); see [`super::lattice`] for the exact bound of what is written to a file.

use crate::rng::{Stream, fill_standard_normal};
use rand::Rng;
use serde::{Deserialize, Serialize};

/// Added to the norm of a gradient before dividing by it (torchattacks' constant).
const NORM_EPSILON: f64 = 1e-10;

/// How a perturbation is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// The largest absolute change of a channel value.
    #[default]
    Linf,
    /// The Euclidean length over all channel values.
    L2,
}

impl Norm {
    /// The distance between `a` and `b` (equal lengths).
    pub fn distance(self, a: &[f32], b: &[f32]) -> f64 {
        let differences = a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b));
        match self {
            Self::Linf => differences.fold(0.0, |max, d| max.max(d.abs())),
            Self::L2 => differences.map(|d| d * d).sum::<f64>().sqrt(),
        }
    }
}

/// All images within `epsilon` of a clean one, with values in [0, 1].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ball {
    /// How distance is measured.
    pub norm: Norm,
    /// The greatest distance, >= 0.
    pub epsilon: f64,
}

impl Ball {
    /// Moves `point` from the clean image to a random point of the ball.
    ///
    /// Linf: uniform in the cube. L2: uniform direction, distance uniform in [0, epsilon] (as torchattacks; uniform
    /// by volume would nearly always lie on the surface).
    pub fn random_start(&self, clean: &[f32], point: &mut [f32], stream: &mut Stream) {
        match self.norm {
            Norm::Linf => {
                let epsilon = self.epsilon as f32;
                for (point, &clean) in point.iter_mut().zip(clean) {
                    *point = clean + epsilon * (2.0 * stream.random::<f32>() - 1.0);
                }
            }
            Norm::L2 => {
                fill_standard_normal(stream, point);
                let length = l2_norm(point.iter().copied());
                let scale = stream.random::<f64>() * self.epsilon / length.max(f64::MIN_POSITIVE);
                for (point, &clean) in point.iter_mut().zip(clean) {
                    *point = clean + *point * scale as f32;
                }
            }
        }
        self.project(clean, point);
    }

    /// Adds the steepest step of length `step_size` in this norm: its sign for Linf, its unit vector for L2.
    ///
    /// Where a gradient is exactly zero, Linf stays. An L2 gradient that is zero everywhere tells nothing, and a
    /// random direction is taken from `fallback` instead.
    pub fn step(
        &self,
        point: &mut [f32],
        gradient: &[f32],
        step_size: f64,
        fallback: impl FnOnce() -> Stream,
    ) {
        let step = step_size as f32;
        match self.norm {
            Norm::Linf => {
                for (point, &g) in point.iter_mut().zip(gradient) {
                    // `signum` of zero is one
                    if g != 0.0 {
                        *point += step * g.signum();
                    }
                }
            }
            Norm::L2 => {
                let mut random = Vec::new();
                let gradient = if gradient.iter().any(|&g| g != 0.0) {
                    gradient
                } else {
                    random.resize(gradient.len(), 0.0);
                    fill_standard_normal(&mut fallback(), &mut random);
                    &random
                };
                let length = (l2_norm(gradient.iter().copied()) + NORM_EPSILON) as f32;
                for (point, &g) in point.iter_mut().zip(gradient) {
                    *point += step * (g / length);
                }
            }
        }
    }

    /// Moves `point` to its nearest point within epsilon of `clean`, then clips it to [0, 1].
    ///
    /// Clipping comes second and keeps the distance: it moves every value towards `clean`, which lies in [0, 1].
    pub fn project(&self, clean: &[f32], point: &mut [f32]) {
        let clip = |value: f32| value.clamp(0.0, 1.0);
        match self.norm {
            Norm::Linf => {
                let epsilon = self.epsilon as f32;
                for (point, &clean) in point.iter_mut().zip(clean) {
                    *point = clip(clean + (*point - clean).clamp(-epsilon, epsilon));
                }
            }
            Norm::L2 => {
                let length = l2_norm(point.iter().zip(clean).map(|(point, clean)| point - clean));
                let scale = if length > self.epsilon { (self.epsilon / length) as f32 } else { 1.0 };
                for (point, &clean) in point.iter_mut().zip(clean) {
                    *point = clip(clean + (*point - clean) * scale);
                }
            }
        }
    }
}

fn l2_norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::stream;

    fn random_image(len: usize, index: u64) -> Vec<f32> {
        let mut stream = stream(5, "image", &[index]);
        (0..len).map(|_| stream.random::<f32>()).collect()
    }

    #[test]
    fn every_start_and_step_stays_in_the_ball_and_in_the_pixel_range() {
        for norm in [Norm::Linf, Norm::L2] {
            for (i, epsilon) in [0.0, 1e-3, 8.0 / 255.0, 0.5, 1.0].into_iter().enumerate() {
                let ball = Ball { norm, epsilon };
                let clean = random_image(300, i as u64);
                let mut point = clean.clone();
                let mut random = stream(1, "start", &[i as u64]);
                ball.random_start(&clean, &mut point, &mut random);
                for round in 0..20 {
                    let distance = norm.distance(&point, &clean);
                    // L2 sums the rounding errors of 300 coordinates
                    assert!(distance <= epsilon + 1e-6, "{norm:?} {epsilon} round {round}: {distance}");
                    assert!(point.iter().all(|p| (0.0..=1.0).contains(p)));
                    let gradient = random_image(300, 100 + round).iter().map(|g| g - 0.5).collect::<Vec<_>>();
                    ball.step(&mut point, &gradient, 0.7 * epsilon, || unreachable!());
                    ball.project(&clean, &mut point);
                }
                assert!(
                    epsilon == 0.0 || norm.distance(&point, &clean) > 0.5 * epsilon,
                    "{norm:?} {epsilon}"
                );
                assert!(epsilon > 0.0 || point == clean);
            }
        }
    }

    #[test]
    fn projection_keeps_what_is_inside_and_lands_on_the_surface_otherwise() {
        let clean = vec![0.5f32; 4];
        let inside = vec![0.55f32, 0.45, 0.5, 0.52];
        for norm in [Norm::Linf, Norm::L2] {
            let mut point = inside.clone();
            Ball { norm, epsilon: 0.1 }.project(&clean, &mut point);
            assert!(Norm::Linf.distance(&point, &inside) < 1e-7, "{norm:?}");
        }
        let mut point = vec![0.8f32, 0.1, 0.5, 0.5];
        Ball { norm: Norm::L2, epsilon: 0.25 }.project(&clean, &mut point);
        assert!(Norm::Linf.distance(&point, &[0.65, 0.3, 0.5, 0.5]) < 1e-7, "{point:?}"); // 3-4-5 triangle, halved
        let mut point = vec![0.8f32, 0.1, 0.5, 0.45];
        Ball { norm: Norm::Linf, epsilon: 0.25 }.project(&clean, &mut point);
        assert!(Norm::Linf.distance(&point, &[0.75, 0.25, 0.5, 0.45]) < 1e-7, "{point:?}");
        let mut point = vec![0.9f32, 1.3, -0.2, 0.5];
        Ball { norm: Norm::Linf, epsilon: 0.9 }.project(&clean, &mut point);
        assert_eq!(point, [0.9, 1.0, 0.0, 0.5]);
    }

    #[test]
    fn a_zero_gradient_stays_in_linf_and_takes_a_random_direction_in_l2() {
        let mut point = vec![0.5f32; 8];
        Ball { norm: Norm::Linf, epsilon: 1.0 }.step(
            &mut point,
            &[0.0, -0.0, 1.0, -2.0, 0.0, 0.0, 0.0, 0.0],
            0.1,
            || unreachable!(),
        );
        assert_eq!(point, [0.5, 0.5, 0.6, 0.4, 0.5, 0.5, 0.5, 0.5]);
        let ball = Ball { norm: Norm::L2, epsilon: 1.0 };
        let mut moved = vec![0.5f32; 8];
        ball.step(&mut moved, &[0.0; 8], 0.1, || stream(1, "fallback", &[]));
        assert!((Norm::L2.distance(&moved, &[0.5; 8]) - 0.1).abs() < 1e-6);
        let mut along = vec![0.5f32; 8];
        ball.step(&mut along, &[0.0, 3e-5, 0.0, 4e-5, 0.0, 0.0, 0.0, 0.0], 0.1, || unreachable!());
        assert!(Norm::Linf.distance(&along, &[0.5, 0.56, 0.5, 0.58, 0.5, 0.5, 0.5, 0.5]) < 1e-6, "{along:?}");
    }

    #[test]
    fn random_starts_fill_the_budget() {
        let clean = vec![0.5f32; 20_000];
        let mut point = clean.clone();
        Ball { norm: Norm::Linf, epsilon: 0.1 }.random_start(
            &clean,
            &mut point,
            &mut stream(2, "start", &[]),
        );
        let n = point.len() as f64;
        let offsets = || point.iter().map(|&p| f64::from(p) - 0.5);
        assert!((offsets().sum::<f64>() / n).abs() < 5.0 * 0.1 / (3.0 * n).sqrt());
        let variance = offsets().map(|d| d * d).sum::<f64>() / n;
        assert!((variance / (0.01 / 3.0) - 1.0).abs() < 0.05, "{variance}");
        let ball = Ball { norm: Norm::L2, epsilon: 2.0 };
        let distances: Vec<f64> = (0..200)
            .map(|i| {
                let mut point = clean[..100].to_vec();
                ball.random_start(&clean[..100], &mut point, &mut stream(2, "start", &[i]));
                Norm::L2.distance(&point, &clean[..100])
            })
            .collect();
        assert!((distances.iter().sum::<f64>() / 200.0 - 1.0).abs() < 0.2);
        assert!(distances.iter().all(|&d| d <= 2.0 + 1e-6));
    }
}
