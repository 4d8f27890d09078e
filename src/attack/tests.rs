//! The laws of an attack on objectives whose optimum is known.

use super::lattice::{is_within, nearest_levels, to_8bit_within_ball};
use super::search::to_rows;
use super::*;
use crate::error::Error;
use crate::rng;
use candle_core::Device;
use std::cell::Cell;

/// loss = w·x per item, broken above a threshold; the gradient is w.
struct Linear {
    weights: Vec<Vec<f32>>,
    thresholds: Vec<f32>,
    gradients: Cell<usize>,
}

impl Linear {
    fn value(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<f32>> {
        let dot = |(x, &item): (&Vec<f32>, &usize)| {
            x.iter().zip(&self.weights[item]).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>() as f32
        };
        Ok(to_rows(pixels)?.iter().zip(items).map(dot).collect())
    }
}

impl Objective for Linear {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        self.gradients.set(self.gradients.get() + items.len());
        let data: Vec<f32> = items.iter().flat_map(|&item| self.weights[item].clone()).collect();
        Ok((self.value(pixels, items)?, Tensor::from_vec(data, pixels.shape(), pixels.device())?))
    }
    fn loss(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<f32>> {
        self.value(pixels, items)
    }
    fn is_broken(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        let loss = self.value(pixels, items)?;
        Ok(loss.iter().zip(items).map(|(loss, &item)| *loss > self.thresholds[item]).collect())
    }
}

/// loss = −|x − target|²/2; the optimum in an L2 ball is the point of the ball that is closest to the target.
struct Quadratic {
    target: Vec<f32>,
}

impl Objective for Quadratic {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        let target = Tensor::new(&self.target[..], pixels.device())?.reshape(&pixels.dims()[1..])?;
        Ok((self.loss(pixels, items)?, target.broadcast_as(pixels.shape())?.sub(pixels)?))
    }
    fn loss(&self, pixels: &Tensor, _: &[usize]) -> Result<Vec<f32>> {
        let distance = |x: &Vec<f32>| Norm::L2.distance(x, &self.target);
        Ok(to_rows(pixels)?.iter().map(|x| (-distance(x).powi(2) / 2.0) as f32).collect())
    }
    fn is_broken(&self, _: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        Ok(vec![false; items.len()])
    }
}

const EVERY: [Method; 5] = [Method::Noise, Method::Fgsm, Method::Pgd, Method::Apgd, Method::Square];
const SHAPE: (usize, usize, usize) = (3, 4, 5);
const LEN: usize = 60;

fn normals(purpose: &str, index: u64) -> Vec<f32> {
    let mut out = vec![0.0; LEN];
    rng::fill_standard_normal(&mut rng::stream(11, purpose, &[index]), &mut out);
    out
}

/// Images of eight-bit levels in the middle of the range: no small step is clipped.
fn images(b: usize) -> Tensor {
    let level = |x: &f32| (128.0 + 20.0 * x).round().clamp(70.0, 180.0) / 255.0;
    let data: Vec<f32> =
        (0..b).flat_map(|i| normals("image", i as u64).iter().map(level).collect::<Vec<_>>()).collect();
    Tensor::from_vec(data, (b, SHAPE.0, SHAPE.1, SHAPE.2), &Device::Cpu).unwrap()
}

fn linear(b: usize, threshold: f32) -> Linear {
    Linear {
        weights: (0..b).map(|i| normals("weights", i as u64)).collect(),
        thresholds: vec![threshold; b],
        gradients: Cell::new(0),
    }
}

fn run(objective: &dyn Objective, clean: &Tensor, config: &AttackConfig) -> Adversarial {
    let b = clean.dims()[0];
    let items: Vec<usize> = (0..b).collect();
    let keys: Vec<u64> = (0..b as u64).map(|i| 1000 + i).collect();
    let problem = Problem { clean, items: &items, keys: &keys, start: None, judge_8bit: false };
    attack(objective, &problem, config).unwrap()
}

fn config(norm: Norm, epsilon: f64) -> AttackConfig {
    AttackConfig { norm, epsilon: Fraction(epsilon), early_stop: false, ..AttackConfig::default() }
}

#[test]
fn on_a_linear_loss_one_step_is_the_optimum_and_iterating_finds_it_too() {
    let (clean, objective) = (images(3), linear(3, f32::MAX));
    for (norm, epsilon) in [(Norm::Linf, 8.0 / 255.0), (Norm::L2, 0.5)] {
        for method in [Method::Fgsm, Method::Pgd, Method::Apgd] {
            // steps as long as the budget turn a random start within a few steps
            let step_size = Some(Fraction(epsilon));
            let config = AttackConfig { method, step_size, num_steps: 30, ..config(norm, epsilon) };
            let found = run(&objective, &clean, &config);
            for item in 0..3 {
                let w = objective.weights[item].iter().map(|&w| f64::from(w));
                let dual = match norm {
                    Norm::Linf => w.map(f64::abs).sum::<f64>(),
                    Norm::L2 => w.map(|w| w * w).sum::<f64>().sqrt(),
                };
                let gain = f64::from(found.loss[item]) - f64::from(found.loss_clean[item]);
                assert!((gain / (epsilon * dual) - 1.0).abs() < 2e-6, "{norm:?} {method:?}: {gain}");
            }
        }
    }
    let straight = AttackConfig { random_start: false, ..config(Norm::L2, 0.5) };
    let fgsm = run(&objective, &clean, &AttackConfig { method: Method::Fgsm, ..straight.clone() });
    let pgd = run(&objective, &clean, &straight);
    for (a, b) in pgd.loss.iter().zip(&fgsm.loss) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

#[test]
fn on_a_quadratic_the_closest_point_of_the_ball_is_found() {
    let clean = images(1);
    let x = to_rows(&clean).unwrap().remove(0);
    let direction = normals("direction", 0);
    let length = Norm::L2.distance(&direction, &[0.0; LEN]);
    let at = |distance: f64| -> Vec<f32> {
        x.iter().zip(&direction).map(|(x, d)| x + (distance / length) as f32 * d).collect()
    };
    let objective = Quadratic { target: at(1.0) };
    let config = AttackConfig { num_steps: 100, ..config(Norm::L2, 0.25) };
    let long = AttackConfig { step_size: Some(Fraction(0.1)), ..config.clone() };
    let found = to_rows(&run(&objective, &clean, &long).pixels).unwrap().remove(0);
    assert!(Norm::L2.distance(&found, &at(0.25)) < 1e-5);
    // a target inside the ball is reached up to a step
    let objective = Quadratic { target: at(0.1) };
    let found = to_rows(&run(&objective, &clean, &config).pixels).unwrap().remove(0);
    assert!(Norm::L2.distance(&found, &at(0.1)) < config.effective_step_size());
}

#[test]
fn without_budget_or_without_steps_nothing_changes() {
    let (clean, objective) = (images(2), linear(2, f32::MAX));
    for norm in [Norm::Linf, Norm::L2] {
        let no_budget = config(norm, 0.0);
        let no_steps = AttackConfig { num_steps: 0, random_start: false, ..config(norm, 0.1) };
        for config in [no_budget, no_steps] {
            for output in [PgdOutput::Best, PgdOutput::Last] {
                let found = run(&objective, &clean, &AttackConfig { output, ..config.clone() });
                assert_eq!(to_rows(&found.pixels).unwrap(), to_rows(&clean).unwrap());
                assert_eq!(found.loss, found.loss_clean);
            }
        }
    }
}

#[test]
fn every_result_stays_in_the_budget_and_the_pixel_range() {
    let objective = linear(3, f32::MAX);
    let clean = (images(3) * 3.0).unwrap().affine(1.0, -1.0).unwrap().clamp(0f32, 1f32).unwrap();
    for norm in [Norm::Linf, Norm::L2] {
        for epsilon in [2.0 / 255.0, 0.3, 1.0] {
            for method in EVERY {
                let config = AttackConfig { method, num_restarts: 2, ..config(norm, epsilon) };
                let found = to_rows(&run(&objective, &clean, &config).pixels).unwrap();
                for (found, clean) in found.iter().zip(&to_rows(&clean).unwrap()) {
                    assert!(norm.distance(found, clean) <= epsilon + 1e-6, "{norm:?} {epsilon} {method:?}");
                    assert!(found.iter().all(|p| (0.0..=1.0).contains(p)));
                }
            }
        }
    }
    // without a bound that matters, every pixel goes to the end that its weight points to
    let config = AttackConfig { num_steps: 20, ..config(Norm::Linf, 1.0) };
    let found = to_rows(&run(&objective, &clean, &config).pixels).unwrap();
    for (item, found) in found.iter().enumerate() {
        assert!(found.iter().zip(&objective.weights[item]).all(|(p, w)| *p == f32::from(*w > 0.0)));
    }
}

/// A loss with many hills, so that more steps and starts find more and the last iterate is rarely the best.
struct Wavy;

impl Objective for Wavy {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        let gradient = ((pixels * 40.0)?.cos()? * 40.0)?;
        Ok((self.loss(pixels, items)?, gradient))
    }
    fn loss(&self, pixels: &Tensor, _: &[usize]) -> Result<Vec<f32>> {
        let wave = |x: &Vec<f32>| x.iter().map(|x| (40.0 * x).sin()).sum();
        Ok(to_rows(pixels)?.iter().map(wave).collect())
    }
    fn is_broken(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        Ok(self.loss(pixels, items)?.iter().map(|&loss| loss > 35.0).collect())
    }
}

#[test]
fn the_best_loss_never_falls_with_steps_restarts_or_nested_budgets() {
    let clean = images(4);
    let base = AttackConfig { step_size: Some(Fraction(0.03)), ..config(Norm::Linf, 0.06) };
    let mut before: Option<Vec<f32>> = None;
    let mut rises = |loss: Vec<f32>, what: &str| {
        if let Some(before) = &before {
            assert!(loss.iter().zip(before).all(|(now, then)| now >= then), "{what}: {before:?} {loss:?}");
        }
        before = Some(loss);
    };
    for num_steps in 0..8 {
        let found = run(&Wavy, &clean, &AttackConfig { num_steps, ..base.clone() });
        assert!(found.loss.iter().zip(&found.loss_clean).all(|(found, clean)| found >= clean));
        assert_eq!(found.loss, Wavy.loss(&found.pixels, &[0, 1, 2, 3]).unwrap());
        assert_eq!(found.steps_used, [num_steps; 4]);
        rises(found.loss, "steps");
    }
    for num_restarts in 1..5 {
        rises(
            run(&Wavy, &clean, &AttackConfig { num_restarts, num_steps: 7, ..base.clone() }).loss,
            "restarts",
        );
    }
    let (mut start, mut then, mut broken): (Option<Tensor>, _, _) = (None, vec![f32::MIN; 4], vec![false; 4]);
    for levels in 0..16 {
        let epsilon = Fraction(f64::from(levels) / 255.0);
        let config = AttackConfig { epsilon, step_size: None, early_stop: true, ..base.clone() };
        let problem = Problem {
            clean: &clean,
            items: &[0, 1, 2, 3],
            keys: &[0, 1, 2, 3],
            start: start.as_ref(),
            judge_8bit: false,
        };
        let found = pgd(&Wavy, &problem, &config, &mut |_| Ok(())).unwrap();
        assert!(found.loss.iter().zip(&then).all(|(now, then)| now >= then), "level {levels}");
        assert!(found.broken.iter().zip(&broken).all(|(now, then)| now >= then), "level {levels}");
        (then, broken, start) = (found.loss, found.broken, Some(found.pixels));
    }
    assert!(broken.iter().any(|&broken| broken));
}

#[test]
fn the_last_iterate_is_the_last_and_observers_see_every_loss() {
    let clean = images(2);
    let config = AttackConfig {
        output: PgdOutput::Last,
        step_size: Some(Fraction(0.05)),
        num_steps: 5,
        ..config(Norm::Linf, 0.06)
    };
    let mut seen: Vec<(usize, usize, Vec<f32>)> = Vec::new();
    let problem = Problem { clean: &clean, items: &[0, 1], keys: &[5, 6], start: None, judge_8bit: false };
    let found = pgd(&Wavy, &problem, &config, &mut |at| {
        assert_eq!(at.rows, [0, 1]);
        seen.push((at.restart, at.step, at.loss.to_vec()));
        Ok(())
    })
    .unwrap();
    assert_eq!(seen.iter().map(|(_, step, _)| *step).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    assert_eq!(seen[5].2, found.loss);
    assert!(seen.iter().any(|(_, _, loss)| loss[0] > found.loss[0]), "the last one is the best by chance");
    let best =
        pgd(&Wavy, &problem, &AttackConfig { output: PgdOutput::Best, ..config.clone() }, &mut |_| Ok(()));
    let highest = seen.iter().map(|(_, _, loss)| loss[0]).fold(f32::MIN, f32::max);
    assert_eq!(best.unwrap().loss[0], highest);
    // an observer's error ends the attack
    let stopped = pgd(&Wavy, &problem, &config, &mut |_| Err(Error::Stopped));
    assert!(matches!(stopped, Err(Error::Stopped)));
}

#[test]
fn batches_and_their_order_change_no_image() {
    let (clean, objective) = (images(5), linear(5, f32::MAX));
    for (norm, objective) in [(Norm::Linf, &Wavy as &dyn Objective), (Norm::L2, &objective)] {
        let orders = [vec![4, 2, 0], vec![3, 1], vec![1]];
        for (method, order) in
            EVERY.into_iter().flat_map(|method| orders.clone().map(|order| (method, order)))
        {
            let config = AttackConfig { method, num_restarts: 2, early_stop: true, ..config(norm, 0.05) };
            let whole = run(objective, &clean, &config);
            let all = to_rows(&whole.pixels).unwrap();
            let index =
                Tensor::new(order.iter().map(|&i| i as u32).collect::<Vec<u32>>(), &Device::Cpu).unwrap();
            let keys: Vec<u64> = order.iter().map(|&i| 1000 + i as u64).collect();
            let part = clean.index_select(&index, 0).unwrap();
            let problem =
                Problem { clean: &part, items: &order, keys: &keys, start: None, judge_8bit: false };
            let found = attack(objective, &problem, &config).unwrap();
            for (row, &i) in order.iter().enumerate() {
                assert_eq!(to_rows(&found.pixels).unwrap()[row], all[i]);
                assert_eq!(found.loss[row].to_bits(), whole.loss[i].to_bits());
            }
        }
    }
    // other keys or seeds are other random numbers
    let base = AttackConfig { method: Method::Noise, output: PgdOutput::Last, ..config(Norm::Linf, 0.05) };
    let one = to_rows(&run(&Wavy, &clean, &base).pixels).unwrap();
    let other = to_rows(&run(&Wavy, &clean, &AttackConfig { seed: 1, ..base }).pixels).unwrap();
    assert!(one[0] != other[0]);
}

#[test]
fn broken_items_are_left_alone_and_others_go_on() {
    let clean = images(2);
    let mut objective = linear(2, f32::MAX);
    let loss = objective.loss(&clean, &[0, 1]).unwrap();
    objective.thresholds[0] = loss[0] + 0.3;
    let config = AttackConfig { num_restarts: 3, early_stop: true, ..config(Norm::Linf, 8.0 / 255.0) };
    let found = run(&objective, &clean, &config);
    assert_eq!((found.broken.clone(), found.steps_used.clone()), (vec![true, false], vec![10, 30]));
    assert_eq!(objective.gradients.get(), 40);
    assert!(found.loss[0] > objective.thresholds[0]);
    let often = run(&objective, &clean, &AttackConfig { check_every: 2, ..config.clone() });
    assert!(
        often.broken[0] && often.steps_used[0] < 10 && often.steps_used[0] % 2 == 1,
        "{:?}",
        often.steps_used
    );
    assert!(objective.is_broken(&often.pixels, &[0, 1]).unwrap()[0]);
    assert_eq!(
        often.pixels.get(1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(),
        found.pixels.get(1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    );
    // without early stop nobody is asked
    let blind = run(&objective, &clean, &AttackConfig { early_stop: false, ..config });
    assert_eq!((blind.broken, blind.steps_used), (vec![false, false], vec![30, 30]));
}

/// Broken wherever the loss is below a threshold: the loss misleads about the answer.
struct Misleading(Linear);

impl Objective for Misleading {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        self.0.loss_and_gradient(pixels, items)
    }
    fn loss(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<f32>> {
        self.0.loss(pixels, items)
    }
    fn is_broken(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        Ok(self.0.is_broken(pixels, items)?.iter().map(|above| !above).collect())
    }
}

#[test]
fn a_wrong_answer_counts_more_than_a_high_loss() {
    let clean = images(1);
    let mut objective = Misleading(linear(1, f32::MAX));
    objective.0.thresholds[0] = objective.loss(&clean, &[0]).unwrap()[0] - 1e-3;
    let noise = AttackConfig { method: Method::Noise, num_restarts: 20, ..config(Norm::Linf, 0.03) };
    let found = run(&objective, &clean, &AttackConfig { early_stop: true, ..noise.clone() });
    assert!(found.broken[0] && found.loss[0] < found.loss_clean[0]);
    assert!(objective.is_broken(&found.pixels, &[0]).unwrap()[0]);
    let blind = run(&objective, &clean, &noise);
    assert!(!blind.broken[0] && blind.loss[0] > blind.loss_clean[0]);
}

#[test]
fn answers_are_asked_for_on_what_a_file_can_hold() {
    let clean = images(1);
    let mut objective = linear(1, f32::MAX);
    let loss = objective.loss(&clean, &[0]).unwrap()[0];
    let dual: f32 = objective.weights[0].iter().map(|w| w.abs()).sum();
    // 0.9 of a level breaks it: the float attack does, but a file has room for no level at all
    objective.thresholds[0] = loss + 0.5 * dual / 255.0;
    let config = AttackConfig { early_stop: true, ..config(Norm::Linf, 0.9 / 255.0) };
    for (judge_8bit, broken) in [(false, true), (true, false)] {
        let problem = Problem { clean: &clean, items: &[0], keys: &[0], start: None, judge_8bit };
        let found = pgd(&objective, &problem, &config, &mut |_| Ok(())).unwrap();
        assert_eq!(found.broken, [broken]);
    }
    let roomy = AttackConfig { epsilon: Fraction(1.0 / 255.0), ..config };
    let problem = Problem { clean: &clean, items: &[0], keys: &[0], start: None, judge_8bit: true };
    assert_eq!(pgd(&objective, &problem, &roomy, &mut |_| Ok(())).unwrap().broken, [true]);
}

#[test]
fn bad_numbers_and_shapes_are_errors() {
    let clean = images(2);
    let mut objective = linear(8, f32::MAX);
    objective.weights[7][3] = f32::NAN;
    let config = config(Norm::Linf, 0.03);
    let problem = Problem { clean: &clean, items: &[0, 7], keys: &[0, 1], start: None, judge_8bit: false };
    let error = pgd(&objective, &problem, &config, &mut |_| Ok(())).unwrap_err();
    assert_eq!(error.status(), crate::error::ExitStatus::NonFinite);
    assert!(error.to_string().contains("item 7"), "{error}");
    let fails =
        |problem: &Problem, config: &AttackConfig| pgd(&Wavy, problem, config, &mut |_| Ok(())).is_err();
    assert!(fails(&Problem { keys: &[0], ..problem }, &config));
    assert!(fails(&Problem { start: Some(&images(3)), ..problem }, &config));
    assert!(fails(&problem, &AttackConfig { num_restarts: 0, ..config.clone() }));
    let outside = (&clean * 3.0).unwrap();
    assert!(fails(&Problem { clean: &outside, ..problem }, &config));
    assert!(!fails(&problem, &config));
}

#[test]
fn stronger_attacks_find_more_where_the_loss_has_many_hills() {
    let clean = images(8);
    let mean = |config: &AttackConfig| run(&Wavy, &clean, config).loss.iter().sum::<f32>() / 8.0;
    for (norm, epsilon) in [(Norm::Linf, 0.06), (Norm::L2, 0.4)] {
        let of = |method, num_steps| mean(&AttackConfig { method, num_steps, ..config(norm, epsilon) });
        let (noise, fgsm, pgd) = (of(Method::Noise, 1), of(Method::Fgsm, 1), of(Method::Pgd, 10));
        let (apgd, square) = (of(Method::Apgd, 100), of(Method::Square, 300));
        // No order among the strong ones: long steps leap over hills as narrow as these.
        let weakest = noise.max(fgsm);
        assert!(noise < square && noise < fgsm, "{norm:?}: {noise} {fgsm} {square}");
        assert!(weakest < pgd && weakest < apgd, "{norm:?}: {weakest} {pgd} {apgd}");
    }
}

#[test]
fn apgd_finds_the_optimum_that_fixed_steps_only_circle() {
    let clean = images(1);
    let x = to_rows(&clean).unwrap().remove(0);
    let direction = normals("direction", 0);
    let length = Norm::L2.distance(&direction, &[0.0; LEN]);
    let target: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + (0.1 / length) as f32 * d).collect();
    let objective = Quadratic { target };
    // The optimum lies inside the ball: only ever shorter steps come close.
    let base = AttackConfig { num_steps: 100, ..config(Norm::L2, 0.5) };
    let fixed = run(&objective, &clean, &AttackConfig { step_size: Some(Fraction(0.1)), ..base.clone() });
    let adaptive = run(&objective, &clean, &AttackConfig { method: Method::Apgd, ..base });
    assert!(adaptive.loss[0] > -1e-4 && adaptive.loss[0] > 5.0 * fixed.loss[0], "{adaptive:?} {fixed:?}");
}

#[test]
fn more_steps_of_apgd_and_more_queries_never_lose_what_a_warm_start_brings() {
    let clean = images(4);
    let items = [0, 1, 2, 3];
    let first = run(&Wavy, &clean, &config(Norm::Linf, 0.05));
    for method in [Method::Pgd, Method::Apgd, Method::Square] {
        let config = AttackConfig { method, ..config(Norm::Linf, 0.05) };
        let start = Some(&first.pixels);
        let problem = Problem { clean: &clean, items: &items, keys: &[0, 1, 2, 3], start, judge_8bit: false };
        let found = attack(&Wavy, &problem, &config).unwrap();
        assert!(found.loss.iter().zip(&first.loss).all(|(now, then)| now >= then), "{method:?}");
    }
}

#[test]
fn momentum_keeps_the_direction_and_none_is_plain_pgd() {
    let (clean, objective) = (images(2), linear(2, f32::MAX));
    let base = config(Norm::L2, 0.3);
    let with = |momentum| run(&Wavy, &clean, &AttackConfig { momentum, ..base.clone() }).loss;
    assert_ne!(with(0.0), with(1.0));
    // A constant gradient keeps its direction whatever is added up.
    let along = |momentum| {
        let straight = AttackConfig { random_start: false, momentum, ..base.clone() };
        to_rows(&run(&objective, &clean, &straight).pixels).unwrap().remove(0)
    };
    assert!(Norm::Linf.distance(&along(0.0), &along(1.0)) < 1e-6);
}

#[test]
fn gradients_of_zero_are_told() {
    struct Flat;
    impl Objective for Flat {
        fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
            Ok((vec![1.0; items.len()], pixels.zeros_like()?))
        }
        fn loss(&self, _: &Tensor, items: &[usize]) -> Result<Vec<f32>> {
            Ok(vec![1.0; items.len()])
        }
        fn is_broken(&self, _: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
            Ok(vec![false; items.len()])
        }
    }
    let clean = images(2);
    for method in [Method::Pgd, Method::Apgd] {
        let config = AttackConfig { method, ..config(Norm::Linf, 0.1) };
        assert_eq!(run(&Flat, &clean, &config).zero_gradient, [true; 2]);
        assert_eq!(run(&Wavy, &clean, &config).zero_gradient, [false; 2]);
    }
}

#[test]
fn what_rounding_undoes_is_told_and_repaired_on_the_lattice() {
    let clean = images(1);
    let mut objective = linear(1, f32::MAX);
    let loss = objective.loss(&clean, &[0]).unwrap()[0];
    let epsilon = 40.0 / 255.0;
    // Spread over 60 values, an L2 budget moves most of them by a few levels: rounding costs some of the gain.
    let base = AttackConfig { early_stop: true, num_steps: 40, ..config(Norm::L2, epsilon) };
    let levels = nearest_levels(&to_rows(&clean).unwrap()[0]);
    let best = run(&objective, &clean, &AttackConfig { early_stop: false, ..base.clone() });
    let rounded = to_8bit_within_ball(&to_rows(&best.pixels).unwrap()[0], &levels, Norm::L2, epsilon);
    let at = |image: &[u8]| {
        let pixels = image.iter().map(|u| f32::from(*u) / 255.0).collect::<Vec<_>>();
        let pixels = Tensor::from_vec(pixels, clean.shape(), &Device::Cpu).unwrap();
        objective.loss(&pixels, &[0]).unwrap()[0]
    };
    let after = at(&rounded);
    assert!(after < best.loss[0]);
    let problem = Problem { clean: &clean, items: &[0], keys: &[1000], start: None, judge_8bit: true };
    let repaired = at(&lattice::ascend(&rounded, &levels, &objective.weights[0], Norm::L2, epsilon));
    let mut outcome = |threshold: f32| {
        objective.thresholds[0] = threshold;
        let found = attack(&objective, &problem, &base).unwrap();
        let image = nearest_levels(&to_rows(&found.pixels).unwrap()[0]);
        assert!(found.rounding[0] != Rounding::Repaired || is_within(&image, &levels, Norm::L2, epsilon));
        (found.broken[0], found.rounding[0])
    };
    assert_eq!(outcome(loss), (true, Rounding::Harmless));
    assert_eq!(outcome(best.loss[0] + 1.0), (false, Rounding::Harmless));
    assert!(repaired > after, "{repaired} {after}");
    assert_eq!(outcome(0.5 * (after + repaired.min(best.loss[0]))), (true, Rounding::Repaired));
    assert_eq!(outcome(best.loss[0].next_down()), (false, Rounding::Undone));
}
