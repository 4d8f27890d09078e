//! From float pixels to the eight-bit image that is written, still inside the budget.
//!
//! A perturbation counts only as far as it survives the file. Values are rounded to the nearest level, never
//! truncated, and the bound is then enforced in integers, so it holds exactly for whoever reads the file.
//! Channel values may come in any order, the same for both images.

use super::ball::Norm;

/// Distances between two eight-bit images, in units of the pixel range [0, 1].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Distances {
    /// Largest change of a channel value.
    pub linf: f64,
    /// Euclidean length of the change.
    pub l2: f64,
}

impl Distances {
    /// The distances between `a` and `b` (equal lengths).
    pub fn between(a: &[u8], b: &[u8]) -> Self {
        let levels = a.iter().zip(b).map(|(&a, &b)| u64::from(a.abs_diff(b)));
        let (max, squares) = levels.fold((0, 0), |(max, squares), d| (d.max(max), squares + d * d));
        Self { linf: max as f64 / 255.0, l2: (squares as f64).sqrt() / 255.0 }
    }

    /// The one that `norm` names.
    pub fn in_norm(&self, norm: Norm) -> f64 {
        match norm {
            Norm::Linf => self.linf,
            Norm::L2 => self.l2,
        }
    }
}

/// Whole levels that an Linf budget allows: floor(255 · epsilon + 1e-6), at most 255.
pub fn linf_levels(epsilon: f64) -> u8 {
    (255.0 * epsilon + 1e-6).floor().clamp(0.0, 255.0) as u8
}

/// The greatest sum of squared level differences that an L2 budget allows.
fn l2_square_limit(epsilon: f64) -> u64 {
    let levels = 255.0 * epsilon;
    (levels * levels + 1e-6).floor() as u64
}

/// Whether `image` lies within `epsilon` of `clean`, decided in integers.
pub fn is_within(image: &[u8], clean: &[u8], norm: Norm, epsilon: f64) -> bool {
    let mut levels = image.iter().zip(clean).map(|(&a, &b)| a.abs_diff(b));
    match norm {
        Norm::Linf => levels.all(|d| d <= linf_levels(epsilon)),
        Norm::L2 => levels.map(|d| u64::from(d).pow(2)).sum::<u64>() <= l2_square_limit(epsilon),
    }
}

/// Rounds `adversarial` (values in [0, 1]) to eight bits within `epsilon` of `clean_8bit`.
///
/// Linf: to the nearest level allowed. L2: to the nearest level; when that leaves the ball, the values that rounding
/// carried furthest outwards take one level back, one after another, until the image is inside. Changes of less than
/// half a level vanish, so an L2 budget spread over many pixels may not survive: measure the result.
pub fn to_8bit_within_ball(adversarial: &[f32], clean_8bit: &[u8], norm: Norm, epsilon: f64) -> Vec<u8> {
    let pairs = adversarial.iter().zip(clean_8bit);
    match norm {
        Norm::Linf => {
            let levels = linf_levels(epsilon);
            let clamp = |(&value, &clean): (&f32, &u8)| {
                nearest_level(255.0 * f64::from(value))
                    .clamp(clean.saturating_sub(levels), clean.saturating_add(levels))
            };
            pairs.map(clamp).collect()
        }
        Norm::L2 => {
            let offset = |(&value, &clean): (&f32, &u8)| 255.0 * f64::from(value) - f64::from(clean);
            let mut offsets: Vec<f64> = pairs.map(offset).collect();
            let length = offsets.iter().map(|d| d * d).sum::<f64>().sqrt();
            if length > 255.0 * epsilon {
                let scale = 255.0 * epsilon / length;
                for d in &mut offsets {
                    *d *= scale;
                }
            }
            round_in_l2(&offsets, clean_8bit, l2_square_limit(epsilon))
        }
    }
}

/// Moves an eight-bit image up a gradient without leaving `epsilon` of `clean`: by one level for each value.
///
/// Linf: every value with a gradient moves while its bound allows. L2: values that come back towards `clean` all move;
/// what that leaves of the budget goes to the values of most gain for each unit of squared distance.
pub fn ascend(image: &[u8], clean: &[u8], gradient: &[f32], norm: Norm, epsilon: f64) -> Vec<u8> {
    let moved = |level: u8, g: f32| match g {
        g if g > 0.0 => level.saturating_add(1),
        g if g < 0.0 => level.saturating_sub(1),
        _ => level,
    };
    let mut out: Vec<u8> = image.iter().zip(gradient).map(|(&level, &g)| moved(level, g)).collect();
    match norm {
        Norm::Linf => {
            let levels = linf_levels(epsilon);
            for (out, &clean) in out.iter_mut().zip(clean) {
                *out = (*out).clamp(clean.saturating_sub(levels), clean.saturating_add(levels));
            }
        }
        Norm::L2 => {
            let square = |level: u8, i: usize| u64::from(level.abs_diff(clean[i])).pow(2);
            let mut outward: Vec<usize> =
                (0..out.len()).filter(|&i| square(out[i], i) > square(image[i], i)).collect();
            let gain =
                |i: usize| f64::from(gradient[i].abs()) / (square(out[i], i) - square(image[i], i)) as f64;
            outward.sort_by(|&a, &b| gain(b).total_cmp(&gain(a)));
            let limit = l2_square_limit(epsilon);
            let mut squares: u64 = (0..out.len()).map(|i| square(out[i], i).min(square(image[i], i))).sum();
            for i in outward {
                let wider = squares + square(out[i], i) - square(image[i], i);
                if wider <= limit {
                    squares = wider;
                } else {
                    out[i] = image[i];
                }
            }
        }
    }
    out
}

/// `pixels` (values in [0, 1]) rounded to eight bits without any budget.
pub fn nearest_levels(pixels: &[f32]) -> Vec<u8> {
    pixels.iter().map(|&value| nearest_level(255.0 * f64::from(value))).collect()
}

/// Half a level rounds up, as everywhere pixels are written.
fn nearest_level(level: f64) -> u8 {
    (level + 0.5).floor().clamp(0.0, 255.0) as u8
}

/// Rounds clean + `offsets`, where the offsets' squares sum to at most `limit` but for rounding errors.
fn round_in_l2(offsets: &[f64], clean: &[u8], limit: u64) -> Vec<u8> {
    let mut image: Vec<u8> =
        offsets.iter().zip(clean).map(|(d, &clean)| nearest_level(f64::from(clean) + d)).collect();
    let level = |image: &[u8], i: usize| u64::from(image[i].abs_diff(clean[i]));
    let mut squares: u64 = (0..image.len()).map(|i| level(&image, i).pow(2)).sum();
    if squares <= limit {
        return image;
    }
    // Outward first. At the end of the list every level is at most its offset, which lies inside but for rounding
    // errors of the floats; the second round covers those.
    let outward = |i: &usize| level(&image, *i) as f64 - offsets[*i].abs();
    let mut order: Vec<usize> = (0..image.len()).filter(|&i| level(&image, i) > 0).collect();
    order.sort_by(|a, b| outward(b).total_cmp(&outward(a)));
    while squares > limit {
        for &i in &order {
            let old = level(&image, i);
            if squares <= limit || old == 0 {
                continue;
            }
            if image[i] > clean[i] {
                image[i] -= 1;
            } else {
                image[i] += 1;
            }
            squares -= 2 * old - 1;
        }
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attack::Ball;
    use crate::rng::stream;
    use rand::Rng;

    fn clean_levels(len: usize, index: u64) -> Vec<u8> {
        let mut stream = stream(9, "levels", &[index]);
        // many values at both ends, where clipping matters
        (0..len).map(|_| stream.random_range(-60i32..316).clamp(0, 255) as u8).collect()
    }

    #[test]
    fn rounded_images_stay_in_the_integer_ball() {
        for norm in [Norm::Linf, Norm::L2] {
            for (i, epsilon) in
                [0.0, 1.0 / 255.0, 1.4 / 255.0, 8.0 / 255.0, 0.3, 0.77, 1.0, 3.0].into_iter().enumerate()
            {
                let clean = clean_levels(243, i as u64);
                let pixels: Vec<f32> = clean.iter().map(|&u| f32::from(u) / 255.0).collect();
                let mut point = pixels.clone();
                let ball = Ball { norm, epsilon };
                for k in 0..10 {
                    ball.random_start(&pixels, &mut point, &mut stream(4, "start", &[k]));
                    let gradient: Vec<f32> = point.iter().zip(&pixels).map(|(a, b)| a - b).collect();
                    // to the surface, where rounding leaves the ball
                    ball.step(&mut point, &gradient, 2.0 * epsilon, || stream(0, "x", &[]));
                    ball.project(&pixels, &mut point);
                    let image = to_8bit_within_ball(&point, &clean, norm, epsilon);
                    assert!(is_within(&image, &clean, norm, epsilon), "{norm:?} {epsilon}");
                    let measured = Distances::between(&image, &clean).in_norm(norm);
                    assert!(measured <= epsilon + 1e-6, "{norm:?} {epsilon}: {measured}");
                    assert!(epsilon > 0.0 || image == clean);
                    // at most one level from the nearest rounding, and never past half a level further out
                    for (j, (&got, &float)) in image.iter().zip(&point).enumerate() {
                        let away = (f64::from(got) - 255.0 * f64::from(float)).abs();
                        assert!(away <= 1.0 + 1e-3, "{norm:?} {epsilon} [{j}]: {away}");
                    }
                }
            }
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_level_and_half_goes_up() {
        let clean = [100u8; 5];
        let at = |levels: f32| levels / 255.0;
        let adversarial = [at(103.4), at(103.6), at(96.4), at(96.6), at(100.5)];
        let got = to_8bit_within_ball(&adversarial, &clean, Norm::Linf, 8.0 / 255.0);
        assert_eq!(got, [103, 104, 96, 97, 101]);
        assert_eq!(
            to_8bit_within_ball(&adversarial, &clean, Norm::Linf, 3.0 / 255.0),
            [103, 103, 97, 97, 101]
        );
        assert_eq!(to_8bit_within_ball(&adversarial, &clean, Norm::L2, 1.0), [103, 104, 96, 97, 101]);
    }

    #[test]
    fn an_l2_excess_is_taken_back_where_rounding_went_furthest_out() {
        // offsets 2.6, 0.6, -1.9 have length 3.28 <= 3.3; rounded 3, 1, -2 have length 3.74
        let adversarial = [102.6f32 / 255.0, 50.6 / 255.0, 198.1 / 255.0];
        let got = to_8bit_within_ball(&adversarial, &[100, 50, 200], Norm::L2, 3.3 / 255.0);
        assert_eq!(got, [102, 51, 198]); // 0.4 outward twice: the first in order goes back, and 9 <= 10.89
        // an image that was outside before rounding comes inside too
        let far = to_8bit_within_ball(&[1.0, 0.0, 1.0], &[100, 50, 200], Norm::L2, 0.1);
        assert!(is_within(&far, &[100, 50, 200], Norm::L2, 0.1));
        assert!(Distances::between(&far, &[100, 50, 200]).l2 > 0.09);
    }

    #[test]
    fn moves_on_the_lattice_climb_the_gradient_and_stay_in_the_ball() {
        for norm in [Norm::Linf, Norm::L2] {
            for epsilon in [0.0, 1.0 / 255.0, 3.0 / 255.0, 0.1, 1.0] {
                let clean = clean_levels(99, 3);
                let mut gradient = vec![0f32; 99];
                crate::rng::fill_standard_normal(&mut stream(5, "gradient", &[]), &mut gradient);
                gradient[7] = 0.0;
                let mut image = clean.clone();
                let value = |image: &[u8]| -> f64 {
                    image.iter().zip(&gradient).map(|(&u, &g)| f64::from(u) * f64::from(g)).sum()
                };
                let mut before = value(&image);
                for round in 0..6 {
                    image = ascend(&image, &clean, &gradient, norm, epsilon);
                    assert!(is_within(&image, &clean, norm, epsilon), "{norm:?} {epsilon}");
                    assert!(value(&image) >= before);
                    assert!(round > 0 || epsilon < 1.0 / 256.0 || value(&image) > before);
                    assert_eq!(image[7], clean[7]);
                    before = value(&image);
                }
            }
        }
        // One unit of squared distance goes to the steepest value; a way back is free and pays for another.
        assert_eq!(ascend(&[9, 9], &[9, 9], &[1.0, -2.0], Norm::L2, 1.0 / 255.0), [9, 8]);
        assert_eq!(ascend(&[10, 9], &[9, 9], &[-1.0, 2.0], Norm::L2, 1.0 / 255.0), [9, 10]);
    }

    #[test]
    fn levels_of_an_epsilon_are_whole_and_forgive_rounding() {
        for k in 0..=255u8 {
            assert_eq!(linf_levels(f64::from(k) / 255.0), k);
            assert_eq!(linf_levels((f64::from(k) - 1e-7) / 255.0), k, "a single-precision epsilon");
            assert_eq!(linf_levels((f64::from(k) + 0.9) / 255.0), k);
        }
        let d = Distances::between(&[0, 10, 255], &[3, 6, 255]);
        assert_eq!((d.linf, d.l2), (4.0 / 255.0, 5.0 / 255.0));
        assert!(is_within(&[13, 14], &[10, 10], Norm::L2, 5.0 / 255.0));
        assert!(!is_within(&[13, 15], &[10, 10], Norm::L2, 5.0 / 255.0));
    }
}
