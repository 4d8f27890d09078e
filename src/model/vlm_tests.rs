//! The whole model against hidden states, logits and gradients computed by Hugging Face transformers.

use super::config::VlmConfig;
use super::parameters::Build;
use super::patches::Patchify;
use super::test_support::{fixture_json, fixtures, read_tensors};
use super::vlm::{Batch, Vlm};
use super::weights::Weights;
use crate::nn::attention::Layout;
use crate::nn::recompute::{Memory, Stage, loss_and_gradients};
use candle_core::{Device, Tensor, Var};

#[test]
fn logits_and_pixel_gradients_equal_transformers() {
    let Some(root) = fixtures() else { return };
    for name in ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] {
        let dir = root.join("checkpoints").join(name);
        let config = VlmConfig::load(&dir).unwrap();
        let weights = Weights::open(&dir).unwrap();
        let processor: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(dir.join("preprocessor_config.json")).unwrap())
                .unwrap();
        let triple =
            |key: &str| -> [f32; 3] { std::array::from_fn(|i| processor[key][i].as_f64().unwrap() as f32) };
        let patchify = Patchify {
            patch_size: config.vision.patch_size,
            temporal_patch_size: config.vision.temporal_patch_size,
            spatial_merge_size: config.vision.spatial_merge_size,
            mean: triple("image_mean"),
            std: triple("image_std"),
        };
        let vlm =
            Vlm::new(&config, patchify, Build::plain(&|n, s| weights.get(n, s), &|_| true), &Device::Cpu)
                .unwrap();
        let expected = read_tensors(&root.join(format!("expected/{name}.safetensors")));
        let meta = fixture_json(&root.join(format!("expected/{name}.json")));
        let train = &meta["train"];
        let ids: Vec<u32> = serde_json::from_value(train["input_ids"].clone()).unwrap();
        let case = &meta["cases"]["single"];
        let grid: Vec<[usize; 3]> = serde_json::from_value(case["image_grid_thw"].clone()).unwrap();
        let mut positions = super::positions::prompt_positions(
            &ids,
            config.image_token_id,
            &grid,
            config.vision.spatial_merge_size,
        )
        .unwrap();
        positions.extend_text(0);
        let image_rows: Vec<u32> = ids
            .iter()
            .enumerate()
            .filter(|(_, id)| **id == config.image_token_id)
            .map(|(i, _)| i as u32)
            .collect();
        let plan = vlm.row_plan(&positions.ids, Layout::causal(&[ids.len()])).unwrap();
        let batch = Batch { input_ids: ids.clone(), image_rows, plan };
        let vision_plan = vlm.vision_plan(&grid).unwrap();
        let resized = expected.bytes_u8("single.resized_u8.0").unwrap();
        let shape = expected.shape("single.resized_u8.0").unwrap().to_vec();
        let pixels: Vec<f32> = resized.iter().map(|v| f32::from(*v) / 255.0).collect();
        let pixels = Tensor::from_vec(pixels, shape, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let pixels = Var::from_tensor(&pixels).unwrap();
        let prompt = train["prompt_length"].as_u64().unwrap() as usize;
        let rows: Vec<u32> = (prompt as u32 - 1..ids.len() as u32 - 1).collect();
        let targets = &ids[prompt..];
        let loss = |state: &[Tensor]| {
            let hidden = crate::nn::rows::select(&state[0], &rows)?;
            vlm.log_probs(&hidden, targets, 1.0)?.mean_all()?.neg()
        };
        let mut by_memory = Vec::new();
        for memory in [Memory::Keep, Memory::Recompute] {
            let stages: Vec<Stage<'_>> =
                vlm.vision_stages(&vision_plan).into_iter().chain(vlm.decoder_stages(&batch)).collect();
            let wanted: Vec<Tensor> =
                vlm.parameters().trained().iter().map(|(_, v)| v.as_tensor().clone()).collect();
            let (value, gradients) =
                loss_and_gradients(&stages, &[pixels.as_tensor().clone()], loss, &wanted, memory).unwrap();
            let value = value.to_scalar::<f32>().unwrap();
            assert!((f64::from(value) - train["loss"].as_f64().unwrap()).abs() < 1e-4, "{name}: {value}");
            let ours = gradients.get(pixels.as_tensor()).unwrap().squeeze(0).unwrap();
            let theirs = &expected.tensor("train.grad_image01").unwrap();
            let difference = (ours.clone() - theirs)
                .unwrap()
                .abs()
                .unwrap()
                .flatten_all()
                .unwrap()
                .max(0)
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            let scale =
                theirs.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            println!(
                "{name} {memory:?}: loss {value}, pixel gradient off by {:.2e} of {scale:.2e}",
                difference / scale
            );
            assert!(difference / scale < 1e-3);
            for (parameter, var) in vlm.parameters().trained() {
                let grad = gradients
                    .get(var.as_tensor())
                    .unwrap_or_else(|| panic!("{name}: no gradient for {parameter}"));
                let norm = grad.sqr().unwrap().sum_all().unwrap().sqrt().unwrap().to_scalar::<f32>().unwrap();
                let theirs =
                    train["grad_norms"][&parameter].as_f64().unwrap_or_else(|| panic!("{parameter}"));
                assert!(
                    (f64::from(norm) - theirs).abs() < 1e-3 * theirs.max(1e-3),
                    "{name} {parameter}: {norm} {theirs}"
                );
            }
            by_memory.push(value);
        }
        assert_eq!(by_memory[0], by_memory[1]);
    }
}
