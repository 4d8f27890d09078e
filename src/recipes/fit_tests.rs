//! Updates of a few numbers with names, by closed forms.

use super::*;
use crate::nn::recompute::{Memory, loss_and_gradients};
use crate::recipes::scratch::Scratch;

/// Variables and nothing else.
struct Toy(Vec<(String, Var)>);

impl Toy {
    fn of(entries: &[(&str, &[f32])]) -> Self {
        let var = |values: &[f32]| Var::from_slice(values, values.len(), &Device::Cpu).unwrap();
        Self(entries.iter().map(|(name, values)| ((*name).to_owned(), var(values))).collect())
    }
}

impl Learner for Toy {
    fn trained(&self) -> Vec<(String, Var)> {
        self.0.clone()
    }

    fn save(&self, dir: &Path) -> Result<()> {
        fs::create_dir_all(dir).map_err(|error| Error::io("cannot create", dir, error))?;
        let tensors: Vec<(String, Tensor)> =
            self.0.iter().map(|(name, var)| (name.clone(), var.as_tensor().detach())).collect();
        weights::save_file(&dir.join("toy.safetensors"), &tensors, &[])
    }

    fn open(&self, dir: &Path) -> Result<Saved> {
        Ok(Saved::Tensors { file: TensorFile::open(&dir.join("toy.safetensors"))?, root: "" })
    }

    fn saved_bytes(&self) -> u64 {
        self.0.iter().map(|(_, var)| 4 * var.as_tensor().elem_count() as u64).sum()
    }
}

/// Gradients of these values, in the order of the variables; none where there is none.
fn gradients(fit: &Fit<Toy>, slopes: &[Option<&[f32]>]) -> Gradients {
    let loss = |_: &[Tensor]| {
        let mut sum = Tensor::new(0f32, &Device::Cpu)?;
        for ((_, var), slopes) in fit.parameters.iter().zip(slopes) {
            if let Some(slopes) = slopes {
                sum = (sum + (var.as_tensor() * Tensor::new(*slopes, &Device::Cpu)?)?.sum_all()?)?;
            }
        }
        Ok(sum)
    };
    loss_and_gradients(&[], &[], loss, &fit.wanted(), Memory::Keep).unwrap().1
}

fn config() -> TrainConfig {
    TrainConfig {
        learning_rate: 0.1,
        schedule: ScheduleName::Constant,
        max_grad_norm: 0.0,
        ..TrainConfig::default()
    }
}

fn held(fit: &Fit<Toy>) -> Vec<Vec<f32>> {
    fit.parameters.iter().map(|(_, var)| floats(var).unwrap()).collect()
}

#[test]
fn each_tensor_moves_by_the_rate_of_its_part_and_decays_if_it_is_no_bias_and_no_norm() {
    let text = "model.language_model.layers.0";
    // Adam's first step is the learning rate against the gradient's sign, whatever its size; before it, decay takes
    // learning rate x weight decay of the weight, which is 1.
    let cases = [
        ("model.visual.blocks.0.attn.qkv.weight".to_owned(), 0.2, true),
        ("model.visual.blocks.0.attn.qkv.bias".to_owned(), 0.2, false),
        ("model.visual.blocks.0.norm1.weight".to_owned(), 0.2, false),
        ("model.visual.blocks.0.attn.qkv.lora_B.weight".to_owned(), 0.8, true),
        ("model.visual.merger.mlp.0.bias".to_owned(), 0.3, false),
        ("model.visual.merger.ln_q.weight".to_owned(), 0.3, false),
        ("model.visual.deepstack_merger_list.0.linear_fc1.weight".to_owned(), 0.3, true),
        (format!("{text}.self_attn.q_proj.lora_A.weight"), 0.1, true),
        (format!("{text}.self_attn.q_proj.lora_B.weight"), 0.4, true),
        (format!("{text}.self_attn.q_norm.weight"), 0.1, false),
        (format!("{text}.post_attention_layernorm.weight"), 0.1, false),
        ("model.language_model.norm.weight".to_owned(), 0.1, false),
        ("lm_head.weight".to_owned(), 0.1, true),
    ];
    for all_decay in [false, true] {
        let entries: Vec<(&str, &[f32])> =
            cases.iter().map(|(name, ..)| (name.as_str(), &[1f32][..])).collect();
        let mut fit = Fit::new(Toy::of(&entries)).unwrap();
        let mut config = TrainConfig {
            weight_decay: 0.5,
            weight_decay_norms: all_decay,
            lora_plus_ratio: 4.0,
            ..config()
        };
        (config.learning_rates.vision, config.learning_rates.merger) = (Some(0.2), Some(0.3));
        let slopes = vec![Some(&[5f32][..]); cases.len()];
        let gradients = gradients(&fit, &slopes);
        let update = fit.update(&gradients, &config).unwrap();
        assert_eq!(update.learning_rate, 0.1, "the base rate is what is logged");
        for ((name, rate, decays), found) in cases.iter().zip(held(&fit)) {
            let decay = if *decays || all_decay { 0.5 * rate } else { 0.0 };
            assert!((f64::from(found[0]) - (1.0 - decay - rate)).abs() < 1e-5, "{name}: {found:?}");
        }
    }
}

#[test]
fn rates_of_parts_follow_the_schedule() {
    let mut config = TrainConfig { schedule: ScheduleName::Linear, num_steps: 10, ..config() };
    config.learning_rates.text = Some(0.4);
    assert_eq!(learning_rate_at(&config, 5), 0.05);
    assert_eq!(group_rate_at(&config, "lm_head.weight", 5), 0.2);
    assert_eq!(group_rate_at(&config, "model.visual.blocks.0.attn.qkv.weight", 5), 0.05);
}

#[test]
fn the_average_is_the_closed_form_and_goes_on_from_a_checkpoint_to_the_same_bytes() {
    let start: [(&str, &[f32]); 2] = [("a", &[1.0, -2.0]), ("b", &[0.5])];
    let step = |fit: &mut Fit<Toy>, at: u64| {
        let own = [0.3 + at as f32, -1.0];
        // The second tensor has a gradient in some steps only.
        let slopes = [Some(&own[..]), at.is_multiple_of(2).then_some(&[2f32][..])];
        let gradients = gradients(fit, &slopes);
        fit.update(&gradients, &config()).unwrap();
        fit.step += 1;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut fit = Fit::new(Toy::of(&start)).unwrap().averaged(Some(0.75)).unwrap();
    let mut expected: Vec<Vec<f64>> =
        start.iter().map(|(_, values)| values.iter().map(|v| f64::from(*v)).collect()).collect();
    for at in 0..3 {
        step(&mut fit, at);
        for (average, now) in expected.iter_mut().zip(held(&fit)) {
            for (average, now) in average.iter_mut().zip(now) {
                *average = 0.75 * *average + 0.25 * f64::from(now);
            }
        }
    }
    let before = held(&fit);
    let saved = fit.save(dir.path()).unwrap();
    assert_eq!(held(&fit), before, "saving the average leaves the weights as they are");
    let file = |name: &str| TensorFile::open(&saved.join(name).join("toy.safetensors")).unwrap();
    for (i, name) in ["a", "b"].into_iter().enumerate() {
        assert_eq!(file("").floats(name).unwrap(), before[i]);
        for (found, expected) in file("ema").floats(name).unwrap().iter().zip(&expected[i]) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{name}: {found} {expected}");
            assert!((f64::from(*found) - f64::from(before[i][0])).abs() > 1e-2, "{name}: it lags behind");
        }
    }
    let mut resumed = Fit::new(Toy::of(&start)).unwrap().averaged(Some(0.75)).unwrap();
    assert!(resumed.resume(dir.path()).unwrap());
    for fit in [&mut fit, &mut resumed] {
        step(fit, 3);
    }
    let paths = [("whole", &fit), ("resumed", &resumed)].map(|(name, fit)| {
        let saved = fit.save(&dir.path().join(name)).unwrap();
        ["toy.safetensors", "ema/toy.safetensors", "optimizer.safetensors"]
            .map(|file| fs::read(saved.join(file)).unwrap())
    });
    assert!(paths[0] == paths[1]);
    // Without an average the checkpoint is as it always was, and a run that keeps one does not take it up.
    let plain = dir.path().join("plain");
    let saved = Fit::new(Toy::of(&start)).unwrap().save(&plain).unwrap();
    assert!(!saved.join("ema").exists());
    assert!(Fit::new(Toy::of(&start)).unwrap().resume(&plain).unwrap());
    let error = Fit::new(Toy::of(&start)).unwrap().averaged(Some(0.75)).unwrap().resume(&plain).unwrap_err();
    assert!(error.to_string().contains("ema"), "{error}");
}

#[test]
fn tensors_that_never_learn_are_named_and_an_adapter_that_begins_is_not() {
    let layer = |half: &str| format!("model.visual.blocks.0.attn.qkv.lora_{half}.weight");
    let (a, b) = (layer("A"), layer("B"));
    let entries: [(&str, &[f32]); 5] =
        [(&a, &[0.1]), (&b, &[0.0]), ("left", &[1.0]), ("still", &[1.0]), ("moves", &[1.0])];
    let slopes: [Option<&[f32]>; 5] = [Some(&[0.0]), Some(&[1.0]), None, Some(&[0.0]), Some(&[1.0])];
    let update = |fit: &mut Fit<Toy>, slopes: &[Option<&[f32]>], config: &TrainConfig| {
        let gradients = gradients(fit, slopes);
        fit.update(&gradients, config)
    };
    let mut fit = Fit::new(Toy::of(&entries)).unwrap();
    // A reference that is the policy: nothing moves, and nothing is learnt about what could.
    let zero: [Option<&[f32]>; 5] = [Some(&[0.0]); 5];
    update(&mut fit, &zero, &config()).unwrap();
    assert_eq!(fit.take_warning(), None);
    update(&mut fit, &slopes, &config()).unwrap();
    let warning = fit.take_warning().unwrap();
    assert_eq!(
        warning,
        "1 of 5 trained tensors got no gradient in the first update: `left`; 1 of 5 trained tensors got a gradient of zero in the first update: `still`"
    );
    // Said once.
    update(&mut fit, &slopes, &config()).unwrap();
    assert_eq!(fit.take_warning(), None);

    // The A of an adapter that has learnt something has no excuse; captions are one for the vision tower.
    let mut learnt = entries;
    learnt[1].1 = &[0.5];
    let captions = TrainConfig { captions: true, ..config() };
    let unseen: [Option<&[f32]>; 5] = [None, None, Some(&[1.0]), Some(&[1.0]), Some(&[1.0])];
    for (slopes, config, words) in
        [(&slopes, config(), "2 of 5 trained tensors got a gradient of zero"), (&unseen, config(), "2 of 5")]
    {
        let mut fit = Fit::new(Toy::of(&learnt)).unwrap();
        update(&mut fit, slopes, &config).unwrap();
        assert!(fit.take_warning().unwrap().contains(words));
    }
    let mut fit = Fit::new(Toy::of(&learnt)).unwrap();
    update(&mut fit, &unseen, &captions).unwrap();
    assert_eq!(fit.take_warning(), None);

    let mut fit = Fit::new(Toy::of(&entries)).unwrap();
    let error = update(&mut fit, &[None; 5], &config()).unwrap_err();
    assert!(error.to_string().contains("none of the 5 trained tensors"), "{error}");
}

#[test]
fn the_bytes_of_a_checkpoint_are_counted_before_it_is_written() {
    let blind = |name: &str| !name.starts_with(train::VISION);
    for (ema_decay, follows) in [(None, false), (Some(0.9), false), (None, true), (Some(0.9), true)] {
        let assistant = Scratch::tiny().build(&[], &[], 0, &blind, &Device::Cpu).unwrap();
        let reference = assistant.frozen_copy().unwrap();
        let student =
            Student::new(assistant, None).unwrap().with_reference(Some(reference), follows).unwrap();
        let fit = Fit::new(student).unwrap().averaged(ema_decay).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let saved = fit.save(dir.path()).unwrap();
        let files = [saved.join("ema"), saved].into_iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten();
        let lengths = files.map(|entry| entry.unwrap()).filter_map(|entry| {
            let is_weights = entry.path().extension().is_some_and(|extension| extension == "safetensors");
            is_weights.then(|| entry.metadata().unwrap().len())
        });
        let (written, counted) = (lengths.sum::<u64>(), fit.checkpoint_bytes());
        let share = written as f64 / counted as f64;
        // Headers come on top.
        assert!((1.0..1.02).contains(&share), "{ema_decay:?} {follows}: {written} bytes, counted {counted}");
    }
}

#[test]
fn a_gradient_of_zero_goes_on_with_what_the_optimiser_remembers() {
    let mut fit = Fit::new(Toy::of(&[("a", &[1.0])])).unwrap();
    fit.update(&gradients(&fit, &[Some(&[2.0])]), &config()).unwrap();
    let before = f64::from(held(&fit)[0][0]);
    fit.update(&Gradients::zero(&fit.wanted()).unwrap(), &config()).unwrap();
    let moved = before - f64::from(held(&fit)[0][0]);
    // Adam's means of the gradients 2 and 0, each made unbiased.
    let mean = 0.9 * 0.2 / (1.0 - 0.9f64.powi(2));
    let square = 0.999 * 0.004 / (1.0 - 0.999f64.powi(2));
    assert!((moved - 0.1 * mean / square.sqrt()).abs() < 1e-6, "{moved}");
    assert_eq!(fit.updates, 2);
}
