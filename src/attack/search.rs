//! What every attack shares: a batch of images under way, their losses, the best iterates, verdicts and results.
//!
//! Each image is treated by itself: its random numbers are named by its key, so batches, their order and a resumed run
//! change nothing.

use super::Objective;
use super::ball::Ball;
use super::config::{AttackConfig, PgdOutput};
use super::lattice::{ascend, nearest_levels, to_8bit_within_ball};
use crate::error::{Error, Result};
use crate::rng::{self, Stream};
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
    /// Gradients, or losses where an attack uses no gradients, spent on each image.
    pub steps_used: Vec<usize>,
    /// What rounding to eight bits did to each attack; looked at with `judge_8bit` and `early_stop` only.
    pub rounding: Vec<Rounding>,
    /// Whether the first gradient of each image was zero everywhere.
    pub zero_gradient: Vec<bool>,
}

/// What rounding to eight bits did to an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rounding {
    /// Nothing that matters: broken after rounding, or not broken before it either.
    #[default]
    Harmless,
    /// It took a success away, and moves on the lattice of eight-bit images brought it back.
    Repaired,
    /// It took a success away.
    Undone,
}

/// Moves on the lattice that may bring a success back.
const REPAIRS: usize = 5;

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

/// An image and its loss.
#[derive(Clone)]
pub(super) struct Candidate {
    pub(super) pixels: Vec<f32>,
    pub(super) loss: f32,
}

/// One row of the problem.
pub(super) struct Row {
    pub(super) clean: Vec<f32>,
    pub(super) current: Vec<f32>,
    /// Of this restart.
    candidate: Option<Candidate>,
    /// Of all restarts.
    result: Option<Candidate>,
    pub(super) broken: bool,
    steps_used: usize,
    rounding: Rounding,
    has_zero_gradient: bool,
}

/// An attack under way.
pub(super) struct Search<'a> {
    objective: &'a dyn Objective,
    problem: &'a Problem<'a>,
    pub(super) config: &'a AttackConfig,
    pub(super) ball: Ball,
    /// Channels, height and width.
    pub(super) shape: (usize, usize, usize),
    device: Device,
    loss_clean: Vec<f32>,
    pub(super) all: Vec<Row>,
}

impl<'a> Search<'a> {
    /// # Errors
    /// Settings that make no sense; pixels outside [0, 1]; a clean loss that is not finite.
    pub(super) fn new(
        objective: &'a dyn Objective,
        problem: &'a Problem<'a>,
        config: &'a AttackConfig,
    ) -> Result<Self> {
        let errors = config.check();
        if !errors.is_empty() {
            return Err(Error::Config(errors));
        }
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
            rounding: Rounding::Harmless,
            has_zero_gradient: false,
        };
        let mut search = Self {
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
            search.loss_clean = search.loss(&search.rows())?;
        }
        if config.output == PgdOutput::Best {
            for (row, &loss) in search.all.iter_mut().zip(&search.loss_clean) {
                row.result = Some(Candidate { pixels: row.clean.clone(), loss });
            }
        }
        Ok(search)
    }

    /// The rows that are still attacked.
    pub(super) fn rows(&self) -> Vec<usize> {
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
    pub(super) fn start(&mut self, restart: usize) -> Result<()> {
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

    /// The stream named `purpose` for a row at a restart and a step.
    pub(super) fn stream(&self, purpose: &str, row: usize, restart: usize, step: usize) -> Stream {
        rng::stream(self.config.seed, purpose, &[self.problem.keys[row], restart as u64, step as u64])
    }

    /// Losses at the current iterates.
    pub(super) fn loss(&self, rows: &[usize]) -> Result<Vec<f32>> {
        self.loss_at(rows, &self.current(rows)?)
    }

    /// Losses of `rows` at other pixels, each of which counts as spent.
    pub(super) fn query(&mut self, rows: &[usize], pixels: &[Vec<f32>]) -> Result<Vec<f32>> {
        let loss = self.loss_at(rows, &self.tensor(pixels.iter().map(Vec::as_slice))?)?;
        for &row in rows {
            self.all[row].steps_used += 1;
        }
        Ok(loss)
    }

    fn loss_at(&self, rows: &[usize], pixels: &Tensor) -> Result<Vec<f32>> {
        let loss = self.objective.loss(pixels, &self.items(rows))?;
        self.check_loss(rows, &loss)?;
        Ok(loss)
    }

    /// Losses and gradients at the current iterates.
    pub(super) fn gradient(&mut self, rows: &[usize]) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
        let pixels = self.current(rows)?;
        self.gradient_at(rows, &pixels)
    }

    fn gradient_at(&mut self, rows: &[usize], pixels: &Tensor) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
        let (loss, gradient) = self.objective.loss_and_gradient(pixels, &self.items(rows))?;
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
            let row = &mut self.all[row];
            row.has_zero_gradient |= row.steps_used == 0 && gradient.iter().all(|&g| g == 0.0);
            row.steps_used += 1;
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
    pub(super) fn note(&mut self, rows: &[usize], loss: &[f32]) {
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

    /// Ends the attack on rows whose current iterate is answered wrongly.
    pub(super) fn judge_iterates(&mut self, rows: &[usize], loss: &[f32]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
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
    pub(super) fn finish(&mut self, rows: &[usize], loss: &[f32]) -> Result<()> {
        self.note(rows, loss);
        let take = |(&row, &loss): (&usize, &f32)| {
            let Row { current, candidate, .. } = &mut self.all[row];
            candidate.take().unwrap_or_else(|| Candidate { pixels: current.clone(), loss })
        };
        let candidates: Vec<Candidate> = rows.iter().zip(loss).map(take).collect();
        let broken =
            if self.config.early_stop { self.judge(rows, &candidates)? } else { vec![false; rows.len()] };
        let mut survivors = Vec::new();
        for ((&row, candidate), broken) in rows.iter().zip(candidates).zip(broken) {
            let own = &mut self.all[row];
            own.broken = broken;
            if !broken {
                survivors.push((row, candidate.pixels.clone()));
            }
            if broken || own.result.as_ref().is_none_or(|result| candidate.loss > result.loss) {
                own.result = Some(candidate);
            }
        }
        if self.config.early_stop && self.problem.judge_8bit { self.repair(survivors) } else { Ok(()) }
    }

    /// Looks for attacks that rounding undid, and for eight-bit images near them that are answered wrongly.
    fn repair(&mut self, survivors: Vec<(usize, Vec<f32>)>) -> Result<()> {
        let mut undone = Vec::new();
        for (row, pixels) in survivors {
            let levels = self.rounded(row, &pixels);
            let is_moved = pixels.iter().zip(&levels).any(|(p, u)| (255.0 * p - f32::from(*u)).abs() > 1e-3);
            if is_moved {
                undone.push((row, pixels, levels));
            }
        }
        if undone.is_empty() {
            return Ok(());
        }
        let rows: Vec<usize> = undone.iter().map(|(row, ..)| *row).collect();
        let pixels = self.tensor(undone.iter().map(|(_, pixels, _)| &pixels[..]))?;
        let mut is_undone = self.verdicts(&rows, &pixels)?.into_iter();
        undone.retain(|_| is_undone.next().unwrap_or(false));
        for (row, ..) in &undone {
            self.all[*row].rounding = Rounding::Undone;
        }
        let norm = self.ball.norm;
        for _ in 0..REPAIRS {
            if undone.is_empty() {
                break;
            }
            let rows: Vec<usize> = undone.iter().map(|(row, ..)| *row).collect();
            let at = |levels: &[Vec<f32>]| self.tensor(levels.iter().map(Vec::as_slice));
            let images: Vec<Vec<f32>> = undone.iter().map(|(.., levels)| to_pixels(levels)).collect();
            let (_, gradient) = self.gradient_at(&rows, &at(&images)?)?;
            for ((row, _, levels), gradient) in undone.iter_mut().zip(&gradient) {
                let clean = nearest_levels(&self.all[*row].clean);
                *levels = ascend(levels, &clean, gradient, norm, self.ball.epsilon);
            }
            let images: Vec<Vec<f32>> = undone.iter().map(|(.., levels)| to_pixels(levels)).collect();
            let pixels = self.tensor(images.iter().map(Vec::as_slice))?;
            let loss = self.loss_at(&rows, &pixels)?;
            let broken = self.verdicts(&rows, &pixels)?;
            for (((&row, pixels), &loss), &broken) in rows.iter().zip(images).zip(&loss).zip(&broken) {
                if broken {
                    let own = &mut self.all[row];
                    own.result = Some(Candidate { pixels, loss });
                    own.broken = true;
                    own.rounding = Rounding::Repaired;
                }
            }
            undone.retain(|(row, ..)| !self.all[*row].broken);
        }
        Ok(())
    }

    /// The eight-bit image of a row's pixels.
    fn rounded(&self, row: usize, pixels: &[f32]) -> Vec<u8> {
        let clean = nearest_levels(&self.all[row].clean);
        to_8bit_within_ball(pixels, &clean, self.ball.norm, self.ball.epsilon)
    }

    /// Whether each candidate is answered wrongly, after rounding where the problem says so.
    fn judge(&self, rows: &[usize], candidates: &[Candidate]) -> Result<Vec<bool>> {
        let pixels: Vec<Vec<f32>> = rows
            .iter()
            .zip(candidates)
            .map(|(&row, candidate)| {
                if self.problem.judge_8bit {
                    to_pixels(&self.rounded(row, &candidate.pixels))
                } else {
                    candidate.pixels.clone()
                }
            })
            .collect();
        self.verdicts(rows, &self.tensor(pixels.iter().map(Vec::as_slice))?)
    }

    fn verdicts(&self, rows: &[usize], pixels: &Tensor) -> Result<Vec<bool>> {
        let broken = self.objective.is_broken(pixels, &self.items(rows))?;
        if broken.len() != rows.len() {
            return Err(anyhow::anyhow!("attack: {} verdicts for {} images", broken.len(), rows.len()).into());
        }
        Ok(broken)
    }

    pub(super) fn into_result(self) -> Result<Adversarial> {
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
            rounding: self.all.iter().map(|row| row.rounding).collect(),
            zero_gradient: self.all.iter().map(|row| row.has_zero_gradient).collect(),
            loss_clean: self.loss_clean,
        })
    }
}

fn to_pixels(levels: &[u8]) -> Vec<f32> {
    levels.iter().map(|&level| f32::from(level) / 255.0).collect()
}

/// The images of [b, 3, h, w] as flat single-precision rows.
pub(super) fn to_rows(tensor: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(tensor.flatten_from(1)?.to_dtype(DType::F32)?.to_vec2()?)
}
