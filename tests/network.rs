//! The network itself, from scratch in both architectures: every gradient, and that neighbours change no bit.

use crate::tiny::{Kind, Weights, assistant_of};
use candle_core::{D, Tensor, Var};
use rand::Rng as _;
use safemed::backend::with_threads;
use safemed::model::assistant::Assistant;
use safemed::model::generate::{Completion, Prompt};
use safemed::model::loader::{Adaptation, Precision};
use safemed::model::sampling::SamplingConfig;
use safemed::model::vlm::{Batch, Features};
use safemed::nn::attention::Layout;
use safemed::nn::recompute::{Gradients, Memory, loss_and_gradients};
use safemed::nn::rows;
use safemed::rng;
use safemed::roles::features::FeatureCache;
use safemed::roles::policy::{self, Scoring};

/// Questions of different lengths about images of different sizes: `(text, height, width)`.
const QUESTIONS: [(&str, usize, usize); 5] = [
    ("What is seen? A) mass B) cyst", 32, 32),
    ("Which?", 48, 32),
    ("Is there a lesion in the left lung? A) yes B) no C) both D) neither", 32, 64),
    ("Where?", 64, 48),
    ("What modality is this image taken with? A) CT B) MRI", 32, 32),
];

fn image(index: usize, height: usize, width: usize) -> Tensor {
    let mut stream = rng::stream(3, "image", &[index as u64]);
    let values: Vec<f32> = (0..3 * height * width).map(|_| stream.random_range(0.1..0.9)).collect();
    Tensor::from_vec(values, (1, 3, height, width), &candle_core::Device::Cpu).unwrap()
}

/// Prompts, images and a completion of five tokens for each of the questions `which`.
struct Asked {
    prompts: Vec<Prompt>,
    images: Vec<Tensor>,
    targets: Vec<Vec<Vec<u32>>>,
}

fn asked(assistant: &Assistant, which: &[usize]) -> Asked {
    let mut asked = Asked { prompts: Vec::new(), images: Vec::new(), targets: Vec::new() };
    for &index in which {
        let (text, height, width) = QUESTIONS[index];
        asked.prompts.push(assistant.prompt(text, Some(assistant.vlm.grid_of(height, width))).unwrap());
        asked.images.push(image(index, height, width));
        let target = ["no.", "it is", "<answer> B</answer>", "left", "x"][index];
        asked.targets.push(vec![assistant.target(target).unwrap()]);
    }
    asked
}

/// The summed log-likelihood of all targets, negative, with gradients of all weights and of the images.
fn backward(assistant: &Assistant, asked: &Asked, images: &[Var]) -> (f32, Gradients) {
    let inputs: Vec<Tensor> = images.iter().map(|image| image.as_tensor().clone()).collect();
    let scoring = Scoring::new(assistant, &asked.prompts, &asked.targets).unwrap();
    let plan = assistant.vlm.vision_plan(&policy::grids_of(assistant, &inputs).unwrap()).unwrap();
    let mut stages = assistant.vlm.vision_stages(&plan);
    stages.extend(scoring.stages(assistant));
    let loss = |state: &[Tensor]| scoring.log_probs(assistant, &state[0], 1.0)?.sum_all()?.neg();
    let wanted: Vec<Tensor> =
        assistant.vlm.parameters().trained().iter().map(|(_, var)| var.as_tensor().clone()).collect();
    let (loss, gradients) = loss_and_gradients(&stages, &inputs, loss, &wanted, Memory::Keep).unwrap();
    (loss.to_scalar().unwrap(), gradients)
}

/// The same loss from log-probabilities added up in double precision.
fn loss(assistant: &Assistant, asked: &Asked, images: &[Var]) -> f64 {
    let inputs: Vec<Tensor> = images.iter().map(|image| image.as_tensor().detach()).collect();
    let scoring = Scoring::new(assistant, &asked.prompts, &asked.targets).unwrap();
    let features = policy::encode(assistant, &inputs).unwrap();
    let log_probs = scoring.evaluate(assistant, Some(&features), 1.0).unwrap();
    -log_probs.iter().map(|value| f64::from(*value)).sum::<f64>()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).into_iter().map(f32::to_bits).collect()
}

/// The change of the loss along `direction` from `variable`, by central differences.
fn difference(variable: &Var, direction: &[f32], step: f64, loss: &dyn Fn() -> f64) -> f64 {
    let tensor = variable.as_tensor();
    let start = values(tensor);
    let at = |sign: f64| {
        let moved: Vec<f32> = start
            .iter()
            .zip(direction)
            .map(|(value, d)| (f64::from(*value) + sign * step * f64::from(*d)) as f32)
            .collect();
        variable.set(&Tensor::from_vec(moved, tensor.shape(), tensor.device()).unwrap()).unwrap();
        loss()
    };
    let slope = (at(1.0) - at(-1.0)) / (2.0 * step);
    variable.set(&Tensor::from_vec(start, tensor.shape(), tensor.device()).unwrap()).unwrap();
    slope
}

/// Compares a gradient with differences along directions that mix it with random ones, so that neither a wrong length
/// nor a missing part passes.
pub(crate) fn check_slopes(name: &str, variable: &Var, gradient: &Tensor, loss: &dyn Fn() -> f64) {
    let gradient = values(gradient);
    let norm = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    let length = norm(&gradient);
    for seed in 0..2 {
        let mut random = vec![0f32; gradient.len()];
        rng::fill_standard_normal(&mut rng::stream(seed, name, &[]), &mut random);
        let random_length = norm(&random);
        let direction: Vec<f32> = gradient
            .iter()
            .zip(&random)
            .map(|(g, r)| (f64::from(*g) / length + f64::from(*r) / random_length) as f32)
            .collect();
        let expected: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        // Large enough to stand out of single precision, small enough for curvature not to matter.
        let found = difference(variable, &direction, 1e-2 / length, loss);
        assert!((found - expected).abs() < 1e-2 * expected.abs(), "{name}: {found} and {expected}");
    }
}

#[test]
fn every_weight_and_pixel_gets_the_gradient_that_differences_give() {
    for kind in [Kind::Qwen3, Kind::Qwen25] {
        let assistant = assistant_of(kind, Weights::Loud, true);
        let asked = asked(&assistant, &[1, 2]);
        let images: Vec<Var> = asked.images.iter().map(|image| Var::from_tensor(image).unwrap()).collect();
        let (value, gradients) = backward(&assistant, &asked, &images);
        let now = || loss(&assistant, &asked, &images);
        assert!((f64::from(value) - now()).abs() < 1e-4 * now(), "{value} {}", now());
        let trained = assistant.vlm.parameters().trained();
        assert_eq!(trained.len(), assistant.vlm.parameters().tensors().unwrap().len());
        for (name, var) in &trained {
            let gradient = gradients.get(var.as_tensor()).unwrap_or_else(|| panic!("{kind:?} {name}: none"));
            let gradient = values(gradient);
            assert!(gradient.iter().all(|value| value.is_finite()), "{kind:?} {name}");
            assert!(gradient.iter().any(|value| *value != 0.0), "{kind:?} {name}: zero");
        }
        for (index, image) in images.iter().enumerate() {
            let gradient = gradients.get(image.as_tensor()).unwrap();
            let zeros = values(gradient).iter().filter(|value| **value == 0.0).count();
            assert_eq!(zeros, 0, "{kind:?}: pixels without a gradient");
            check_slopes(&format!("{kind:?} image {index}"), image, gradient, &now);
        }
        let some = [
            "patch_embed",
            "blocks.0.attn.qkv.weight",
            "merger",
            "layers.0.self_attn.k_proj",
            "layers.1.mlp.gate",
        ];
        for part in some {
            let (name, var) = trained
                .iter()
                .find(|(name, _)| name.contains(part) && name.ends_with("weight") && !name.contains("norm"))
                .unwrap_or_else(|| panic!("{part}"));
            check_slopes(name, var, gradients.get(var.as_tensor()).unwrap(), &now);
        }
    }
}

/// Log-probabilities of the target's tokens and pixel gradient of each question, in bits.
fn outputs(assistant: &Assistant, which: &[usize]) -> Vec<(Vec<u32>, Vec<u32>)> {
    let asked = asked(assistant, which);
    let images: Vec<Var> = asked.images.iter().map(|image| Var::from_tensor(image).unwrap()).collect();
    let (_, gradients) = backward(assistant, &asked, &images);
    let features = policy::encode(assistant, &asked.images).unwrap();
    let scoring = Scoring::new(assistant, &asked.prompts, &asked.targets).unwrap();
    let log_probs = scoring.evaluate(assistant, Some(&features), 1.0).unwrap();
    let mut all = Vec::new();
    for (spans, image) in scoring.spans.iter().zip(&images) {
        let own = log_probs[spans[0].clone()].iter().map(|value| value.to_bits()).collect();
        all.push((own, bits(gradients.get(image.as_tensor()).unwrap())));
    }
    all
}

/// The model with layers that multiply in bfloat16.
fn halved(assistant: &Assistant) -> Assistant {
    let dir = tempfile::tempdir().unwrap();
    assistant.save(dir.path()).unwrap();
    let precision = Precision::HalfProducts;
    Assistant::load_adapted(dir.path(), Adaptation::None, precision, &|_| false, assistant.vlm.device())
        .unwrap()
}

#[test]
fn products_of_bfloat16_change_logits_and_pixel_gradients_by_its_rounding_and_no_more() {
    for kind in [Kind::Qwen3, Kind::Qwen25] {
        let assistant = assistant_of(kind, Weights::Loud, false);
        let (single, half) = (outputs(&assistant, &[2]), outputs(&halved(&assistant), &[2]));
        let floats =
            |bits: &[u32]| bits.iter().map(|bits| f64::from(f32::from_bits(*bits))).collect::<Vec<_>>();
        let (a, b) = (floats(&single[0].0), floats(&half[0].0));
        assert_ne!(a, b);
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() < 0.25, "{kind:?}: log-probabilities {a} and {b}");
        }
        let (a, b) = (floats(&single[0].1), floats(&half[0].1));
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let cosine = dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt();
        assert!(
            cosine > 0.995 && b.iter().all(|value| *value != 0.0),
            "{kind:?}: pixel gradients, cosine {cosine}"
        );
    }
}

#[test]
fn neither_neighbours_nor_threads_change_a_bit_of_logits_or_pixel_gradients() {
    let models = [Kind::Qwen3, Kind::Qwen25].map(|kind| (kind, assistant_of(kind, Weights::Loud, false)));
    let in_half = models.each_ref().map(|(kind, assistant)| (*kind, halved(assistant)));
    for (kind, assistant) in models.into_iter().chain(in_half) {
        let with = |threads, which: &[usize]| {
            with_threads(Some(threads), || Ok(outputs(&assistant, which))).unwrap()
        };
        let together = with(1, &[0, 1, 2, 3, 4]);
        assert!(together == with(2, &[0, 1, 2, 3, 4]), "{kind:?}: threads");
        let reversed = with(2, &[4, 3, 2, 1, 0]);
        for index in 0..QUESTIONS.len() {
            let alone = &with(2, &[index])[0];
            assert!(together[index].0 == alone.0, "{kind:?}: log-probabilities of question {index} alone");
            assert!(together[index].1 == alone.1, "{kind:?}: pixel gradient of question {index} alone");
            assert!(together[index] == reversed[4 - index], "{kind:?}: question {index} elsewhere");
        }
        assert!(together[0].0 != together[4].0, "different questions have different log-probabilities");
    }
}

/// The best token behind a prompt, computed without a cache.
#[test]
fn rows_that_nobody_asks_for_change_no_bit_of_those_that_are() {
    for kind in [Kind::Qwen25, Kind::Qwen3] {
        let assistant = assistant_of(kind, Weights::Loud, true);
        let asked = asked(&assistant, &[0, 1, 4]);
        let scoring = Scoring::new(&assistant, &asked.prompts, &asked.targets).unwrap();
        let rows = scoring.batch.plan.last.as_ref().unwrap().rows.clone();
        assert!(2 * rows.len() < scoring.batch.input_ids.len(), "few of many: {rows:?}");
        let mut all = scoring.batch.clone();
        all.plan.last = None;
        let run = |batch: &Batch, choose: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>| {
            let images: Vec<Var> =
                asked.images.iter().map(|image| Var::from_tensor(image).unwrap()).collect();
            let inputs: Vec<Tensor> = images.iter().map(|image| image.as_tensor().clone()).collect();
            let plan = assistant.vlm.vision_plan(&policy::grids_of(&assistant, &inputs).unwrap()).unwrap();
            let mut stages = assistant.vlm.vision_stages(&plan);
            stages.extend(assistant.vlm.decoder_stages(batch));
            let loss = |state: &[Tensor]| choose(&state[0])?.sqr()?.sum_all();
            let (loss, gradients) = loss_and_gradients(&stages, &inputs, loss, &[], Memory::Keep).unwrap();
            let gradients: Vec<Vec<u32>> =
                images.iter().map(|image| bits(gradients.get(image).unwrap())).collect();
            (loss.to_scalar::<f32>().unwrap().to_bits(), gradients)
        };
        let pruned = run(&scoring.batch, &|hidden| Ok(hidden.clone()));
        assert_eq!(pruned, run(&all, &|hidden| rows::select(hidden, &rows)));
    }
}

fn best_token(assistant: &Assistant, prompt: &Prompt, image: &Tensor, suppressed: &[u32]) -> u32 {
    let features = policy::encode(assistant, std::slice::from_ref(image)).unwrap();
    let layout = Layout::causal(&[prompt.ids.len()]);
    let batch = safemed::model::vlm::Batch {
        input_ids: prompt.ids.clone(),
        image_rows: prompt.image_rows.clone(),
        plan: assistant.vlm.row_plan(&prompt.positions, layout).unwrap(),
    };
    let hidden = assistant.vlm.forward(Some(&features), &batch).unwrap();
    let last = hidden.narrow(0, prompt.ids.len() - 1, 1).unwrap();
    let mut logits = values(&assistant.vlm.logits(&last).unwrap());
    for &id in suppressed {
        logits[id as usize] = f32::NEG_INFINITY;
    }
    let logits = Tensor::new(logits, &candle_core::Device::Cpu).unwrap();
    logits.argmax(D::Minus1).unwrap().to_scalar().unwrap()
}

#[test]
fn a_cache_changes_no_greedy_token() {
    for kind in [Kind::Qwen3, Kind::Qwen25] {
        let assistant = assistant_of(kind, Weights::Loud, false);
        let asked = asked(&assistant, &[0, 1, 2, 3, 4]);
        let decoding = assistant.decoding(6, SamplingConfig::default());
        let features = policy::encode(&assistant, &asked.images).unwrap();
        let seeds = vec![0; asked.prompts.len()];
        let completions =
            policy::answers(&assistant, &asked.prompts, Some(&features), &decoding, &seeds).unwrap();
        let mut tokens = 0;
        for ((prompt, image), completion) in asked.prompts.iter().zip(&asked.images).zip(&completions) {
            let mut prompt = prompt.clone();
            for (place, &token) in completion.ids.iter().enumerate() {
                let best = best_token(&assistant, &prompt, image, &decoding.suppressed_ids);
                assert_eq!(token, best, "{kind:?}: token {place} of {completion:?}");
                let next = prompt.next_position();
                prompt.ids.push(token);
                prompt.positions.iter_mut().for_each(|axis| axis.push(next));
                tokens += 1;
            }
            let is_end = completion.ids.last().is_some_and(|id| decoding.stop_ids.contains(id));
            assert_eq!(completion.is_finished, is_end);
        }
        assert!(tokens > 10, "{kind:?}: {tokens} tokens are too few to tell");
    }
}

#[test]
fn a_group_is_what_its_members_would_be_alone() {
    let assistant = assistant_of(Kind::Qwen3, Weights::Loud, false);
    let asked = asked(&assistant, &[0, 1, 3]);
    let decoding = assistant.decoding(6, SamplingConfig::at(1.0));
    let seeds = vec![vec![1, 2, 3, 4], vec![5, 6], vec![1, 7, 8]];
    let features = policy::encode(&assistant, &asked.images).unwrap();
    let together = policy::sample(&assistant, &asked.prompts, Some(&features), &seeds, &decoding).unwrap();
    let mut different: Vec<&Completion> = Vec::new();
    for (question, group) in together.iter().enumerate() {
        for (&seed, completion) in seeds[question].iter().zip(group) {
            let features = policy::encode(&assistant, &asked.images[question..=question]).unwrap();
            let alone = policy::sample(
                &assistant,
                &asked.prompts[question..=question],
                Some(&features),
                &[vec![seed]],
                &decoding,
            )
            .unwrap();
            assert_eq!(alone[0][0], *completion, "question {question}, seed {seed}");
            if !different.contains(&completion) {
                different.push(completion);
            }
        }
    }
    assert!(different.len() > 4, "{different:?}");
}

#[test]
fn remembered_features_are_the_bytes_that_the_vision_tower_gives() {
    for kind in [Kind::Qwen3, Kind::Qwen25] {
        let assistant = assistant_of(kind, Weights::Loud, false);
        let images = asked(&assistant, &[0, 1, 2, 3, 4]).images;
        let all = policy::encode(&assistant, &images).unwrap();
        let bits_of = |features: &Features| -> Vec<Vec<u32>> {
            std::iter::once(&features.merged).chain(&features.deep).map(bits).collect()
        };
        // Room for everything, for about two images, and for none.
        for capacity in [all.bytes(), all.bytes() / 2, 0] {
            let cache = FeatureCache::new(capacity);
            for which in [&[0, 1][..], &[1, 0, 1, 2, 3], &[4], &[0, 1, 2, 3, 4], &[3, 3]] {
                let shown: Vec<Tensor> = which.iter().map(|&index| images[index].clone()).collect();
                let (ours, expected) =
                    (cache.encode(&assistant, &shown).unwrap(), policy::encode(&assistant, &shown).unwrap());
                assert!(bits_of(&ours) == bits_of(&expected), "{kind:?}: {which:?} with room for {capacity}");
            }
        }
    }
}

#[test]
fn what_is_remembered_is_not_computed_again() {
    let (assistant, other) =
        (assistant_of(Kind::Qwen3, Weights::Loud, false), assistant_of(Kind::Qwen3, Weights::Fresh, false));
    let images = asked(&assistant, &[0, 1]).images;
    let cache = FeatureCache::new(1 << 20);
    let first = cache.encode(&assistant, &images).unwrap();
    // Another model would say something else, were it asked.
    assert_eq!(bits(&cache.encode(&other, &images).unwrap().merged), bits(&first.merged));
    assert_ne!(bits(&policy::encode(&other, &images).unwrap().merged), bits(&first.merged));
}
