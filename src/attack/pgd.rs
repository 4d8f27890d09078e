//! Projected gradient ascent, with restarts, per-item early stop and the best iterate kept.
//!
//! The noise baseline and FGSM are the same loop with no step and with one.

use super::Objective;
use super::config::AttackConfig;
use super::search::{Adversarial, Iterate, Problem, Search};
use crate::error::Result;
use rayon::prelude::*;

/// Attacks all rows of `problem` by noise, FGSM or PGD; `observe` sees every iterate and can end the attack by an error.
///
/// With `output = best`, an image never has a lower loss than the clean one, unless it was found to be answered
/// wrongly: that is what an attack is for, and decides first. Losses and gradients that are not finite are errors.
pub fn pgd(
    objective: &dyn Objective,
    problem: &Problem,
    config: &AttackConfig,
    observe: &mut dyn FnMut(&Iterate) -> Result<()>,
) -> Result<Adversarial> {
    let mut search = Search::new(objective, problem, config)?;
    let mut momentum = vec![Vec::new(); search.all.len()];
    for restart in 0..config.num_restarts {
        search.start(restart)?;
        momentum.iter_mut().for_each(Vec::clear);
        for step in 0..config.effective_num_steps() {
            let rows = search.rows();
            if rows.is_empty() {
                break;
            }
            let (loss, gradient) = search.gradient(&rows)?;
            observe(&Iterate { restart, step, rows: &rows, loss: &loss })?;
            search.note(&rows, &loss);
            if config.early_stop && step > 0 && config.check_every > 0 && step % config.check_every == 0 {
                search.judge_iterates(&rows, &loss)?;
            }
            ascend(&mut search, restart, step, &rows, &gradient, &mut momentum);
        }
        let rows = search.rows();
        if rows.is_empty() {
            break;
        }
        let loss = search.loss(&rows)?;
        let step = config.effective_num_steps();
        observe(&Iterate { restart, step, rows: &rows, loss: &loss })?;
        search.finish(&rows, &loss)?;
    }
    search.into_result()
}

/// One step for every row that is still attacked: normalise, step, project, clip.
fn ascend(
    search: &mut Search<'_>,
    restart: usize,
    step: usize,
    rows: &[usize],
    gradient: &[Vec<f32>],
    momentum: &mut [Vec<f32>],
) {
    let (ball, config) = (search.ball, search.config);
    let mut of_row = vec![None; search.all.len()];
    rows.iter().zip(gradient).for_each(|(&row, gradient)| of_row[row] = Some(gradient));
    let streams: Vec<_> = (0..search.all.len())
        .map(|row| of_row[row].map(|_| search.stream("pgd_zero_gradient", row, restart, step)))
        .collect();
    search.all.par_iter_mut().zip(momentum).zip(streams).enumerate().for_each(
        |(i, ((row, momentum), stream))| {
            let (Some(gradient), Some(stream)) = (of_row[i], stream) else { return };
            let direction = if config.momentum > 0.0 {
                accumulate(momentum, gradient, config.momentum as f32);
                &*momentum
            } else {
                gradient
            };
            ball.step(&mut row.current, direction, config.effective_step_size(), || stream);
            ball.project(&row.clean, &mut row.current);
        },
    );
}

/// `sum <- decay * sum + gradient / |gradient|_1` (Dong et al. 2018, MI-FGSM); a zero gradient adds nothing.
fn accumulate(sum: &mut Vec<f32>, gradient: &[f32], decay: f32) {
    sum.resize(gradient.len(), 0.0);
    let length: f64 = gradient.iter().map(|g| f64::from(g.abs())).sum();
    let scale = if length > 0.0 { (1.0 / length) as f32 } else { 0.0 };
    for (sum, &g) in sum.iter_mut().zip(gradient) {
        *sum = decay * *sum + scale * g;
    }
}
