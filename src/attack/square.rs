//! The Square attack: random search that asks for losses only (Andriushchenko et al. 2020, arXiv 1912.00049).
//!
//! A candidate changes one square of the image and is kept when its loss is higher. It needs no gradient, so where it
//! breaks what gradients do not, the gradients were misleading.

use super::Objective;
use super::ball::Norm;
use super::config::AttackConfig;
use super::search::{Adversarial, Problem, Search};
use crate::error::Result;
use crate::rng::Stream;
use rand::Rng;
use rayon::prelude::*;

/// Share of the pixels in the first squares.
const P_INIT: f64 = 0.8;
/// Of 10,000 queries, those after which the share is halved.
const HALVINGS: [f64; 9] = [10.0, 50.0, 200.0, 500.0, 1000.0, 2000.0, 4000.0, 6000.0, 8000.0];

/// The share of pixels changed by query number `query` (from 0) of `num_queries`.
fn share(query: usize, num_queries: usize) -> f64 {
    let scaled = query as f64 / num_queries as f64 * 10_000.0;
    let halvings = HALVINGS.iter().filter(|&&at| scaled > at).count();
    P_INIT / f64::from(1u32 << halvings)
}

/// The side of a square of that share of `height` x `width` pixels; leaves room to move in both directions.
fn side(share: f64, height: usize, width: usize) -> usize {
    let side = (share * (height * width) as f64).sqrt().round() as usize;
    side.clamp(1, (height.min(width) - 1).max(1))
}

/// An image of [channels, height, width] that the search changes.
struct Canvas<'a> {
    clean: &'a [f32],
    epsilon: f64,
    channels: usize,
    height: usize,
    width: usize,
}

impl Canvas<'_> {
    fn index(&self, channel: usize, row: usize, column: usize) -> usize {
        (channel * self.height + row) * self.width + column
    }

    /// Vertical stripes of plus or minus epsilon, each colour and column by its own coin.
    fn stripes(&self, stream: &mut Stream) -> Vec<f32> {
        let mut out = self.clean.to_vec();
        for channel in 0..self.channels {
            for column in 0..self.width {
                let offset = self.coin(stream);
                for row in 0..self.height {
                    let i = self.index(channel, row, column);
                    out[i] = (self.clean[i] + offset).clamp(0.0, 1.0);
                }
            }
        }
        out
    }

    /// `point` with one square set to plus or minus epsilon in each colour.
    fn linf_candidate(&self, point: &[f32], share: f64, stream: &mut Stream) -> Vec<f32> {
        let side = side(share, self.height, self.width);
        let (top, left) = self.place(side, stream);
        let mut out = point.to_vec();
        for channel in 0..self.channels {
            let offset = self.coin(stream);
            for row in top..(top + side).min(self.height) {
                for column in left..(left + side).min(self.width) {
                    let i = self.index(channel, row, column);
                    out[i] = (self.clean[i] + offset).clamp(0.0, 1.0);
                }
            }
        }
        out
    }

    fn coin(&self, stream: &mut Stream) -> f32 {
        if stream.random::<bool>() { self.epsilon as f32 } else { -self.epsilon as f32 }
    }

    fn place(&self, side: usize, stream: &mut Stream) -> (usize, usize) {
        let free = |length: usize| length.saturating_sub(side) + 1;
        (stream.random_range(0..free(self.height)), stream.random_range(0..free(self.width)))
    }

    /// A grid of bumps, five to a side, each colour and bump by its own coin, of total length epsilon.
    fn bumps(&self, stream: &mut Stream) -> Vec<f32> {
        let side = (self.height.min(self.width) / 5).max(1);
        let mut offset = vec![0.0; self.clean.len()];
        for top in (0..self.height).step_by(side) {
            for left in (0..self.width).step_by(side) {
                let bump = bump(side, stream.random());
                for channel in 0..self.channels {
                    let sign = if stream.random::<bool>() { 1.0 } else { -1.0 };
                    for row in top..(top + side).min(self.height) {
                        for column in left..(left + side).min(self.width) {
                            offset[self.index(channel, row, column)] =
                                sign * bump[(row - top) * side + column - left];
                        }
                    }
                }
            }
        }
        self.on_sphere(&offset)
    }

    /// `clean` plus `offset` scaled to length epsilon, clipped.
    fn on_sphere(&self, offset: &[f64]) -> Vec<f32> {
        let scale = self.epsilon / length(offset.iter().copied()).max(1e-12);
        self.clean
            .iter()
            .zip(offset)
            .map(|(&c, d)| (f64::from(c) + scale * d).clamp(0.0, 1.0) as f32)
            .collect()
    }

    /// `point` with a bump in one square, paid for with the budget of another square and what was unused.
    fn l2_candidate(&self, point: &[f32], share: f64, stream: &mut Stream) -> Vec<f32> {
        // Odd, so that the bump has a middle; at least 3.
        let side = (side(share, self.height, self.width) | 1).max(3).min(self.height.min(self.width));
        let (to, from) = (self.place(side, stream), self.place(side, stream));
        let mut offset: Vec<f64> =
            point.iter().zip(self.clean).map(|(p, c)| f64::from(*p) - f64::from(*c)).collect();
        let used: f64 = offset.iter().map(|d| d * d).sum();
        let unused = (self.epsilon * self.epsilon - used).max(0.0);
        let bump = bump(side, stream.random());
        for channel in 0..self.channels {
            let at =
                |(top, left): (usize, usize), i: usize| self.index(channel, top + i / side, left + i % side);
            let window: Vec<f64> = (0..side * side).map(|i| offset[at(to, i)]).collect();
            let norm = length(window.iter().copied());
            let own: f64 = window.iter().map(|d| d * d).sum();
            let is_inside = |i: usize| {
                let (row, column) = (from.0 + i / side, from.1 + i % side);
                (to.0..to.0 + side).contains(&row) && (to.1..to.1 + side).contains(&column)
            };
            let mut given = 0.0;
            for i in (0..side * side).filter(|&i| !is_inside(i)) {
                let value = &mut offset[at(from, i)];
                given += *value * *value;
                *value = 0.0;
            }
            let sign = if stream.random::<bool>() { 1.0 } else { -1.0 };
            let mixed: Vec<f64> =
                window.iter().zip(&bump).map(|(d, b)| sign * b + d / norm.max(1e-12)).collect();
            let available = (own + given + unused / self.channels as f64).sqrt();
            let scale = available / length(mixed.iter().copied()).max(1e-12);
            for (i, value) in mixed.iter().enumerate() {
                offset[at(to, i)] = scale * value;
            }
        }
        self.on_sphere(&offset)
    }
}

fn length(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|d| d * d).sum::<f64>().sqrt()
}

/// Two pyramids side by side, of opposite signs and total length one, `[side, side]`; upright or lying.
fn bump(side: usize, is_lying: bool) -> Vec<f64> {
    let half = side / 2;
    let mut out = vec![0.0; side * side];
    for row in 0..side {
        for column in 0..side {
            let (across, width, sign) =
                if column < half { (column, half, 1.0) } else { (column - half, side - half, -1.0) };
            let i = if is_lying { column * side + row } else { row * side + column };
            out[i] = sign * pyramid(row, across, side, width);
        }
    }
    let norm = length(out.iter().copied()).max(1e-12);
    for value in &mut out {
        *value /= norm;
    }
    out
}

/// `sum_{k=0}^{M} 1 / (n + 1 - k)^2` with `n = height / 2` and `M = n - max(|row - n|, |column - width / 2|)`: highest
/// in the middle, one layer after another towards the rim.
fn pyramid(row: usize, column: usize, height: usize, width: usize) -> f64 {
    let n = height / 2;
    let away = row.abs_diff(n).max(column.abs_diff(width / 2));
    (0..=n.saturating_sub(away)).map(|k| 1.0 / ((n + 1 - k) as f64).powi(2)).sum()
}

/// Attacks all rows of `problem` with `config.num_steps` losses per restart and row.
///
/// # Errors
/// Settings that make no sense; losses that are not finite.
pub fn square(objective: &dyn Objective, problem: &Problem, config: &AttackConfig) -> Result<Adversarial> {
    let mut search = Search::new(objective, problem, config)?;
    let (channels, height, width) = search.shape;
    let epsilon = config.epsilon.0;
    for restart in 0..config.num_restarts {
        search.start(restart)?;
        // From a given start the search goes on; otherwise it begins with its own pattern.
        let is_given = restart == 0 && problem.start.is_some();
        let mut best = vec![f32::MIN; search.all.len()];
        let mut asked = best.clone();
        if is_given {
            let rows = search.rows();
            let loss = search.loss(&rows)?;
            rows.iter().zip(&loss).for_each(|(&row, &loss)| best[row] = loss);
            search.note(&rows, &loss);
        }
        for query in 0..config.num_steps {
            let rows = search.rows();
            if rows.is_empty() {
                break;
            }
            let streams: Vec<Stream> =
                rows.iter().map(|&row| search.stream("square", row, restart, query)).collect();
            let candidates: Vec<Vec<f32>> = rows
                .par_iter()
                .zip(streams)
                .map(|(&row, mut stream)| {
                    let row = &search.all[row];
                    let canvas = Canvas { clean: &row.clean, epsilon, channels, height, width };
                    let share = share(query, config.num_steps);
                    match (config.norm, query == 0 && !is_given) {
                        (Norm::Linf, true) => canvas.stripes(&mut stream),
                        (Norm::L2, true) => canvas.bumps(&mut stream),
                        (Norm::Linf, false) => canvas.linf_candidate(&row.current, share, &mut stream),
                        (Norm::L2, false) => canvas.l2_candidate(&row.current, share, &mut stream),
                    }
                })
                .collect();
            let loss = search.query(&rows, &candidates)?;
            let mut improved = (Vec::new(), Vec::new());
            for ((&row, candidate), &loss) in rows.iter().zip(candidates).zip(&loss) {
                if loss > best[row] {
                    best[row] = loss;
                    search.all[row].current = candidate;
                    improved.0.push(row);
                    improved.1.push(loss);
                }
            }
            search.note(&improved.0, &improved.1);
            if config.early_stop && config.check_every > 0 && (query + 1) % config.check_every == 0 {
                let better: Vec<usize> = rows.into_iter().filter(|&row| best[row] > asked[row]).collect();
                let loss: Vec<f32> = better.iter().map(|&row| best[row]).collect();
                search.judge_iterates(&better, &loss)?;
                asked.clone_from(&best);
            }
        }
        let rows = search.rows();
        if rows.is_empty() {
            break;
        }
        let loss = search.loss(&rows)?;
        search.finish(&rows, &loss)?;
    }
    search.into_result()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;

    fn clean() -> Vec<f32> {
        (0..3 * 12 * 15).map(|i| (i % 256) as f32 / 255.0).collect()
    }

    #[test]
    fn the_share_of_pixels_is_halved_at_the_queries_of_the_paper() {
        assert_eq!((share(0, 10_000), share(10, 10_000), share(11, 10_000)), (0.8, 0.8, 0.4));
        assert_eq!((share(51, 10_000), share(8001, 10_000)), (0.2, 0.8 / 512.0));
        assert_eq!((share(100, 1000), share(101, 1000)), (0.8 / 16.0, 0.8 / 32.0));
        assert_eq!((side(0.8, 100, 100), side(1e-9, 100, 100), side(0.8, 1, 9)), (89, 1, 1));
    }

    #[test]
    fn candidates_change_a_square_and_stay_in_the_ball() {
        let clean = clean();
        for epsilon in [0.0, 0.03, 0.5, 3.0] {
            let canvas = Canvas { clean: &clean, epsilon, channels: 3, height: 12, width: 15 };
            for i in 0..20 {
                let mut stream = rng::stream(1, "test", &[i]);
                let mut point = canvas.stripes(&mut stream);
                for share in [0.8, 0.1, 0.001] {
                    let next = canvas.linf_candidate(&point, share, &mut stream);
                    assert!(Norm::Linf.distance(&next, &clean) <= epsilon + 1e-6);
                    let changed = point.iter().zip(&next).filter(|(a, b)| a != b).count();
                    assert!(changed <= 3 * side(share, 12, 15).pow(2));
                    point = next;
                }
                let mut point = canvas.bumps(&mut stream);
                for share in [0.8, 0.1, 0.001] {
                    let next = canvas.l2_candidate(&point, share, &mut stream);
                    assert!(Norm::L2.distance(&next, &clean) <= epsilon + 1e-5, "{epsilon}");
                    assert!(next.iter().all(|p| (0.0..=1.0).contains(p)));
                    point = next;
                }
                assert!(epsilon > 0.1 || epsilon == 0.0 || Norm::L2.distance(&point, &clean) > 0.8 * epsilon);
            }
        }
    }

    #[test]
    fn a_bump_has_length_one_and_two_signs() {
        for side in 3..12 {
            for is_lying in [false, true] {
                let bump = bump(side, is_lying);
                assert!((length(bump.iter().copied()) - 1.0).abs() < 1e-12);
                assert!(bump.iter().any(|&b| b > 0.0) && bump.iter().any(|&b| b < 0.0));
            }
            let (upright, lying) = (bump(side, false), bump(side, true));
            assert!((0..side * side).all(|i| (upright[i] - lying[i % side * side + i / side]).abs() < 1e-12));
        }
    }
}
