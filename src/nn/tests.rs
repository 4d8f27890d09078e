//! Each fused operation against its plain composition and against finite differences; rows independent of batches.

use super::activation::{Activation, activate, gated};
use super::attention::{Block, Heads, Layout, attention, joint_attention};
use super::convolution::{Planes, convolve, neighbourhoods};
use super::cross_entropy::log_probs_of;
use super::divergence::divergence_of;
use super::linear::{Arithmetic, Linear, LowRank, Reader, Values};
use super::{norm, plain, rotary, rows};
use crate::rng;
use candle_core::{DType, Device, Result, Tensor, Var};
use half::bf16;
use std::sync::Arc;

fn random(shape: &[usize], index: u64) -> Tensor {
    let mut values = vec![0f32; shape.iter().product()];
    rng::fill_standard_normal(&mut rng::stream(11, "nn", &[index]), &mut values);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn check_close(name: &str, ours: &Tensor, theirs: &Tensor, tolerance: f32) {
    assert_eq!(ours.dims(), theirs.dims(), "{name}");
    let (ours, theirs) = (values(ours), values(theirs));
    let scale = theirs.iter().fold(1f32, |a, b| a.max(b.abs()));
    for (x, y) in ours.iter().zip(&theirs) {
        assert!((x - y).abs() <= tolerance * scale, "{name}: {x} is not {y} (scale {scale})");
    }
}

type RowOp<'a> = Box<dyn Fn(&Tensor, usize) -> Result<Tensor> + 'a>;
type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Values and every gradient of `fused` equal those of `reference`; gradients equal central differences along random
/// directions.
fn check_op(name: &str, inputs: &[Tensor], fused: Op<'_>, reference: Op<'_>) {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let (ours, theirs) = (fused(&tensors).unwrap(), reference(&tensors).unwrap());
    check_close(name, &ours, &theirs, 3e-6);
    let weights = random(ours.dims(), 999);
    let loss = |y: &Tensor| (y * &weights).unwrap().sum_all().unwrap();
    let (our_grads, their_grads) = (loss(&ours).backward().unwrap(), loss(&theirs).backward().unwrap());
    for (i, var) in vars.iter().enumerate() {
        let ours = our_grads.get(var).unwrap_or_else(|| panic!("{name}: no gradient for input {i}"));
        check_close(&format!("{name}, gradient {i}"), ours, their_grads.get(var).unwrap(), 1e-5);
        assert!(values(ours).iter().any(|v| *v != 0.0), "{name}: zero gradient for input {i}");
        let direction = random(inputs[i].dims(), 50 + i as u64);
        let h = 1e-2;
        let at = |step: f64| {
            let mut moved = inputs.to_vec();
            moved[i] = (&inputs[i] + (&direction * step).unwrap()).unwrap();
            let weighted = (fused(&moved).unwrap() * &weights).unwrap();
            values(&weighted).iter().map(|v| f64::from(*v)).sum::<f64>()
        };
        let numeric = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
        let analytic: f64 = values(&(ours * &direction).unwrap()).iter().map(|v| f64::from(*v)).sum::<f64>();
        assert!(
            (numeric - analytic).abs() < 2e-3 * (1.0 + analytic.abs()),
            "{name}, input {i}: finite difference {numeric}, gradient {analytic}"
        );
    }
}

#[test]
fn linear_equals_its_composition_in_value_and_gradients() {
    let inputs = [random(&[37, 24], 1), random(&[40, 24], 2), random(&[40], 3)];
    check_op("trained with bias", &inputs, &|t| Linear::of_tensor(&t[1], Some(&t[2])).forward(&t[0]), &|t| {
        plain::linear(&t[0], &t[1], Some(&t[2]))
    });
    check_op("trained", &inputs[..2], &|t| Linear::of_tensor(&t[1], None).forward(&t[0]), &|t| {
        plain::linear(&t[0], &t[1], None)
    });
    let (weight, bias) = (inputs[1].clone(), inputs[2].clone());
    check_op("frozen", &inputs[..1], &|t| Linear::frozen(&weight, Some(&bias))?.forward(&t[0]), &|t| {
        plain::linear(&t[0], &weight, Some(&bias))
    });
}

#[test]
fn in_bfloat16_a_frozen_layer_rounds_rows_and_gradients_and_nothing_else() {
    let (rows, input, out) = (37, 25, 40);
    let half: Vec<bf16> = values(&random(&[out, input], 2)).into_iter().map(bf16::from_f32).collect();
    let bias = random(&[out], 3);
    let device = Device::Cpu;
    let layer =
        Linear::frozen_values(Values::Half(&half), [out, input], Some(&bias), &device, Reader::NONE).unwrap();
    let single = layer.clone();
    let layer = layer.with_arithmetic(Arithmetic::Half);
    let rounded = |t: &Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    let x = Var::from_tensor(&random(&[rows, input], 1)).unwrap();
    let residual = random(&[rows, out], 4);
    let weights = random(&[rows, out], 5);
    let weight = single.weight().unwrap();
    for added in [false, true] {
        let forward = |layer: &Linear, x: &Tensor| {
            if added { layer.forward_added(x, &residual) } else { layer.forward(x) }.unwrap()
        };
        let ours = forward(&layer, x.as_tensor());
        check_close("value", &ours, &forward(&single, &rounded(x.as_tensor())), 1e-6);
        assert_ne!(values(&ours), values(&forward(&single, x.as_tensor())));
        let gradients = (ours * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        let expected = rounded(&weights).matmul(&weight).unwrap();
        check_close("gradient", gradients.get(&x).unwrap(), &expected, 1e-6);
    }
    let composed =
        plain::half_linear(x.as_tensor(), &weight.to_dtype(DType::BF16).unwrap(), Some(&bias)).unwrap();
    check_close("composition", &layer.forward(x.as_tensor()).unwrap(), &composed, 4e-3);
    // Weights in float32 have nothing to gain from it.
    let plain = Linear::frozen(&weight, None).unwrap();
    let same = plain.clone().with_arithmetic(Arithmetic::Half);
    let outputs = [plain, same].map(|layer| values(&layer.forward(x.as_tensor()).unwrap()));
    assert_eq!(outputs[0], outputs[1]);
}

#[test]
fn a_linear_layer_added_to_something_equals_the_sum() {
    let (weight, bias) = (random(&[40, 24], 2), random(&[40], 3));
    let low_rank = || LowRank { a: random(&[3, 24], 12), b: random(&[40, 3], 13), scaling: 0.7 };
    for bias in [None, Some(&bias)] {
        let inputs = [random(&[37, 24], 1), random(&[37, 40], 4)];
        let composed = |t: &[Tensor]| plain::linear(&t[0], &weight, bias)? + &t[1];
        let frozen = Linear::frozen(&weight, bias).unwrap();
        check_op("frozen", &inputs, &|t| frozen.forward_added(&t[0], &t[1]), &composed);
        let trained = Linear::of_tensor(&weight, bias);
        check_op("trained", &inputs, &|t| trained.forward_added(&t[0], &t[1]), &composed);
        let adapted = Linear::frozen(&weight, bias).unwrap().with_low_rank(low_rank());
        check_op("adapted", &inputs, &|t| adapted.forward_added(&t[0], &t[1]), &|t| {
            let inner = plain::linear(&t[0], &low_rank().a, None)?;
            composed(t)? + (plain::linear(&inner, &low_rank().b, None)? * 0.7)?
        });
    }
    let frozen = Linear::frozen(&weight, None).unwrap();
    assert!(frozen.forward_added(&random(&[37, 24], 1), &random(&[36, 40], 4)).is_err());
}

#[test]
fn a_low_rank_update_equals_its_composition_over_trained_and_frozen_weights() {
    let inputs = [random(&[37, 24], 1), random(&[3, 24], 12), random(&[40, 3], 13), random(&[40, 24], 2)];
    let low_rank = |t: &[Tensor]| LowRank { a: t[1].clone(), b: t[2].clone(), scaling: 0.7 };
    let composed = |t: &[Tensor], weight: &Tensor| {
        let inner = plain::linear(&t[0], &t[1], None)?;
        plain::linear(&t[0], weight, None)? + (plain::linear(&inner, &t[2], None)? * 0.7)?
    };
    check_op(
        "over trained",
        &inputs,
        &|t| Linear::of_tensor(&t[3], None).with_low_rank(low_rank(t)).forward(&t[0]),
        &|t| composed(t, &t[3]),
    );
    let weight = inputs[3].clone();
    check_op(
        "over frozen",
        &inputs[..3],
        &|t| Linear::frozen(&weight, None)?.with_low_rank(low_rank(t)).forward(&t[0]),
        &|t| composed(t, &weight),
    );
}

#[test]
fn a_frozen_linear_gives_no_gradient_to_its_weight_and_keeps_it_for_export() {
    let weight = Var::from_tensor(&random(&[40, 24], 2)).unwrap();
    let layer = Linear::frozen(weight.as_tensor(), None).unwrap();
    let x = Var::from_tensor(&random(&[5, 24], 1)).unwrap();
    let grads = layer.forward(x.as_tensor()).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&weight).is_none());
    assert_eq!(values(&layer.weight().unwrap()), values(weight.as_tensor()));
}

#[test]
fn convolution_equals_its_composition_and_sees_zeros_outside_and_no_other_image() {
    let planes = Planes { batch: 2, height: 3, width: 5 };
    let inputs = [random(&[30, 4], 1), random(&[6, 36], 2), random(&[6], 3)];
    check_op(
        "convolution",
        &inputs,
        &|t| convolve(&t[0], planes, &Linear::of_tensor(&t[1], Some(&t[2]))),
        &|t| plain::linear(&plain::neighbourhoods(&t[0], planes)?, &t[1], Some(&t[2])),
    );
    // A pixel of its own value, in closed form: row 7 is (1, 2) of the first image.
    let x = Tensor::arange(0f32, 30., &Device::Cpu).unwrap().reshape((30, 1)).unwrap();
    let found = neighbourhoods(&x, planes).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(found[7], [1., 2., 3., 6., 7., 8., 11., 12., 13.]);
    assert_eq!(found[0], [0., 0., 0., 0., 0., 1., 0., 5., 6.]);
    assert_eq!(found[15], [0., 0., 0., 0., 15., 16., 0., 20., 21.], "the second image's corner");
    assert!(neighbourhoods(&x, Planes { batch: 3, ..planes }).is_err());
}

#[test]
fn norms_equal_their_compositions() {
    let inputs = [random(&[19, 48], 4), random(&[48], 5), random(&[48], 6)];
    check_op("rms", &inputs[..2], &|t| norm::rms_norm(&t[0], &t[1], 1e-6), &|t| {
        plain::rms_norm(&t[0], &t[1], 1e-6)
    });
    check_op("layer", &inputs, &|t| norm::layer_norm(&t[0], &t[1], &t[2], 1e-6), &|t| {
        plain::layer_norm(&t[0], &t[1], &t[2], 1e-6)
    });
    let heads = [random(&[19, 48], 4), random(&[12], 5)];
    check_op("rms of heads", &heads, &|t| norm::rms_norm(&t[0], &t[1], 1e-6), &|t| {
        plain::rms_norm(&t[0], &t[1], 1e-6)
    });
}

#[test]
fn activations_equal_their_compositions() {
    let inputs = [random(&[7, 33], 7), random(&[7, 33], 8)];
    for kind in [Activation::Silu, Activation::GeluTanh, Activation::GeluErf, Activation::QuickGelu] {
        check_op(&format!("{kind:?}"), &inputs[..1], &|t| activate(&t[0], kind), &|t| {
            plain::activate(&t[0], kind)
        });
        check_op(&format!("gated {kind:?}"), &inputs, &|t| gated(&t[0], &t[1], kind), &|t| {
            plain::gated(&t[0], &t[1], kind)
        });
    }
}

#[test]
fn rotary_equals_its_composition_and_keeps_lengths() {
    let x = random(&[9, 48], 9);
    let angles = random(&[9, 8], 10);
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    check_op("rotary", std::slice::from_ref(&x), &|t| rotary::rotary(&t[0], &cos, &sin), &|t| {
        plain::rotary(&t[0], &cos, &sin)
    });
    let y = rotary::rotary(&x, &cos, &sin).unwrap();
    check_close("length", &y.sqr().unwrap().sum(1).unwrap(), &x.sqr().unwrap().sum(1).unwrap(), 1e-5);
}

fn layouts() -> Vec<(&'static str, Layout, usize)> {
    let block = |queries, keys, is_causal| Block { queries, keys, is_causal };
    let shared_prefix = Layout {
        blocks: vec![
            block(0..5, vec![0..5], true),
            block(5..9, vec![0..5, 5..9], true),
            block(9..12, vec![0..5, 9..12], true),
            block(12..14, vec![12..14], true),
            block(14..17, vec![12..14, 14..17], true),
        ],
    };
    let cached =
        Layout { blocks: vec![block(0..1, vec![0..5, 7..9], true), block(1..3, vec![0..5, 10..14], true)] };
    vec![
        ("causal", Layout::causal(&[6, 1, 70]), 77),
        ("windows", Layout::windows(&[16, 9, 64, 2]), 91),
        ("shared prefix", shared_prefix, 17),
        ("cached", cached, 14),
    ]
}

#[test]
fn attention_equals_its_composition_for_every_layout_and_grouping() {
    for (name, layout, keys) in layouts() {
        let queries = layout.blocks.last().unwrap().queries.end;
        for (num_heads, num_kv_heads, head_dim) in [(4, 2, 16), (3, 3, 12), (4, 1, 32)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
            let inputs = [
                random(&[queries, num_heads * head_dim], 12),
                random(&[keys, num_kv_heads * head_dim], 13),
                random(&[keys, num_kv_heads * head_dim], 14),
            ];
            let shared = Arc::new(layout.clone());
            check_op(
                &format!("{name} {num_heads}/{num_kv_heads}x{head_dim}"),
                &inputs,
                &|t| attention(&t[0], &t[1], &t[2], heads, &shared),
                &|t| plain::attention(&t[0], &t[1], &t[2], heads, &layout),
            );
        }
    }
}

#[test]
fn attention_of_chosen_rows_gives_the_bytes_that_all_rows_give_them() {
    for (name, layout, keys) in layouts() {
        let queries = layout.blocks.last().unwrap().queries.end;
        let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 16, scale: 0.25 };
        let (q, k, v) = (random(&[queries, 64], 12), random(&[keys, 32], 13), random(&[keys, 32], 14));
        let full = attention(&q, &k, &v, heads, &Arc::new(layout.clone())).unwrap();
        for step in [1, 2, 3, 7] {
            // Lone rows, and runs of two.
            let chosen: Vec<u32> =
                (0..queries as u32).filter(|row| row % step == 0 || row % step == 2).collect();
            let few = Arc::new(layout.of_rows(&chosen).unwrap());
            let few = attention(&rows::select(&q, &chosen).unwrap(), &k, &v, heads, &few).unwrap();
            assert_eq!(values(&few), values(&rows::select(&full, &chosen).unwrap()), "{name}, every {step}");
        }
        assert!(layout.of_rows(&[queries as u32]).is_err() && layout.of_rows(&[1, 0]).is_err());
        assert!(layout.of_rows(&[0, 0]).is_err());
    }
}

#[test]
fn joint_attention_equals_rotation_and_attention_of_its_three_parts() {
    for layout in [Layout::windows(&[5, 16, 70]), Layout::windows(&[91]), Layout::causal(&[40, 51])] {
        let (num_heads, head_dim, rows) = (3, 8, 91);
        let heads = Heads { num_heads, num_kv_heads: num_heads, head_dim, scale: 0.3 };
        let width = num_heads * head_dim;
        let (cos, sin) = (random(&[rows, head_dim / 2], 2), random(&[rows, head_dim / 2], 3));
        let shared = Arc::new(layout.clone());
        check_op(
            &format!("{layout:?}"),
            &[random(&[rows, 3 * width], 1)],
            &|t| joint_attention(&t[0], (&cos, &sin), heads, &shared),
            &|t| {
                let part = |i: usize| t[0].narrow(1, i * width, width)?.contiguous();
                let (q, k) = (plain::rotary(&part(0)?, &cos, &sin)?, plain::rotary(&part(1)?, &cos, &sin)?);
                plain::attention(&q, &k, &part(2)?, heads, &layout)
            },
        );
        let refused = |qkv: &[usize], cos: &Tensor| {
            joint_attention(&random(qkv, 1), (cos, &sin), heads, &shared).is_err()
        };
        assert!(refused(&[rows, 2 * width], &cos) && refused(&[rows, 3 * width], &random(&[rows - 1, 4], 2)));
    }
}

#[test]
fn a_shared_prefix_and_a_cache_give_the_bytes_of_a_full_sequence() {
    let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 16, scale: 0.25 };
    let (prefix, own) = (37, 9);
    let all = prefix + own;
    let (q, k, v) = (random(&[all, 64], 20), random(&[all, 32], 21), random(&[all, 32], 22));
    let full = values(&attention(&q, &k, &v, heads, &Arc::new(Layout::causal(&[all]))).unwrap());
    let split = Layout {
        blocks: vec![
            Block { queries: 0..prefix, keys: vec![0..prefix], is_causal: true },
            Block { queries: prefix..all, keys: vec![0..prefix, prefix..all], is_causal: true },
        ],
    };
    assert_eq!(full, values(&attention(&q, &k, &v, heads, &Arc::new(split)).unwrap()));
    for row in [0, 1, prefix - 1, prefix, all - 1] {
        let keys = if row < prefix { vec![0..row + 1] } else { vec![0..prefix, prefix..row + 1] };
        let one = Layout { blocks: vec![Block { queries: 0..1, keys, is_causal: true }] };
        let q = q.narrow(0, row, 1).unwrap();
        let out = values(&attention(&q, &k, &v, heads, &Arc::new(one)).unwrap());
        assert_eq!(out, full[row * 64..(row + 1) * 64]);
    }
}

#[test]
fn layouts_that_do_not_fit_are_refused() {
    let heads = Heads { num_heads: 1, num_kv_heads: 1, head_dim: 16, scale: 0.25 };
    let x = random(&[4, 16], 1);
    let causal_beyond = Block { queries: 0..4, keys: vec![0..2], is_causal: true };
    for layout in [
        Layout::causal(&[3]),
        Layout::causal(&[5]),
        Layout::default(),
        Layout { blocks: vec![causal_beyond] },
    ] {
        assert!(attention(&x, &x, &x, heads, &Arc::new(layout)).is_err());
    }
}

#[test]
fn log_probs_equal_their_composition_and_sum_to_one() {
    let inputs = [random(&[23, 24], 30), random(&[50, 24], 31)];
    let targets: Vec<u32> = (0..23).map(|i| i * 7 % 50).collect();
    let ids = Tensor::new(targets.as_slice(), &Device::Cpu).unwrap();
    for temperature in [1.0, 1.5] {
        check_op(
            "log probs",
            &inputs,
            &|t| log_probs_of(&t[0], &Linear::of_tensor(&t[1], None), &targets, temperature),
            &|t| plain::log_probs_of(&plain::linear(&t[0], &t[1], None)?, &ids, temperature),
        );
    }
    let frozen = Linear::frozen(&inputs[1], None).unwrap();
    check_op(
        "log probs, frozen head",
        &inputs[..1],
        &|t| log_probs_of(&t[0], &frozen, &targets, 1.0),
        &|t| plain::log_probs_of(&plain::linear(&t[0], &inputs[1], None)?, &ids, 1.0),
    );
    let row = inputs[0].narrow(0, 0, 1).unwrap().broadcast_as((50, 24)).unwrap().contiguous().unwrap();
    let every: Vec<u32> = (0..50).collect();
    let total: f64 =
        values(&log_probs_of(&row, &frozen, &every, 1.0).unwrap()).iter().map(|v| f64::from(*v).exp()).sum();
    assert!((total - 1.0).abs() < 1e-5);
    assert!(log_probs_of(&row, &frozen, &[50], 1.0).is_err());
}

#[test]
fn divergences_equal_their_composition_and_their_definition() {
    let inputs =
        [random(&[7, 24], 70), random(&[7, 24], 71), random(&[50, 24], 72)].map(|x| (x * 0.3).unwrap());
    let reference = |p: &Tensor, q: &Tensor, w: &Tensor| {
        plain::divergence_of(&plain::linear(p, w, None)?, &plain::linear(q, w, None)?)
    };
    check_op(
        "divergence",
        &inputs,
        &|t| divergence_of(&t[0], &t[1], &Linear::of_tensor(&t[2], None)),
        &|t| reference(&t[0], &t[1], &t[2]),
    );
    let frozen = Linear::frozen(&inputs[2], None).unwrap();
    check_op("divergence, frozen head", &inputs[..2], &|t| divergence_of(&t[0], &t[1], &frozen), &|t| {
        reference(&t[0], &t[1], &inputs[2])
    });
    // One side without a gradient, as an attack has it.
    for (side, name) in ["first", "second"].into_iter().enumerate() {
        let pair = |t: &[Tensor]| {
            let mut pair = [inputs[0].clone(), inputs[1].clone()];
            pair[side] = t[0].clone();
            pair
        };
        check_op(name, &inputs[side..=side], &|t| divergence_of(&pair(t)[0], &pair(t)[1], &frozen), &|t| {
            reference(&pair(t)[0], &pair(t)[1], &inputs[2])
        });
    }
    // The definition, in double precision and with sums of its own.
    let shares = |x: &Tensor| -> Vec<Vec<f64>> {
        let logits = frozen.forward(x).unwrap().to_vec2::<f32>().unwrap();
        let share = |row: Vec<f32>| {
            let sum: f64 = row.iter().map(|value| f64::from(*value).exp()).sum();
            row.iter().map(|value| f64::from(*value).exp() / sum).collect()
        };
        logits.into_iter().map(share).collect()
    };
    let found = values(&divergence_of(&inputs[0], &inputs[1], &frozen).unwrap());
    for ((p, q), found) in shares(&inputs[0]).iter().zip(shares(&inputs[1])).zip(found) {
        let expected: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!(expected > 0.01 && (f64::from(found) - expected).abs() < 1e-6, "{found} {expected}");
    }
    // Where the two hardly differ, no digits are lost to differences of sums.
    let near = (&inputs[0] + (&inputs[1] * 1e-3).unwrap()).unwrap();
    let found = values(&divergence_of(&inputs[0], &near, &frozen).unwrap());
    for ((p, q), found) in shares(&inputs[0]).iter().zip(shares(&near)).zip(found) {
        let expected: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!(expected < 1e-4 && (f64::from(found) / expected - 1.0).abs() < 2e-2, "{found} {expected}");
    }
    // And where they have nothing in common.
    let far = (&inputs[0] * -40.0).unwrap();
    let found = values(&divergence_of(&inputs[0], &far, &frozen).unwrap());
    for ((p, q), found) in shares(&inputs[0]).iter().zip(shares(&far)).zip(found) {
        let expected: f64 = p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum();
        assert!(expected > 10.0 && (f64::from(found) / expected - 1.0).abs() < 1e-4, "{found} {expected}");
    }
    let same = values(&divergence_of(&inputs[0], &inputs[0], &frozen).unwrap());
    assert!(same.iter().all(|value| *value == 0.0), "{same:?}");
    assert!(divergence_of(&inputs[0], &inputs[0].narrow(0, 0, 3).unwrap(), &frozen).is_err());
}

#[test]
fn rows_are_selected_added_and_replaced_with_gradients() {
    let inputs = [random(&[8, 5], 40), random(&[3, 5], 41)];
    let picks = [6u32, 0, 6, 2];
    let index = Tensor::new(&picks, &Device::Cpu).unwrap();
    check_op("select", &inputs[..1], &|t| rows::select(&t[0], &picks), &|t| t[0].index_select(&index, 0));
    let places = [1u32, 7, 4];
    let index = Tensor::new(&places, &Device::Cpu).unwrap();
    check_op("add", &inputs, &|t| rows::add(&t[0], &places, &t[1]), &|t| t[0].index_add(&index, &t[1], 0));
    let keep = Tensor::new(&[1f32, 0., 1., 1., 0., 1., 1., 0.], &Device::Cpu).unwrap().unsqueeze(1).unwrap();
    check_op("replace", &inputs, &|t| rows::replace(&t[0], &places, &t[1]), &|t| {
        t[0].broadcast_mul(&keep)?.index_add(&index, &t[1], 0)
    });
    assert!(rows::select(&inputs[0], &[8]).is_err());
    let wide = [random(&[300, 7], 42)];
    for (part, (start, width)) in [(0, 2), (2, 4), (6, 1)].into_iter().enumerate() {
        check_op("split", &wide, &|t| Ok(rows::split_columns(&t[0], [2, 4, 1])?[part].clone()), &|t| {
            t[0].narrow(1, start, width)
        });
    }
    assert!(rows::split_columns(&wide[0], [2, 2]).is_err());
    // Double precision takes the composed path.
    for dtype in [DType::F32, DType::F64] {
        for places in [[1u32, 7, 4], [2, 3, 4], [0, 5, 6]] {
            let cache = Tensor::zeros((8, 5), dtype, &Device::Cpu).unwrap();
            rows::write(&cache, &places, &inputs[1].to_dtype(dtype).unwrap()).unwrap();
            let cache = cache.to_dtype(DType::F32).unwrap();
            assert_eq!(values(&rows::select(&cache, &places).unwrap()), values(&inputs[1]));
            assert_eq!(values(&cache).iter().filter(|value| **value == 0.0).count(), 5 * 5);
        }
    }
}

#[test]
fn a_row_is_the_same_bytes_alone_and_in_a_batch() {
    let n = 53;
    let x = random(&[n, 96], 60);
    let (weight, scale, bias) = (random(&[70, 96], 61), random(&[96], 62), random(&[96], 63));
    let frozen = Linear::frozen(&weight, None).unwrap();
    let trained = Linear::of_tensor(&weight, None);
    let targets: Vec<u32> = (0..n as u32).map(|i| i % 70).collect();
    let ops: Vec<(&str, RowOp<'_>)> = vec![
        ("frozen", Box::new(|x, _| frozen.forward(x))),
        ("trained", Box::new(|x, _| trained.forward(x))),
        ("rms", Box::new(|x, _| norm::rms_norm(x, &scale, 1e-6))),
        ("layer", Box::new(|x, _| norm::layer_norm(x, &scale, &bias, 1e-6))),
        ("silu", Box::new(|x, _| activate(x, Activation::Silu))),
        ("gelu", Box::new(|x, _| activate(x, Activation::GeluTanh))),
        (
            "log probs",
            Box::new(|x, at| log_probs_of(x, &frozen, &targets[at..at + x.dims2()?.0], 1.0)?.unsqueeze(1)),
        ),
    ];
    for (name, op) in &ops {
        // Forward and input gradient, whole and in pieces.
        let run = |from: usize, count: usize| {
            let part = Var::from_tensor(&x.narrow(0, from, count).unwrap()).unwrap();
            let y = op(part.as_tensor(), from).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            (values(&y), values(grads.get(&part).unwrap()))
        };
        let (whole, whole_grad) = run(0, n);
        let width = whole.len() / n;
        for (from, count) in [(0, 1), (17, 1), (5, 8), (20, 33)] {
            let (part, grad) = run(from, count);
            assert_eq!(part, whole[from * width..(from + count) * width], "{name}");
            assert_eq!(grad, whole_grad[from * 96..(from + count) * 96], "{name}, gradient");
        }
    }
}
