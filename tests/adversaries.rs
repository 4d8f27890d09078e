//! Adversaries of training: pixel gradients against differences, losses against independent sums, and that schedules,
//! refreshed attacks and rewards leave every run repeatable.

use crate::network::check_slopes;
use crate::tiny::{Kind, Weights, assistant_of};
use crate::training::{SHORT, check_same, lines, material, run_as, run_with_kills, settings};
use candle_core::{Tensor, Var};
use safemed::attack::Objective;
use safemed::error::Result;
use safemed::model::assistant::Assistant;
use safemed::model::generate::{Completion, Prompt};
use safemed::model::sampling::SamplingConfig;
use safemed::nn::recompute::Memory;
use safemed::pixels::decode::decode_file;
use safemed::recipes::config::Command::Train;
use safemed::recipes::trades::{Branches, loss_and_gradients};
use safemed::rng;
use safemed::roles::divergence::DivergenceTarget;
use safemed::roles::expected_reward::{RewardTarget, Rewards, Tally, advantages};
use safemed::roles::policy::{self, Scoring};
use safemed::roles::target::{Aim, Target};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;

/// Questions about images of 32 x 32 pixels, with right completions of several tokens.
struct Posed {
    prompts: Vec<Prompt>,
    targets: Vec<Vec<u32>>,
    pixels: Tensor,
}

fn posed(assistant: &Assistant, count: usize) -> Posed {
    let texts = ["What is seen? A) mass B) cyst", "Which side?", "Is it there? A) yes B) no"];
    let answers = ["no.", "<answer> B</answer>", "left"];
    let grid = assistant.vlm.grid_of(32, 32);
    let prompt = |i: usize| assistant.prompt(texts[i], Some(grid)).unwrap();
    let target = |i: usize| assistant.target(answers[i]).unwrap();
    Posed {
        prompts: (0..count).map(prompt).collect(),
        targets: (0..count).map(target).collect(),
        pixels: image(count, 0),
    }
}

/// Images of values between 0.1 and 0.9.
fn image(count: usize, index: u64) -> Tensor {
    let mut values = vec![0f32; count * 3 * 32 * 32];
    rng::fill_standard_normal(&mut rng::stream(8, "adversaries", &[index]), &mut values);
    for value in &mut values {
        *value = (0.5 + 0.1 * *value).clamp(0.1, 0.9);
    }
    Tensor::from_vec(values, (count, 3, 32, 32), &candle_core::Device::Cpu).unwrap()
}

/// `pixels` with a little noise.
fn beside(pixels: &Tensor) -> Tensor {
    let mut noise = vec![0f32; pixels.elem_count()];
    rng::fill_standard_normal(&mut rng::stream(9, "beside", &[]), &mut noise);
    (pixels + (Tensor::from_vec(noise, pixels.shape(), pixels.device()).unwrap() * 0.03).unwrap()).unwrap()
}

/// Log-probabilities of the next token over the vocabulary wherever a target is predicted, in double precision.
fn distributions(assistant: &Assistant, posed: &Posed, pixels: &Tensor) -> Vec<Vec<f64>> {
    let targets: Vec<Vec<Vec<u32>>> = posed.targets.iter().map(|target| vec![target.clone()]).collect();
    let scoring = Scoring::new(assistant, &posed.prompts, &targets).unwrap();
    let features = policy::encode(assistant, &[pixels.detach()]).unwrap();
    let hidden = assistant.vlm.forward(Some(&features), &scoring.batch).unwrap();
    let rows = scoring.predicting(&hidden, 0..scoring.num_targets()).unwrap();
    let log_shares = |row: Vec<f32>| {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|value| f64::from(value - most).exp()).sum();
        row.iter().map(|value| f64::from(value - most) - sum.ln()).collect()
    };
    assistant.vlm.logits(&rows).unwrap().to_vec2::<f32>().unwrap().into_iter().map(log_shares).collect()
}

fn divergence(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}

#[test]
fn a_divergence_from_the_clean_image_has_the_gradient_of_its_differences() {
    let assistant = assistant_of(Kind::Qwen3, Weights::Loud, false);
    let posed = posed(&assistant, 3);
    for memory in [Memory::Keep, Memory::Recompute] {
        let (prompts, targets) = (&posed.prompts, &posed.targets);
        let target = DivergenceTarget::new(&assistant, prompts, targets, &posed.pixels, memory).unwrap();
        let items = [0, 1, 2];
        let (losses, gradient) = target.loss_and_gradient(&posed.pixels, &items).unwrap();
        assert_eq!(losses, [0.0; 3], "nothing differs from itself");
        let largest = gradient.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        let moved = Var::from_tensor(&beside(&posed.pixels)).unwrap();
        let (losses, gradient) = target.loss_and_gradient(moved.as_tensor(), &items).unwrap();
        let there = gradient.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(there > 0.0 && largest < 1e-3 * there, "{largest} {there}");
        let clean = distributions(&assistant, &posed, &posed.pixels);
        let sums = || -> Vec<f64> {
            let now = distributions(&assistant, &posed, moved.as_tensor());
            let mut tokens = clean.iter().zip(&now).map(|(p, q)| divergence(p, q));
            posed.targets.iter().map(|target| tokens.by_ref().take(target.len()).sum()).collect()
        };
        for (found, expected) in losses.iter().zip(sums()) {
            assert!(
                expected > 1e-3 && (f64::from(*found) / expected - 1.0).abs() < 1e-3,
                "{found} {expected}"
            );
        }
        check_slopes("divergence", &moved, &gradient, &|| sums().iter().sum());
        // Items alone, and in another order.
        let part = Tensor::cat(&[moved.narrow(0, 2, 1).unwrap(), moved.narrow(0, 0, 1).unwrap()], 0).unwrap();
        assert_eq!(target.loss(&part, &[2, 0]).unwrap(), [losses[2], losses[0]]);
    }
}

#[test]
fn trades_has_the_gradient_of_its_formula_through_both_branches() {
    let assistant = assistant_of(Kind::Qwen3, Weights::Loud, true);
    let posed = posed(&assistant, 3);
    let adversarial = beside(&posed.pixels.narrow(0, 0, 2).unwrap());
    let (clean_weight, divergence_weight) = (0.03, 60.0);
    let branches = Branches {
        prompts: &posed.prompts,
        targets: &posed.targets,
        clean: std::slice::from_ref(&posed.pixels),
        adversarial: std::slice::from_ref(&adversarial),
        clean_weight,
        divergence_weight,
    };
    let trained = assistant.vlm.parameters().trained();
    let wanted: Vec<Tensor> = trained.iter().map(|(_, var)| var.as_tensor().clone()).collect();
    // The formula, from distributions in double precision.
    let formula = || {
        let clean = distributions(&assistant, &posed, &posed.pixels);
        let ids = posed.targets.iter().flatten();
        let likelihood: f64 = clean.iter().zip(ids).map(|(row, &id)| row[id as usize]).sum();
        let first = Posed {
            prompts: posed.prompts[..2].to_vec(),
            targets: posed.targets[..2].to_vec(),
            pixels: adversarial.clone(),
        };
        let moved = distributions(&assistant, &first, &adversarial);
        let divergence: f64 = clean.iter().zip(&moved).map(|(p, q)| divergence(p, q)).sum();
        -clean_weight * likelihood + divergence_weight * divergence
    };
    for memory in [Memory::Keep, Memory::Recompute] {
        let (sums, gradients) = loss_and_gradients(&assistant, &branches, &wanted, memory).unwrap();
        assert!((sums.loss / formula() - 1.0).abs() < 1e-4, "{} {}", sums.loss, formula());
        assert!(divergence_weight * sums.divergence > 0.3 * sums.loss, "{sums:?}");
        for part in ["patch_embed", "merger", "layers.0.self_attn.k_proj", "layers.1.mlp.gate", "lm_head"] {
            let (name, var) = trained
                .iter()
                .find(|(name, _)| name.contains(part) && name.ends_with("weight") && !name.contains("norm"))
                .unwrap();
            check_slopes(name, var, gradients.get(var.as_tensor()).unwrap(), &formula);
        }
    }
}

/// Questions whose answer is to be one of `good`, sampled in `length` tokens.
fn reward_target<'a>(
    assistant: &'a Assistant,
    posed: &Posed,
    rewards: Rewards<'a>,
    (samples, length, temperature): (usize, usize, f64),
) -> RewardTarget<'a> {
    let aims = posed.prompts.iter().zip(&posed.targets);
    RewardTarget {
        likelihood: Target {
            assistant,
            aims: aims
                .map(|(prompt, target)| Aim::at_completion(prompt.clone(), [32, 32], target.clone(), 0))
                .collect(),
            answers: &|_, items| Ok(vec![None; items.len()]),
            noise: None,
            draws_at_once: 1,
            memory: Memory::Keep,
        },
        rewards,
        decoding: assistant.decoding(length, SamplingConfig::at(temperature)),
        samples,
        seed: 5,
        keys: (0..posed.prompts.len() as u64).collect(),
        keeps_flat: false,
        tally: Tally::default(),
    }
}

#[test]
fn the_score_gradient_is_the_slope_of_the_weighted_log_probabilities() {
    let assistant = assistant_of(Kind::Qwen3, Weights::Loud, false);
    let posed = posed(&assistant, 2);
    let none = |_: usize, _: &[Completion]| -> Result<Vec<f64>> { Ok(Vec::new()) };
    let temperature = 0.7;
    let target = reward_target(&assistant, &posed, &none, (3, 4, temperature));
    let sampled = target.sampled(&posed.pixels, &[0, 1], "test", &[0, 3]).unwrap();
    assert_ne!(sampled[0][0].ids, sampled[0][1].ids);
    let weights = vec![advantages(&[1.0, 0.0, 0.5]), vec![-0.4, 0.9, 2.0]];
    let moved = Var::from_tensor(&posed.pixels).unwrap();
    let gradient = target.score_gradient(moved.as_tensor(), &[0, 1], &sampled, &weights).unwrap();
    let ids: Vec<Vec<Vec<u32>>> =
        sampled.iter().map(|own| own.iter().map(|completion| completion.ids.clone()).collect()).collect();
    let scoring = Scoring::new(&assistant, &posed.prompts, &ids).unwrap();
    let sum = || {
        let features = policy::encode(&assistant, &[moved.as_tensor().detach()]).unwrap();
        let log_probs = scoring.evaluate(&assistant, Some(&features), temperature).unwrap();
        let own = |span: &std::ops::Range<usize>| -> f64 {
            log_probs[span.clone()].iter().map(|value| f64::from(*value)).sum()
        };
        let pairs = scoring.spans.iter().flatten().zip(weights.iter().flatten());
        -pairs.map(|(span, weight)| weight * own(span)).sum::<f64>() / 3.0
    };
    check_slopes("score", &moved, &gradient, &sum);
}

#[test]
fn the_sampled_gradient_is_that_of_the_expected_reward() {
    let assistant = assistant_of(Kind::Qwen3, Weights::Loud, false);
    let posed = posed(&assistant, 1);
    // One token: the expectation is a sum over the vocabulary.
    let is_good = |id: u32| id.is_multiple_of(3);
    let rewards = |_: usize, completions: &[Completion]| -> Result<Vec<f64>> {
        Ok(completions.iter().map(|c| f64::from(u8::from(is_good(c.ids[0])))).collect())
    };
    let target = reward_target(&assistant, &posed, &rewards, (1500, 1, 1.0));
    let (losses, first) = target.loss_and_gradient(&posed.pixels, &[0]).unwrap();
    let (_, second) = target.loss_and_gradient(&posed.pixels, &[0]).unwrap();
    assert_eq!(target.tally.counts(), [2, 0]);
    let one = Posed { targets: vec![posed.targets[0][..1].to_vec()], ..posed_again(&posed) };
    let expected = |pixels: &Tensor| -> f64 {
        let row = &distributions(&assistant, &one, pixels)[0];
        row.iter().enumerate().filter(|(id, _)| is_good(*id as u32)).map(|(_, log)| log.exp()).sum()
    };
    let exact = expected(&posed.pixels);
    assert!(
        exact > 0.05 && exact < 0.95 && (f64::from(-losses[0]) - exact).abs() < 0.04,
        "{losses:?} {exact}"
    );
    // Samples of their own give the direction, so that noise in one does not flatter the other.
    let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (first, second) = (flat(&first), flat(&second));
    assert_ne!(first, second, "samples are fresh at each gradient");
    let length = second.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
    let along: f64 =
        first.iter().zip(&second).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() / length;
    let moved = |by: f64| {
        let values: Vec<f32> = flat(&posed.pixels)
            .iter()
            .zip(&second)
            .map(|(pixel, g)| (f64::from(*pixel) + by * f64::from(*g) / length) as f32)
            .collect();
        expected(&Tensor::from_vec(values, posed.pixels.shape(), posed.pixels.device()).unwrap())
    };
    let slope = -(moved(0.02) - moved(-0.02)) / 0.04;
    assert!((along / slope - 1.0).abs() < 0.2, "{along} {slope}");
}

fn posed_again(posed: &Posed) -> Posed {
    Posed { prompts: posed.prompts.clone(), targets: posed.targets.clone(), pixels: posed.pixels.clone() }
}

#[test]
fn equal_rewards_fall_back_to_the_likelihood_item_by_item() {
    let assistant = assistant_of(Kind::Qwen3, Weights::Loud, false);
    let posed = posed(&assistant, 3);
    // The second item's completions are all worth the same.
    let rewards = |item: usize, completions: &[Completion]| -> Result<Vec<f64>> {
        Ok((0..completions.len()).map(|k| if item == 1 { 0.5 } else { (k % 2) as f64 }).collect())
    };
    let target = reward_target(&assistant, &posed, &rewards, (4, 2, 1.0));
    let items = [0, 1, 2];
    let (losses, gradient) = target.loss_and_gradient(&posed.pixels, &items).unwrap();
    assert_eq!(losses, [-0.5; 3]);
    assert_eq!(target.tally.counts(), [3, 1]);
    let (_, likelihood) = target.likelihood.loss_and_gradient(&posed.pixels, &items).unwrap();
    let row = |tensor: &Tensor, row: usize| {
        tensor.narrow(0, row, 1).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(row(&gradient, 1), row(&likelihood, 1));
    let sampled = target.sampled(&posed.pixels, &items, "expected_reward", &[0; 3]).unwrap();
    let weights = vec![advantages(&[0.0, 1.0, 0.0, 1.0]); 3];
    let score = target.score_gradient(&posed.pixels, &items, &sampled, &weights).unwrap();
    for item in [0, 2] {
        let (found, expected) = (row(&gradient, item), row(&score, item));
        assert!(found.iter().any(|g| *g != 0.0));
        assert_eq!(found, expected, "{item}");
    }
    // The loss is drawn with the same numbers at any pixels.
    assert_eq!(target.loss(&posed.pixels, &items).unwrap(), target.loss(&posed.pixels, &items).unwrap());
}

/// A short training by `own` settings over [`SHORT`], in a directory of its own.
fn trained(
    dir: &tempfile::TempDir,
    name: &str,
    own: &[(&str, &str)],
    threads: usize,
) -> (PathBuf, Vec<Value>) {
    let out = dir.path().join(name);
    run_as(Train, &settings(&material().loud, &out, &[&SHORT[..], own].concat()), threads).unwrap();
    let steps = lines(&out, "metrics.jsonl");
    (out, steps)
}

fn numbers(steps: &[Value], key: &str) -> Vec<f64> {
    steps.iter().map(|step| step[key].as_f64().unwrap_or_else(|| panic!("{key}: {step}"))).collect()
}

const TRADES: [(&str, &str); 4] = [
    ("train.recipe", "trades"),
    ("train.num_steps", "6"),
    ("train.noise_sigma", "0.05"),
    ("train.adversary.clean_fraction", "0.34"),
];

/// At once what an adversary can do in GRPO.
const ELABORATE: [(&str, &str); 14] = [
    ("train.recipe", "at_grpo"),
    ("train.noise_sigma", "0.1"),
    ("train.grpo.num_updates", "2"),
    ("train.grpo.kl_coef", "0.1"),
    ("train.grpo.temperature", "0.2"),
    ("train.adversary.norm", "l2"),
    ("train.adversary.num_steps_start", "1"),
    ("train.adversary.epsilon_schedule", "cosine"),
    ("train.adversary.smoothing_sigma", "0.1"),
    ("train.adversary.eot_samples", "2"),
    ("train.adversary.objective", "expected_reward"),
    ("train.adversary.expected_reward_samples", "3"),
    ("train.adversary.refresh", "each_update"),
    ("train.adversary.ramp_fraction", "1"),
];

#[test]
fn trades_logs_its_numbers_and_learns_to_say_the_same_about_attacked_images() {
    let dir = tempfile::tempdir().unwrap();
    let own = [
        ("train.recipe", "trades"),
        ("train.num_steps", "40"),
        ("train.batch_size", "6"),
        ("train.learning_rate", "0.005"),
        ("train.save_every", "0"),
        ("train.adversary.epsilon_schedule", "constant"),
    ];
    let (_, light) = trained(&dir, "light", &[&own[..], &[("train.adversary.trades_beta", "0")]].concat(), 2);
    let (_, heavy) = trained(&dir, "heavy", &own, 2);
    for key in ["loss", "grad_norm", "epsilon", "loss_clean", "loss_adversarial", "pgd_gain", "num_tokens"] {
        numbers(&heavy, key);
    }
    let (free, held) = (numbers(&light, "kl_clean_adversarial"), numbers(&heavy, "kl_clean_adversarial"));
    assert_eq!(free[0], held[0], "the first attack is on the same weights");
    assert!(free[0] > 0.0);
    let late = |values: &[f64]| values[30..].iter().sum::<f64>() / 10.0;
    assert!(late(&held) < 0.5 * late(&free), "{free:?} {held:?}");
    assert!(numbers(&light, "loss")[39] < 0.5 * numbers(&light, "loss")[0]);
    for (loss, divergence) in numbers(&heavy, "loss").iter().zip(&held) {
        assert!(*loss >= 6.0 * divergence, "{loss} {divergence}");
    }
}

#[test]
fn kills_and_threads_change_no_byte_of_any_adversary() {
    let dir = tempfile::tempdir().unwrap();
    for (name, own) in [("trades", &TRADES[..]), ("elaborate", &ELABORATE)] {
        let (whole, steps) = trained(&dir, name, own, 2);
        assert!(numbers(&steps, "grad_norm").iter().any(|norm| *norm > 0.0), "{steps:?}");
        let killed = dir.path().join(format!("{name}-killed"));
        let settings = settings(&material().loud, &killed, &[&SHORT[..], own].concat());
        // One thread, and killed behind the checkpoint of step 2.
        run_with_kills(Train, &settings, &killed, "metrics.jsonl", &[1, 3]);
        check_same(&whole, &killed);
    }
}

#[test]
fn passes_of_few_questions_attack_as_the_whole_batch() {
    let dir = tempfile::tempdir().unwrap();
    for (name, own) in [("trades", &TRADES[..]), ("elaborate", &ELABORATE)] {
        let of = |micro: &str| {
            let more = [
                ("train.batch_size", "12"),
                ("train.num_steps", "1"),
                ("train.grpo.temperature", "0.5"),
                ("train.micro_batch_size", micro),
            ];
            let (_, steps) = trained(&dir, &format!("{name}-{micro}"), &[own, &more].concat(), 2);
            ["loss", "grad_norm", "loss_clean", "loss_adversarial", "num_tokens"]
                .map(|key| steps[0][key].as_f64().unwrap())
        };
        let whole = of("12");
        assert!(whole[1] > 0.0, "{name}: {whole:?}");
        for other in [of("5"), of("1")] {
            for (whole, parts) in whole.iter().zip(other) {
                assert!((whole - parts).abs() < 2e-5 * (1e-3 + whole.abs()), "{name}: {whole} {parts}");
            }
        }
    }
}

#[test]
fn a_refreshed_attack_keeps_the_old_probabilities_of_the_image_sampled_on() {
    let dir = tempfile::tempdir().unwrap();
    let base = [
        ("train.recipe", "at_grpo"),
        ("train.num_steps", "4"),
        ("train.batch_size", "6"),
        ("train.grpo.num_updates", "3"),
        ("train.grpo.temperature", "0.2"),
        ("train.adversary.epsilon_schedule", "constant"),
        // Five of six are attacked in every step.
        ("train.adversary.clean_fraction", "0.16666"),
    ];
    let of = |name: &str, own: &[(&str, &str)]| trained(&dir, name, &[&base[..], own].concat(), 2);
    let again = ("train.adversary.refresh", "each_update");
    // Where no pixel may move, attacking again is nothing: the ratios of later updates are those of weights alone.
    let still = ("train.adversary.epsilon", "0");
    let [(once, once_steps), (each, each_steps)] =
        [of("still-once", &[still]), of("still-each", &[still, again])];
    let norms = numbers(&once_steps, "grad_norm");
    assert!(norms.iter().any(|norm| *norm > 0.0));
    assert_eq!(norms, numbers(&each_steps, "grad_norm"));
    assert_eq!(numbers(&once_steps, "loss"), numbers(&each_steps, "loss"));
    for file in ["optimizer.safetensors", "model.safetensors"] {
        let read = |out: &PathBuf| fs::read(out.join("checkpoints/step-4").join(file)).unwrap();
        assert!(read(&once) == read(&each), "{file}");
    }
    // Where no weight moves, the ratio is that of the images alone: 1 without a refresh.
    let frozen = ("train.learning_rate", "0");
    let ((_, once), (_, each)) = (of("once", &[frozen]), of("each", &[frozen, again]));
    assert_eq!(numbers(&once, "reward"), numbers(&each, "reward"), "completions are of the first image");
    let clipped = |steps: &[Value]| numbers(steps, "clip_ratio/region_mean").iter().sum::<f64>();
    assert_eq!(clipped(&once), 0.0);
    assert!(clipped(&each) > 0.0, "{each:?}");
    // Three attacks in a row climb higher than one, in the same ball.
    let gain = |steps: &[Value]| numbers(steps, "pgd_gain").iter().sum::<f64>();
    assert!(gain(&each) > 1.05 * gain(&once), "{} {}", gain(&each), gain(&once));
}

#[test]
fn a_reward_is_lowered_and_steps_grow_in_number() {
    let dir = tempfile::tempdir().unwrap();
    let own = [
        ("train.recipe", "at_grpo"),
        ("train.num_steps", "4"),
        ("train.batch_size", "12"),
        ("train.learning_rate", "0"),
        ("train.grpo.temperature", "0.5"),
        ("train.adversary.clean_fraction", "0"),
        ("train.adversary.objective", "expected_reward"),
        ("train.adversary.expected_reward_samples", "16"),
        ("train.adversary.epsilon", "24/255"),
        ("train.adversary.epsilon_schedule", "steps"),
        ("train.adversary.ramp_fraction", "1"),
        ("train.adversary.num_steps", "8"),
        ("train.adversary.num_steps_start", "0"),
    ];
    let (_, steps) = trained(&dir, "reward", &own, 2);
    assert_eq!(numbers(&steps, "attack/num_steps"), [0.0, 2.0, 4.0, 6.0]);
    assert!(steps[0]["attack/fallback_share"].is_null(), "no gradient was asked for: {}", steps[0]);
    let shares = numbers(&steps[1..], "attack/fallback_share");
    assert!(shares.iter().all(|share| (0.0..1.0).contains(share)), "{shares:?}");
    // The loss is a negative reward, so what is gained is reward lost.
    let clean = numbers(&steps, "loss_clean");
    assert!(clean.iter().all(|loss| (-2.0..=0.0).contains(loss)), "{clean:?}");
    let gains = numbers(&steps, "pgd_gain");
    assert!(gains[2] + gains[3] > 0.1, "{gains:?}");
}

#[test]
fn noise_in_the_attack_changes_what_is_attacked() {
    let dir = tempfile::tempdir().unwrap();
    for objective in ["completion", "cross_entropy"] {
        let base = [
            ("train.recipe", "at_sft"),
            ("train.num_steps", "2"),
            ("train.noise_sigma", "0.2"),
            ("train.adversary.objective", objective),
        ];
        let of = |name: &str, own: &[(&str, &str)]| {
            let (_, steps) = trained(&dir, &format!("{objective}-{name}"), &[&base[..], own].concat(), 2);
            (numbers(&steps, "loss_clean"), numbers(&steps, "pgd_gain"))
        };
        let plain = of("plain", &[]);
        let faint = of("faint", &[("train.adversary.smoothing_sigma", "1e-9")]);
        let strong = of("strong", &[("train.adversary.smoothing_sigma", "0.2")]);
        // Of next to no noise the mean is the model itself.
        assert!((plain.0[0] / faint.0[0] - 1.0).abs() < 1e-4, "{plain:?} {faint:?}");
        assert!((plain.1[0] / strong.1[0] - 1.0).abs() > 1e-2, "{plain:?} {strong:?}");
        assert!(strong.1.iter().all(|gain| *gain > 0.0), "{objective}: {strong:?}");
    }
}

#[test]
fn every_objective_is_climbed_and_each_is_a_number_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let objectives = ["completion", "finding", "answer", "margin", "dlr", "targeted"];
    let clean = objectives.map(|objective| {
        let own = [
            ("train.recipe", "at_sft"),
            ("train.target", "cot"),
            ("prompt", "phantom_cot"),
            ("train.num_steps", "1"),
            ("train.adversary.objective", objective),
            ("train.adversary.clean_fraction", "0"),
            ("train.adversary.epsilon_schedule", "constant"),
            // From the image itself and in short steps, so that the way leads up.
            ("train.adversary.random_start", "false"),
            ("train.adversary.epsilon", "2/255"),
            ("train.adversary.num_steps", "4"),
        ];
        let (_, steps) = trained(&dir, objective, &own, 2);
        let [clean, adversarial] = ["loss_clean", "loss_adversarial"].map(|key| numbers(&steps, key)[0]);
        assert!(adversarial > clean, "{objective}: {clean} {adversarial}");
        clean
    });
    for (place, loss) in clean.iter().enumerate() {
        assert!(clean[..place].iter().all(|other| (loss - other).abs() > 1e-3), "{objectives:?} {clean:?}");
    }
    // Reasoning and letter are all that a completion says.
    let [completion, finding, answer, ..] = clean;
    assert!((finding + answer - completion).abs() < 1e-3, "{clean:?}");
}

#[test]
fn an_l2_adversary_stays_in_its_ball_as_the_ball_grows() {
    let dir = tempfile::tempdir().unwrap();
    let own = [
        ("train.recipe", "at_sft"),
        ("train.num_steps", "3"),
        ("train.log_images_every", "1"),
        ("train.adversary.norm", "l2"),
        ("train.adversary.epsilon", "2"),
        ("train.adversary.ramp_fraction", "1"),
    ];
    let (out, steps) = trained(&dir, "l2", &own, 2);
    let (budgets, wanted) = (numbers(&steps, "epsilon"), [1.0f64, 1.5, 2.0]);
    assert!(budgets.iter().zip(wanted).all(|(found, wanted)| (found - wanted).abs() < 1e-9), "{budgets:?}");
    for (step, epsilon) in (1..).zip(budgets) {
        let read = |name: &str| decode_file(&out.join(format!("images/step-{step}/{name}"))).unwrap().data;
        let (clean, adversarial) = (read("clean.png"), read("adversarial.png"));
        let change = |(a, b): (&u8, &u8)| f64::from(a.abs_diff(*b)) / 255.0;
        let changes: Vec<f64> = clean.iter().zip(&adversarial).map(change).collect();
        let length = changes.iter().map(|change| change * change).sum::<f64>().sqrt();
        // Pictures have eight bits: what rounding adds is hardly longer, for it has no direction.
        assert!(length < epsilon + 0.02 && length > 0.5 * epsilon, "step {step}: {length} {epsilon}");
        // No value has a bound of its own.
        let largest = changes.iter().copied().fold(0.0, f64::max);
        assert!(largest > 8.0 / 255.0, "step {step}: {largest}");
    }
}

#[test]
fn the_reference_sees_the_image_that_is_asked_for_whether_the_tower_trains_or_not() {
    let dir = tempfile::tempdir().unwrap();
    for tower in ["true", "false"] {
        let kl = |image: &str| {
            // The policy stays its own reference: only what the two see can tell them apart.
            let own = [
                ("train.recipe", "at_grpo"),
                ("train.num_steps", "1"),
                ("train.learning_rate", "0"),
                ("train.parts.vision", tower),
                ("train.parts.merger", tower),
                ("train.grpo.kl_coef", "0.1"),
                ("train.grpo.kl_image", image),
                ("train.adversary.clean_fraction", "0"),
                ("train.adversary.epsilon_schedule", "constant"),
            ];
            let (_, steps) = trained(&dir, &format!("{image}-{tower}"), &own, 2);
            numbers(&steps, "kl")[0]
        };
        let (same, other) = (kl("adversarial"), kl("clean"));
        assert!(same.abs() < 1e-6, "{tower}: {same}");
        assert!(other > 1e-5, "{tower}: {other}");
    }
}
