//! Closed forms, central differences and reference numbers of the policy losses.

use super::*;
use crate::rng;
use crate::train::test_support::{assert_close, numbers, reference};
use serde_json::Value;

const LOSS_TYPES: [LossType; 7] = [
    LossType::Grpo,
    LossType::Bnpo,
    LossType::DrGrpo,
    LossType::Dapo,
    LossType::Cispo,
    LossType::Sapo,
    LossType::Luspo,
];
const LEVELS: [ImportanceLevel; 2] = [ImportanceLevel::Token, ImportanceLevel::Sequence];

fn undivided(num_items_in_batch: usize) -> Accumulation {
    Accumulation {
        gradient_accumulation_steps: 1,
        steps_per_generation: 1,
        num_items_in_batch,
        max_completion_length: 10,
    }
}

/// Owned, packed numbers of a small batch.
struct Owned {
    lengths: Vec<usize>,
    log_probs: Vec<f64>,
    old: Vec<f64>,
    reference: Vec<f64>,
    advantages: Vec<f64>,
}

impl Owned {
    fn random(lengths: &[usize]) -> Self {
        let tokens = lengths.iter().sum();
        let draw = |purpose: &str, n: usize| {
            let mut out = vec![0f32; n];
            rng::fill_standard_normal(&mut rng::stream(3, purpose, &[]), &mut out);
            out.into_iter().map(f64::from).collect::<Vec<f64>>()
        };
        let log_probs: Vec<f64> = draw("log_probs", tokens).iter().map(|x| -x.abs() - 0.1).collect();
        let near = |noise: Vec<f64>| log_probs.iter().zip(noise).map(|(l, x)| l + 0.4 * x).collect();
        let (old, reference) = (near(draw("old", tokens)), near(draw("reference", tokens)));
        Self {
            lengths: lengths.to_vec(),
            old,
            reference,
            advantages: draw("advantages", lengths.len()),
            log_probs,
        }
    }

    fn view(&self) -> Completions<'_> {
        Completions {
            lengths: &self.lengths,
            completion_mask: None,
            log_probs: &self.log_probs,
            old_log_probs: Some(&self.old),
            ref_log_probs: Some(&self.reference),
            advantages: &self.advantages,
        }
    }
}

#[test]
fn on_policy_the_loss_is_minus_the_mean_advantage_and_the_gradient_follows_it() {
    let log_probs = [-1.0, -0.5, -2.0, -0.25];
    let batch = Completions {
        lengths: &[3, 1],
        completion_mask: None,
        log_probs: &log_probs,
        old_log_probs: None,
        ref_log_probs: None,
        advantages: &[2.0, -1.0],
    };
    for (loss_type, first, second) in [
        (LossType::Grpo, 1.0 / 6.0, 0.5),
        (LossType::Bnpo, 0.25, 0.25),
        (LossType::DrGrpo, 0.05, 0.05),
        (LossType::Dapo, 0.25, 0.25),
    ] {
        let config = GrpoConfig { loss_type, ..GrpoConfig::default() };
        let got = grpo_loss(&batch, &config, &undivided(4)).unwrap();
        assert_close(&[got.loss], &[-2.0 * 3.0 * first + second], 1e-15, "loss");
        let want = [-2.0 * first, -2.0 * first, -2.0 * first, second];
        assert_close(&got.d_log_probs, &want, 1e-15, "gradient");
        assert_eq!((got.stats.num_ratios, got.stats.clip_region_mean, got.stats.kl), (4, 0.0, None));
    }
}

#[test]
fn the_clip_stops_only_what_moves_on_in_the_rewarded_direction() {
    let config = GrpoConfig { clip_high: 0.3, delta: Some(3.0), ..GrpoConfig::default() };
    // (ratio, advantage, loss, gradient by the log-probability, clipped low, clipped high)
    for (ratio, advantage, loss, gradient, low, high) in [
        (2.0, 1.0, -1.3, 0.0, 0.0, 1.0),
        (0.5, 1.0, -0.5, -0.5, 0.0, 0.0),
        (0.5, -1.0, 0.8, 0.0, 1.0, 0.0),
        (2.0, -1.0, 2.0, 2.0, 0.0, 0.0),
        (4.0, -1.0, 3.0, 0.0, 0.0, 0.0),
        (1.1, 2.0, -2.2, -2.2, 0.0, 0.0),
    ] {
        let batch = Completions {
            lengths: &[1],
            completion_mask: None,
            log_probs: &[f64::ln(ratio) - 3.0],
            old_log_probs: Some(&[-3.0]),
            ref_log_probs: None,
            advantages: &[advantage],
        };
        for importance_level in LEVELS {
            let config = GrpoConfig { importance_level, ..config.clone() };
            let got = grpo_loss(&batch, &config, &undivided(1)).unwrap();
            assert_close(&[got.loss, got.d_log_probs[0]], &[loss, gradient], 1e-14, &format!("{ratio}"));
            assert_eq!(
                (got.stats.clip_low_mean, got.stats.clip_high_mean),
                (low, high),
                "{ratio} {advantage}"
            );
            assert_eq!(got.stats.clip_region_mean, low + high);
        }
    }
}

#[test]
fn the_divergence_is_zero_at_the_reference_and_the_closed_form_elsewhere() {
    let config = GrpoConfig { kl_coef: 0.5, ..GrpoConfig::default() };
    let batch = Completions {
        lengths: &[2],
        completion_mask: None,
        log_probs: &[-1.0, -2.0],
        old_log_probs: None,
        ref_log_probs: Some(&[-1.0, -2.0 + 2f64.ln()]),
        advantages: &[0.0],
    };
    let got = grpo_loss(&batch, &config, &undivided(2)).unwrap();
    let kl = (2.0 - 2f64.ln() - 1.0) / 2.0;
    assert_close(&[got.stats.kl.unwrap(), got.loss], &[kl, 0.5 * kl], 1e-15, "kl");
    assert_close(&got.d_log_probs, &[0.0, -0.25], 1e-15, "gradient"); // 0.5/2 · (1 − 2)
    assert!(grpo_loss(&Completions { ref_log_probs: None, ..batch }, &config, &undivided(2)).is_err());
}

#[test]
fn gradients_equal_central_differences() {
    let owned = Owned::random(&[4, 1, 3, 2]);
    let accumulation =
        Accumulation { gradient_accumulation_steps: 2, steps_per_generation: 6, ..undivided(31) };
    let base = GrpoConfig { clip_high: 0.28, delta: Some(1.6), ..GrpoConfig::default() };
    for loss_type in LOSS_TYPES {
        // a capped ratio is a constant weight in `cispo`: its gradient is no derivative, see the closed form below
        if loss_type == LossType::Cispo {
            continue;
        }
        for importance_level in LEVELS {
            for (kl_coef, kl_bias_correction) in [(0.0, false), (0.3, false), (0.3, true)] {
                let config =
                    GrpoConfig { loss_type, importance_level, kl_coef, kl_bias_correction, ..base.clone() };
                let got = grpo_loss(&owned.view(), &config, &accumulation).unwrap();
                let numeric: Vec<f64> = (0..owned.log_probs.len())
                    .map(|t| {
                        let at = |shift: f64| {
                            let mut log_probs = owned.log_probs.clone();
                            log_probs[t] += shift;
                            let view = Completions { log_probs: &log_probs, ..owned.view() };
                            grpo_loss(&view, &config, &accumulation).unwrap().loss
                        };
                        (at(1e-6) - at(-1e-6)) / 2e-6
                    })
                    .collect();
                assert_close(&got.d_log_probs, &numeric, 1e-8, &format!("{config:?}"));
                assert!(numeric.iter().any(|d| d.abs() > 1e-4));
            }
        }
    }
}

#[test]
fn cispo_weighs_log_probabilities_by_a_capped_constant() {
    let config = GrpoConfig { loss_type: LossType::Cispo, clip_high: 5.0, ..GrpoConfig::default() };
    let batch = Completions {
        lengths: &[2],
        completion_mask: None,
        log_probs: &[-1.0, -1.0],
        old_log_probs: Some(&[-1.0 - 2f64.ln(), -1.0 - 7f64.ln()]),
        ref_log_probs: None,
        advantages: &[3.0],
    };
    let got = grpo_loss(&batch, &config, &undivided(2)).unwrap();
    assert_close(&got.d_log_probs, &[-3.0, -7.5], 1e-14, "gradient");
    assert_close(&[got.loss, got.stats.clip_high_mean], &[10.5, 0.5], 1e-14, "loss");
}

#[test]
fn cutting_the_batch_into_micro_batches_changes_no_gradient() {
    let owned = Owned::random(&[4, 1, 3, 2, 5, 2, 6, 1]);
    let all: usize = owned.lengths.iter().sum();
    for loss_type in LOSS_TYPES {
        if loss_type == LossType::Bnpo {
            continue; // averages over its micro-batch by definition
        }
        for importance_level in LEVELS {
            let config = GrpoConfig { loss_type, importance_level, kl_coef: 0.1, ..GrpoConfig::default() };
            let whole = grpo_loss(&owned.view(), &config, &undivided(all)).unwrap();
            for pieces in [2, 4, 8] {
                let accumulation = Accumulation {
                    gradient_accumulation_steps: pieces,
                    steps_per_generation: pieces,
                    ..undivided(all)
                };
                let (mut loss, mut gradient, mut start) = (0.0, Vec::new(), 0);
                for rows in (0..8).collect::<Vec<usize>>().chunks(8 / pieces) {
                    let lengths = &owned.lengths[rows[0]..=rows[rows.len() - 1]];
                    let tokens = start..start + lengths.iter().sum::<usize>();
                    start = tokens.end;
                    let view = Completions {
                        lengths,
                        completion_mask: None,
                        log_probs: &owned.log_probs[tokens.clone()],
                        old_log_probs: Some(&owned.old[tokens.clone()]),
                        ref_log_probs: Some(&owned.reference[tokens]),
                        advantages: &owned.advantages[rows[0]..=rows[rows.len() - 1]],
                    };
                    let part = grpo_loss(&view, &config, &accumulation).unwrap();
                    loss += part.loss;
                    gradient.extend(part.d_log_probs);
                }
                assert_close(&[loss], &[whole.loss], 1e-14, "loss");
                assert_close(&gradient, &whole.d_log_probs, 1e-14, "gradient");
            }
        }
    }
}

#[test]
fn masked_tokens_count_for_nothing_whatever_they_hold() {
    let kept = Owned::random(&[2, 1]);
    let nan = f64::NAN;
    let spread = |v: &[f64]| vec![v[0], nan, v[1], v[2], nan, nan];
    let (log_probs, old, reference) = (spread(&kept.log_probs), spread(&kept.old), spread(&kept.reference));
    let masked = Completions {
        lengths: &[3, 1, 2],
        completion_mask: Some(&[true, false, true, true, false, false]),
        log_probs: &log_probs,
        old_log_probs: Some(&old),
        ref_log_probs: Some(&reference),
        advantages: &[kept.advantages[0], kept.advantages[1], 4.0],
    };
    let config = GrpoConfig { loss_type: LossType::Dapo, kl_coef: 0.1, ..GrpoConfig::default() };
    for importance_level in LEVELS {
        let config = GrpoConfig { importance_level, ..config.clone() };
        let want = grpo_loss(&kept.view(), &config, &undivided(3)).unwrap();
        let got = grpo_loss(&masked, &config, &undivided(3)).unwrap();
        assert_eq!((got.loss, got.stats), (want.loss, want.stats));
        let d = &want.d_log_probs;
        assert_eq!(got.d_log_probs, [d[0], 0.0, d[1], d[2], 0.0, 0.0]);
    }
    let nothing = Completions { completion_mask: Some(&[false; 6]), ..masked };
    let got = grpo_loss(&nothing, &config, &undivided(0)).unwrap_err();
    assert!(got.to_string().contains("zero"), "{got}");
    let grpo = GrpoConfig::default();
    assert_eq!(grpo_loss(&nothing, &grpo, &undivided(0)).unwrap().loss, 0.0);
}

#[test]
fn a_loss_that_is_not_finite_names_its_completion_and_wrong_settings_are_refused() {
    let mut owned = Owned::random(&[2, 2]);
    owned.log_probs[3] = 900.0;
    owned.advantages[1] = -1.0; // a positive one would be clipped
    let hurt = grpo_loss(&owned.view(), &GrpoConfig::default(), &undivided(4)).unwrap_err();
    assert_eq!(hurt.status(), crate::error::ExitStatus::NonFinite);
    assert!(hurt.to_string().contains("completion 1 of 2"), "{hurt}");
    assert!(GrpoConfig::default().check().is_empty());
    let bad = GrpoConfig {
        clip_low: 1.5,
        clip_high: -0.1,
        kl_coef: f64::NAN,
        delta: Some(0.5),
        ..GrpoConfig::default()
    };
    assert_eq!(bad.check().len(), 4);
    assert!(bad.check().iter().all(|error| error.help.is_some()), "{:?}", bad.check());
    assert_eq!(GrpoConfig { loss_type: LossType::Luspo, ..GrpoConfig::default() }.check().len(), 1);
}

/// Rows of a padded [b, t] table, and the same packed.
struct Padded {
    lengths: Vec<usize>,
    width: usize,
}

impl Padded {
    fn new(mask: &Value) -> Self {
        let rows = mask.as_array().unwrap();
        let lengths = rows.iter().map(|row| numbers(row).iter().filter(|&&m| m != 0.0).count()).collect();
        Self { lengths, width: rows[0].as_array().unwrap().len() }
    }

    fn pack(&self, table: &Value) -> Vec<f64> {
        let flat = numbers(table);
        let row = |(i, &n): (usize, &usize)| flat[i * self.width..i * self.width + n].to_vec();
        self.lengths.iter().enumerate().flat_map(row).collect()
    }
}

#[test]
fn equal_to_the_reference_trainer() {
    let Some(fixture) = reference("fixtures/grpo.json") else { return };
    let table = &fixture["loss"];
    let padded = Padded::new(&table["completion_mask"]);
    let log_probs = padded.pack(&table["per_token_logps"]);
    let old = padded.pack(&table["old_per_token_logps"]);
    let references = padded.pack(&table["ref_per_token_logps"]);
    let advantages = numbers(&table["advantages"]);
    for case in table["cases"].as_array().unwrap() {
        let count = |key: &str| case[key].as_u64().unwrap() as usize;
        let config = GrpoConfig {
            loss_type: serde_json::from_value(case["loss_type"].clone()).unwrap(),
            importance_level: serde_json::from_value(case["importance_sampling_level"].clone()).unwrap(),
            clip_low: case["epsilon"].as_f64().unwrap(),
            clip_high: case["epsilon_high"].as_f64().unwrap(),
            delta: None,
            kl_coef: case["beta"].as_f64().unwrap(),
            kl_bias_correction: case["use_bias_correction_kl"].as_bool().unwrap(),
        };
        let batch = Completions {
            lengths: &padded.lengths,
            completion_mask: None,
            log_probs: &log_probs,
            old_log_probs: case["uses_old_logps"].as_bool().unwrap().then_some(&old[..]),
            ref_log_probs: Some(&references),
            advantages: &advantages,
        };
        let accumulation = Accumulation {
            gradient_accumulation_steps: count("gradient_accumulation_steps"),
            steps_per_generation: count("steps_per_generation"),
            num_items_in_batch: count("num_items_in_batch"),
            max_completion_length: count("max_completion_length"),
        };
        let got = grpo_loss(&batch, &config, &accumulation).unwrap();
        let name = format!("{config:?} {accumulation:?}");
        assert_close(&[got.loss], &[case["loss"].as_f64().unwrap()], 1e-6, &name);
        assert_close(&got.d_log_probs, &padded.pack(&case["grad_logps"]), 1e-6, &name);
        let stats = &got.stats;
        for (key, value) in [
            ("kl", stats.kl),
            ("clip_ratio/low_mean", Some(stats.clip_low_mean)),
            ("clip_ratio/low_min", Some(stats.clip_low_min)),
            ("clip_ratio/high_mean", Some(stats.clip_high_mean)),
            ("clip_ratio/high_max", Some(stats.clip_high_max)),
            ("clip_ratio/region_mean", Some(stats.clip_region_mean)),
        ] {
            let want = case["metrics"][key].as_f64();
            assert_eq!(want.is_some(), value.is_some(), "{key} {name}");
            assert_close(&[value.unwrap_or(0.0)], &[want.unwrap_or(0.0)], 1e-6, key);
        }
    }
}

#[test]
fn equal_to_the_golden_vectors() {
    let Some(golden) = reference("grpo_golden.json") else { return };
    let padded = Padded::new(&golden["mask"]);
    let log_probs = padded.pack(&golden["logps"]);
    let old = padded.pack(&golden["old_logps"]);
    let references = padded.pack(&golden["ref_logps"]);
    let advantages = numbers(&golden["advantages"]["group"]);
    let mut seen = 0;
    for case in golden["cases"].as_array().unwrap() {
        let loss_type: LossType = serde_json::from_value(case["loss_type"].clone()).unwrap();
        let high = if loss_type == LossType::Cispo { "cispo_epsilon_high" } else { "epsilon_high" };
        let config = GrpoConfig {
            loss_type,
            importance_level: serde_json::from_value(case["level"].clone()).unwrap(),
            clip_low: golden["epsilon"].as_f64().unwrap(),
            clip_high: golden[high].as_f64().unwrap(),
            delta: case["delta"].as_f64(),
            kl_coef: case["beta"].as_f64().unwrap(),
            kl_bias_correction: false,
        };
        let batch = Completions {
            lengths: &padded.lengths,
            completion_mask: None,
            log_probs: &log_probs,
            old_log_probs: (!case["on_policy"].as_bool().unwrap()).then_some(&old[..]),
            ref_log_probs: Some(&references),
            advantages: &advantages,
        };
        let tokens = padded.lengths.iter().sum();
        let accumulation = Accumulation { max_completion_length: 8, ..undivided(tokens) };
        let got = grpo_loss(&batch, &config, &accumulation).unwrap();
        let name = format!("{config:?}");
        assert_close(&[got.loss], &[case["loss"].as_f64().unwrap()], 1e-9, &name);
        assert_close(&got.d_log_probs, &padded.pack(&case["grad"]), 1e-6, &name);
        if loss_type == LossType::Grpo
            && config.importance_level == ImportanceLevel::Token
            && config.kl_coef > 0.0
            && batch.old_log_probs.is_some()
        {
            let (stats, metrics) = (got.stats, &golden["metrics"]);
            for (key, value) in [
                ("kl", stats.kl.unwrap()),
                ("clip_ratio/low_mean", stats.clip_low_mean),
                ("clip_ratio/low_min", stats.clip_low_min),
                ("clip_ratio/high_mean", stats.clip_high_mean),
                ("clip_ratio/high_max", stats.clip_high_max),
                ("clip_ratio/region_mean", stats.clip_region_mean),
            ] {
                assert_close(&[value], &[metrics[key].as_f64().unwrap()], 1e-9, key);
            }
            seen += 1;
        }
    }
    assert!(seen > 0, "no case had the metrics");
}

#[test]
fn shares_of_passes_are_those_of_the_whole_batch_with_what_was_left_out() {
    // A clipped completion of one token and a free one of three, ratios of tokens and of sequences; a third of two tokens whose
    // advantage is zero.
    let ratio = |ratio: f64, length: usize| vec![ratio.ln(); length];
    let (first, second, third) = (ratio(2.0, 1), ratio(1.05, 3), ratio(1.0, 2));
    for (importance_level, high, kept) in
        [(ImportanceLevel::Token, 1.0 / 6.0, 4), (ImportanceLevel::Sequence, 1.0 / 3.0, 2)]
    {
        let config = GrpoConfig { importance_level, kl_coef: 0.1, ..GrpoConfig::default() };
        let stats = |parts: &[(&[f64], f64)]| {
            let log_probs: Vec<f64> = parts.iter().flat_map(|(values, _)| values.to_vec()).collect();
            let lengths: Vec<usize> = parts.iter().map(|(values, _)| values.len()).collect();
            let advantages: Vec<f64> = parts.iter().map(|(_, advantage)| *advantage).collect();
            let zeros = vec![0.0; log_probs.len()];
            let batch = Completions {
                lengths: &lengths,
                completion_mask: None,
                log_probs: &log_probs,
                old_log_probs: Some(&zeros),
                ref_log_probs: Some(&zeros),
                advantages: &advantages,
            };
            grpo_loss(&batch, &config, &undivided(log_probs.len())).unwrap().stats
        };
        let whole = stats(&[(&first, 1.0), (&second, 1.0), (&third, 0.0)]);
        assert_close(&[whole.clip_high_mean, whole.clip_high_max], &[high, 1.0], 1e-15, "whole");
        let parts = [stats(&[(&first, 1.0)]), stats(&[(&second, 1.0)])];
        let joined = GrpoStats::joined(&parts);
        assert_eq!((joined.num_ratios, joined.num_tokens), (kept, 4));
        let idle = if importance_level == ImportanceLevel::Token { 2 } else { 1 };
        let all = GrpoStats::joined(&[parts[0], parts[1], GrpoStats::of_idle(idle)]);
        for (found, wanted) in [
            (all.clip_high_mean, whole.clip_high_mean),
            (all.clip_region_mean, whole.clip_region_mean),
            (all.clip_high_max, whole.clip_high_max),
            (all.clip_low_min, whole.clip_low_min),
            (all.kl.unwrap(), joined.kl.unwrap()),
        ] {
            assert_close(&[found], &[wanted], 1e-15, "joined");
        }
        assert_eq!(GrpoStats::joined(&[GrpoStats::of_idle(3)]).kl, None);
    }
}
