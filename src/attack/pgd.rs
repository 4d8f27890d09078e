//! Projected gradient ascent on a batch of images, with restarts, per-item early stop and the best iterate kept.
//!
//! The noise baseline and FGSM are the same loop with no step and with one. Each image is treated by itself: its
//! random numbers are named by its key, so batches, their order and a resumed run change nothing.

use super::Objective;
use super::ball::Ball;
use super::config::{AttackConfig, PgdOutput};
use super::lattice::{nearest_levels, to_8bit_within_ball};
use crate::error::{Error, Result};
use crate::rng;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// The images to attack.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// Clean pixels [b, 3, h, w] in [0, 1].
    pub clean: &'a Tensor,
    /// What the objective calls each row.
    pub items: &'a [usize],
    /// Names each row's random numbers; stable for an item over runs (see [`rng::key_of`]).
    pub keys: &'a [u64],
    /// Where the first restart begins, of the shape of `clean`, projected onto the budget; in place of the clean or
    /// random start. With the result of a smaller budget, success can only grow with the budget.
    pub start: Option<&'a Tensor>,
    /// Ask for the model's answer on pixels rounded as [`to_8bit_within_ball`] rounds them, so that what counts as
    /// broken is what a file will hold. For clean pixels that are multiples of 1/255.
    pub judge_8bit: bool,
}

/// What an attack found.
#[derive(Debug, Clone)]
pub struct Adversarial {
    /// Attacked pixels [b, 3, h, w], on the device of the clean ones, f32.
    pub pixels: Tensor,
    /// Loss of each clean image.
    pub loss_clean: Vec<f32>,
    /// Loss of each attacked image.
    pub loss: Vec<f32>,
    /// Whether the model's answer on the attacked image was found wrong; asked only with `early_stop`.
    pub broken: Vec<bool>,
    /// Gradients spent on each image.
    pub steps_used: Vec<usize>,
}

/// What is observed at each iterate: the losses before a step, and once more after the last.
#[derive(Debug, Clone, Copy)]
pub struct Iterate<'a> {
    /// Restart, from 0.
    pub restart: usize,
    /// Steps taken since its start, up to `num_steps`.
    pub step: usize,
    /// Rows of the problem that are still attacked.
    pub rows: &'a [usize],
    /// Their losses here.
    pub loss: &'a [f32],
}

/// Attacks all rows of `problem` as `config` says; `observe` sees every iterate and can end the attack by an error.
///
/// With `output = best`, an image never has a lower loss than the clean one, unless it was found to be answered
/// wrongly: that is what an attack is for, and decides first. Losses and gradients that are not finite are errors.
pub fn pgd(
    objective: &dyn Objective,
    problem: &Problem,
    config: &AttackConfig,
    observe: &mut dyn FnMut(&Iterate) -> Result<()>,
) -> Result<Adversarial> {
    let errors = config.check();
    if !errors.is_empty() {
        return Err(Error::Config(errors));
    }
    let mut attack = Attack::new(objective, problem, config)?;
    for restart in 0..config.num_restarts {
        attack.start(restart)?;
        for step in 0..config.effective_num_steps() {
            let rows = attack.rows();
            if rows.is_empty() {
                break;
            }
            let (loss, gradient) = attack.gradient(&rows)?;
            observe(&Iterate { restart, step, rows: &rows, loss: &loss })?;
            attack.note(&rows, &loss);
            if config.early_stop && step > 0 && config.check_every > 0 && step % config.check_every == 0 {
                attack.judge_iterates(&rows, &loss)?;
            }
            attack.ascend(restart, step, &rows, &gradient);
        }
        let rows = attack.rows();
        if rows.is_empty() {
            break;
        }
        let loss = attack.loss(&rows)?;
        let step = config.effective_num_steps();
        observe(&Iterate { restart, step, rows: &rows, loss: &loss })?;
        attack.finish(&rows, &loss)?;
    }
    attack.into_result()
}

/// An image and its loss.
#[derive(Clone)]
struct Candidate {
    pixels: Vec<f32>,
    loss: f32,
}

/// One row of the problem.
struct Row {
    clean: Vec<f32>,
    current: Vec<f32>,
    /// Of this restart.
    candidate: Option<Candidate>,
    /// Of all restarts.
    result: Option<Candidate>,
    broken: bool,
    steps_used: usize,
}

struct Attack<'a> {
    objective: &'a dyn Objective,
    problem: &'a Problem<'a>,
    config: &'a AttackConfig,
    ball: Ball,
    shape: (usize, usize, usize),
    device: Device,
    loss_clean: Vec<f32>,
    all: Vec<Row>,
}

impl<'a> Attack<'a> {
    fn new(objective: &'a dyn Objective, problem: &'a Problem<'a>, config: &'a AttackConfig) -> Result<Self> {
        let (b, channels, h, w) = problem.clean.dims4()?;
        if problem.items.len() != b || problem.keys.len() != b {
            let (items, keys) = (problem.items.len(), problem.keys.len());
            return Err(anyhow::anyhow!("attack: {b} images, but {items} items and {keys} keys").into());
        }
        if problem.start.is_some_and(|start| start.dims() != problem.clean.dims()) {
            return Err(anyhow::anyhow!("attack: the start has another shape than the clean images").into());
        }
        let clean = to_rows(problem.clean)?;
        if let Some(row) = clean.iter().position(|row| !row.iter().all(|p| (0.0..=1.0).contains(p))) {
            let item = problem.items[row];
            return Err(Error::data(format!("the pixels of item {item} leave the range [0, 1]")));
        }
        let row = |clean: Vec<f32>| Row {
            current: clean.clone(),
            clean,
            candidate: None,
            result: None,
            broken: false,
            steps_used: 0,
        };
        let mut attack = Self {
            objective,
            problem,
            config,
            ball: Ball { norm: config.norm, epsilon: config.epsilon.0 },
            shape: (channels, h, w),
            device: problem.clean.device().clone(),
            loss_clean: Vec::new(),
            all: clean.into_iter().map(row).collect(),
        };
        if b > 0 {
            attack.loss_clean = attack.loss(&attack.rows())?;
        }
        if config.output == PgdOutput::Best {
            for (row, &loss) in attack.all.iter_mut().zip(&attack.loss_clean) {
                row.result = Some(Candidate { pixels: row.clean.clone(), loss });
            }
        }
        Ok(attack)
    }

    /// The rows that are still attacked.
    fn rows(&self) -> Vec<usize> {
        (0..self.all.len()).filter(|&row| !self.all[row].broken).collect()
    }

    fn items(&self, rows: &[usize]) -> Vec<usize> {
        rows.iter().map(|&row| self.problem.items[row]).collect()
    }

    fn tensor<'b>(&self, pixels: impl ExactSizeIterator<Item = &'b [f32]>) -> Result<Tensor> {
        let (channels, h, w) = self.shape;
        let b = pixels.len();
        let mut data = Vec::with_capacity(b * channels * h * w);
        pixels.for_each(|row| data.extend_from_slice(row));
        Ok(Tensor::from_vec(data, (b, channels, h, w), &self.device)?)
    }

    fn current(&self, rows: &[usize]) -> Result<Tensor> {
        self.tensor(rows.iter().map(|&row| &self.all[row].current[..]))
    }

    /// Sets the first iterate of a restart.
    fn start(&mut self, restart: usize) -> Result<()> {
        let given = if restart == 0 { self.problem.start.map(to_rows).transpose()? } else { None };
        let (ball, config, keys) = (self.ball, self.config, self.problem.keys);
        self.all.par_iter_mut().enumerate().filter(|(_, row)| !row.broken).for_each(|(i, row)| {
            row.candidate = None;
            match &given {
                Some(given) => {
                    row.current.copy_from_slice(&given[i]);
                    ball.project(&row.clean, &mut row.current);
                }
                None if config.starts_randomly(restart) => {
                    let mut stream = rng::stream(config.seed, "pgd", &[keys[i], restart as u64]);
                    ball.random_start(&row.clean, &mut row.current, &mut stream);
                }
                None => row.current.copy_from_slice(&row.clean),
            }
        });
        Ok(())
    }

    fn loss(&self, rows: &[usize]) -> Result<Vec<f32>> {
        let loss = self.objective.loss(&self.current(rows)?, &self.items(rows))?;
        self.check_loss(rows, &loss)?;
        Ok(loss)
    }

    /// Losses and gradients at the current iterates.
    fn gradient(&mut self, rows: &[usize]) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
        let pixels = self.current(rows)?;
        let (loss, gradient) = self.objective.loss_and_gradient(&pixels, &self.items(rows))?;
        self.check_loss(rows, &loss)?;
        if gradient.dims() != pixels.dims() {
            let (got, want) = (gradient.shape(), pixels.shape());
            return Err(anyhow::anyhow!("attack: a gradient of shape {got:?} for pixels {want:?}").into());
        }
        let gradient = to_rows(&gradient)?;
        for (&row, gradient) in rows.iter().zip(&gradient) {
            if let Some(bad) = gradient.iter().find(|g| !g.is_finite()) {
                let item = self.problem.items[row];
                return Err(Error::NonFinite(format!("the pixel gradient of item {item} contains {bad}")));
            }
            self.all[row].steps_used += 1;
        }
        Ok((loss, gradient))
    }

    fn check_loss(&self, rows: &[usize], loss: &[f32]) -> Result<()> {
        if loss.len() != rows.len() {
            return Err(anyhow::anyhow!("attack: {} losses for {} images", loss.len(), rows.len()).into());
        }
        match rows.iter().zip(loss).find(|(_, loss)| !loss.is_finite()) {
            Some((&row, loss)) => {
                let item = self.problem.items[row];
                Err(Error::NonFinite(format!("the attack's loss on item {item} is {loss}")))
            }
            None => Ok(()),
        }
    }

    /// Remembers the iterates that are the best of this restart.
    fn note(&mut self, rows: &[usize], loss: &[f32]) {
        if self.config.output == PgdOutput::Last {
            return;
        }
        for (&row, &loss) in rows.iter().zip(loss) {
            let Row { current, candidate, .. } = &mut self.all[row];
            match candidate {
                Some(best) if best.loss >= loss => {}
                Some(best) => {
                    best.pixels.copy_from_slice(current);
                    best.loss = loss;
                }
                None => *candidate = Some(Candidate { pixels: current.clone(), loss }),
            }
        }
    }

    /// One step for every row that is still attacked: normalise, step, project, clip.
    fn ascend(&mut self, restart: usize, step: usize, rows: &[usize], gradient: &[Vec<f32>]) {
        let (ball, config, keys) = (self.ball, self.config, self.problem.keys);
        let mut of_row = vec![None; self.all.len()];
        rows.iter().zip(gradient).for_each(|(&row, gradient)| of_row[row] = Some(gradient));
        self.all.par_iter_mut().enumerate().filter(|(_, row)| !row.broken).for_each(|(i, row)| {
            let Some(gradient) = of_row[i] else { return };
            let names = [keys[i], restart as u64, step as u64];
            let fallback = || rng::stream(config.seed, "pgd_zero_gradient", &names);
            ball.step(&mut row.current, gradient, config.effective_step_size(), fallback);
            ball.project(&row.clean, &mut row.current);
        });
    }

    /// Ends the attack on rows whose current iterate is answered wrongly.
    fn judge_iterates(&mut self, rows: &[usize], loss: &[f32]) -> Result<()> {
        let candidates: Vec<Candidate> = rows
            .iter()
            .zip(loss)
            .map(|(&row, &loss)| Candidate { pixels: self.all[row].current.clone(), loss })
            .collect();
        let broken = self.judge(rows, &candidates)?;
        for ((&row, candidate), broken) in rows.iter().zip(candidates).zip(broken) {
            if broken {
                self.all[row].result = Some(candidate);
                self.all[row].broken = true;
            }
        }
        Ok(())
    }

    /// Ends a restart at iterates of the given loss: judges its candidates and keeps the better of them.
    fn finish(&mut self, rows: &[usize], loss: &[f32]) -> Result<()> {
        self.note(rows, loss);
        let take = |(&row, &loss): (&usize, &f32)| {
            let Row { current, candidate, .. } = &mut self.all[row];
            candidate.take().unwrap_or_else(|| Candidate { pixels: current.clone(), loss })
        };
        let candidates: Vec<Candidate> = rows.iter().zip(loss).map(take).collect();
        let broken =
            if self.config.early_stop { self.judge(rows, &candidates)? } else { vec![false; rows.len()] };
        for ((&row, candidate), broken) in rows.iter().zip(candidates).zip(broken) {
            let row = &mut self.all[row];
            let better = row.result.as_ref().is_none_or(|result| candidate.loss > result.loss);
            if broken || better {
                row.result = Some(candidate);
            }
            row.broken = broken;
        }
        Ok(())
    }

    fn judge(&self, rows: &[usize], candidates: &[Candidate]) -> Result<Vec<bool>> {
        let pixels: Vec<Vec<f32>> = rows
            .iter()
            .zip(candidates)
            .map(|(&row, candidate)| {
                if !self.problem.judge_8bit {
                    return candidate.pixels.clone();
                }
                let clean = nearest_levels(&self.all[row].clean);
                let image = to_8bit_within_ball(&candidate.pixels, &clean, self.ball.norm, self.ball.epsilon);
                image.into_iter().map(|level| f32::from(level) / 255.0).collect()
            })
            .collect();
        let broken =
            self.objective.is_broken(&self.tensor(pixels.iter().map(Vec::as_slice))?, &self.items(rows))?;
        if broken.len() != rows.len() {
            return Err(anyhow::anyhow!("attack: {} verdicts for {} images", broken.len(), rows.len()).into());
        }
        Ok(broken)
    }

    fn into_result(self) -> Result<Adversarial> {
        let clean = |row: &Row, loss| Candidate { pixels: row.clean.clone(), loss };
        let results: Vec<Candidate> = self
            .all
            .iter()
            .zip(&self.loss_clean)
            .map(|(row, &loss)| row.result.clone().unwrap_or_else(|| clean(row, loss)))
            .collect();
        Ok(Adversarial {
            pixels: self.tensor(results.iter().map(|result| &result.pixels[..]))?,
            loss: results.iter().map(|result| result.loss).collect(),
            broken: self.all.iter().map(|row| row.broken).collect(),
            steps_used: self.all.iter().map(|row| row.steps_used).collect(),
            loss_clean: self.loss_clean,
        })
    }
}

/// The images of [b, 3, h, w] as flat single-precision rows.
fn to_rows(tensor: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(tensor.flatten_from(1)?.to_dtype(DType::F32)?.to_vec2()?)
}

#[cfg(test)]
#[path = "pgd_tests.rs"]
mod tests;
