//! APGD: projected gradient ascent that finds its own step length (Croce and Hein 2020, arXiv 2003.01690, algorithm 1).
//!
//! Steps begin at 2 epsilon and are halved, from the best point so far, at checkpoints where too few steps went up or
//! nothing better was found. Each image has step lengths and checkpoints of its own.

use super::Objective;
use super::ball::Ball;
use super::config::AttackConfig;
use super::search::{Adversarial, Problem, Row, Search};
use crate::error::Result;
use rayon::prelude::*;

/// Share of the gradient step in the next move; the rest is the last move.
const MOMENTUM: f64 = 0.75;
/// Share of steps between checkpoints that must go up.
const RHO: f64 = 0.75;

/// Steps after which the step length is looked at: `p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03,
/// 0.06)`, each times `num_steps` and rounded up.
pub fn checkpoints(num_steps: usize) -> Vec<usize> {
    let (mut last, mut next) = (0.0f64, 0.22f64);
    let mut steps = Vec::new();
    while next <= 1.0 {
        // A whole number that rounding errors lift a little stays.
        steps.push((next * num_steps as f64 - 1e-9).ceil() as usize);
        (last, next) = (next, next + (next - last - 0.03).max(0.06));
    }
    steps.dedup();
    steps
}

/// One image's way.
struct Climb {
    previous: Vec<f32>,
    gradient: Vec<f32>,
    loss: f32,
    best: Vec<f32>,
    best_gradient: Vec<f32>,
    best_loss: f32,
    step_size: f64,
    /// Steps up since the last checkpoint.
    rises: usize,
    best_at_checkpoint: f32,
    was_halved: bool,
}

impl Climb {
    fn new(start: &[f32], loss: f32, gradient: Vec<f32>, epsilon: f64) -> Self {
        Self {
            previous: start.to_vec(),
            best: start.to_vec(),
            best_gradient: gradient.clone(),
            gradient,
            loss,
            best_loss: loss,
            step_size: 2.0 * epsilon,
            rises: 0,
            best_at_checkpoint: loss,
            was_halved: false,
        }
    }

    /// Moves `row` by a gradient step and, after the first, by its last move.
    fn advance(&mut self, row: &mut Row, ball: Ball, is_first: bool, stream: crate::rng::Stream) {
        let mut stepped = row.current.clone();
        ball.step(&mut stepped, &self.gradient, self.step_size, || stream);
        ball.project(&row.clean, &mut stepped);
        if !is_first {
            let share = MOMENTUM as f32;
            for ((z, &x), &before) in stepped.iter_mut().zip(&row.current).zip(&self.previous) {
                *z = x + share * (*z - x) + (1.0 - share) * (x - before);
            }
            ball.project(&row.clean, &mut stepped);
        }
        self.previous = std::mem::replace(&mut row.current, stepped);
    }

    /// Takes in what was found at the new point.
    fn arrive(&mut self, point: &[f32], loss: f32, gradient: Vec<f32>) {
        self.rises += usize::from(loss > self.loss);
        self.loss = loss;
        if loss > self.best_loss {
            self.best_loss = loss;
            self.best.copy_from_slice(point);
            self.best_gradient.clone_from(&gradient);
        }
        self.gradient = gradient;
    }

    /// After `since` steps from the last checkpoint: goes on, or halves the step and goes back to the best point.
    fn check(&mut self, since: usize, point: &mut [f32]) {
        let too_few = (self.rises as f64) < RHO * since as f64;
        let nothing_new = !self.was_halved && self.best_loss <= self.best_at_checkpoint;
        self.was_halved = too_few || nothing_new;
        if self.was_halved {
            self.step_size /= 2.0;
            point.copy_from_slice(&self.best);
            self.previous.copy_from_slice(&self.best);
            self.gradient.clone_from(&self.best_gradient);
            self.loss = self.best_loss;
        }
        self.rises = 0;
        self.best_at_checkpoint = self.best_loss;
    }
}

/// Attacks all rows of `problem`; `config.step_size` does not matter.
///
/// # Errors
/// Settings that make no sense; losses and gradients that are not finite.
pub fn apgd(objective: &dyn Objective, problem: &Problem, config: &AttackConfig) -> Result<Adversarial> {
    let mut search = Search::new(objective, problem, config)?;
    let checkpoints = checkpoints(config.num_steps);
    for restart in 0..config.num_restarts {
        search.start(restart)?;
        let rows = search.rows();
        if rows.is_empty() {
            break;
        }
        let mut climbs: Vec<Option<Climb>> = search.all.iter().map(|_| None).collect();
        let (loss, gradient) = search.gradient(&rows)?;
        search.note(&rows, &loss);
        for ((&row, &loss), gradient) in rows.iter().zip(&loss).zip(gradient) {
            climbs[row] = Some(Climb::new(&search.all[row].current, loss, gradient, config.epsilon.0));
        }
        let mut last_checkpoint = 0;
        for step in 1..=config.num_steps {
            let rows = search.rows();
            if rows.is_empty() {
                break;
            }
            let streams: Vec<_> = (0..climbs.len())
                .map(|row| search.stream("apgd_zero_gradient", row, restart, step))
                .collect();
            let ball = search.ball;
            search.all.par_iter_mut().zip(&mut climbs).zip(streams).for_each(|((row, climb), stream)| {
                if let Some(climb) = climb.as_mut().filter(|_| !row.broken) {
                    climb.advance(row, ball, step == 1, stream);
                }
            });
            let (loss, gradient) = search.gradient(&rows)?;
            search.note(&rows, &loss);
            for ((&row, &loss), gradient) in rows.iter().zip(&loss).zip(gradient) {
                if let Some(climb) = &mut climbs[row] {
                    climb.arrive(&search.all[row].current, loss, gradient);
                }
            }
            if config.early_stop && config.check_every > 0 && step % config.check_every == 0 {
                search.judge_iterates(&rows, &loss)?;
            }
            if checkpoints.contains(&step) {
                for (row, climb) in search.all.iter_mut().zip(&mut climbs) {
                    if let Some(climb) = climb {
                        climb.check(step - last_checkpoint, &mut row.current);
                    }
                }
                last_checkpoint = step;
            }
        }
        let rows = search.rows();
        if rows.is_empty() {
            break;
        }
        let loss: Vec<f32> =
            rows.iter().map(|&row| climbs[row].as_ref().map_or(f32::MIN, |c| c.loss)).collect();
        search.finish(&rows, &loss)?;
    }
    search.into_result()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoints_are_those_of_the_paper() {
        // 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99
        assert_eq!(checkpoints(100), [22, 41, 57, 70, 80, 87, 93, 99]);
        assert_eq!(checkpoints(1000), [220, 410, 570, 700, 800, 870, 930, 990]);
        assert_eq!(checkpoints(5), [2, 3, 4, 5]);
        assert_eq!(checkpoints(0), [0]);
    }

    fn climb(losses: &[f32]) -> Climb {
        let mut climb = Climb::new(&[0.5], losses[0], vec![1.0], 0.1);
        for (step, &loss) in losses.iter().enumerate().skip(1) {
            climb.arrive(&[0.5 + 0.01 * step as f32], loss, vec![step as f32]);
        }
        climb
    }

    #[test]
    fn the_step_is_halved_from_the_best_point_when_too_few_steps_rise() {
        let mut steady = climb(&[0.0, 1.0, 2.0, 3.0, 2.5]);
        let mut point = [0.9];
        steady.check(4, &mut point);
        assert_eq!(
            (steady.step_size, point, steady.was_halved),
            (0.2, [0.9], false),
            "three of four is enough"
        );
        let mut restless = climb(&[0.0, 1.0, 0.5, 2.0, 1.5]);
        restless.check(4, &mut point);
        assert_eq!((restless.step_size, restless.was_halved), (0.1, true));
        assert!((point[0] - 0.53).abs() < 1e-6 && restless.gradient == [3.0] && restless.loss == 2.0);
    }

    #[test]
    fn the_step_is_halved_when_nothing_better_was_found_unless_it_just_was() {
        let mut stuck = climb(&[5.0, 1.0, 2.0, 3.0, 4.0]);
        let mut point = [0.9];
        assert_eq!(stuck.rises, 3);
        stuck.check(4, &mut point);
        assert_eq!((stuck.step_size, point), (0.1, [0.5]));
        for (step, loss) in [1.0, 2.0, 3.0, 4.0].into_iter().enumerate() {
            stuck.loss = loss - 0.5;
            stuck.arrive(&[0.7], loss, vec![step as f32]);
        }
        stuck.check(4, &mut point);
        assert_eq!(stuck.step_size, 0.1, "halved at the last checkpoint, and all steps rose");
        stuck.check(0, &mut point);
        assert_eq!(stuck.step_size, 0.05);
    }
}
