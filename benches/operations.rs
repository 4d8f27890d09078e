//! Every differentiable operation by itself, most of them with their backward, on the shapes of a 41-million-parameter model.
//!
//! ```text
//! cargo bench --bench operations                  # all; `-- linear` those whose name has the word
//! RAYON_NUM_THREADS=1 cargo bench --bench operations
//! ```
//!
//! The rate is that of multiply-adds counted twice, or of the elements that an elementwise operation writes. `ceiling` is the product of
//! two matrices of 2048 x 2048: what share of it another operation reaches is what the processor allows it.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot run should say so at once")]

use candle_core::{Device, Tensor, Var};
use divan::Bencher;
use divan::counter::ItemsCount;
use half::bf16;
use safemed::nn::activation::{self, Activation};
use safemed::nn::attention::{Block, Heads, Layout, attention, joint_attention};
use safemed::nn::convolution::{Planes, convolve};
use safemed::nn::cross_entropy::log_probs_of;
use safemed::nn::divergence::divergence_of;
use safemed::nn::dropout::{Draw, Dropout, LayerDropout};
use safemed::nn::linear::{Arithmetic, Linear, LowRank, Reader, Values};
use safemed::nn::{norm, rotary, rows};
use safemed::rng;
use std::sync::Arc;

#[path = "../src/process.rs"]
mod process;

/// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    process::prepare();
    divan::main();
}

fn random(shape: &[usize], index: u64) -> Tensor {
    let mut values = vec![0f32; shape.iter().product()];
    rng::fill_standard_normal(&mut rng::stream(7, "bench", &[index]), &mut values);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Times `op` on inputs that need no gradient.
fn forward(bencher: Bencher<'_, '_>, work: usize, inputs: &[Tensor], op: impl Fn(&[Tensor]) -> Tensor) {
    bencher.counter(ItemsCount::new(work)).bench_local(|| op(inputs));
}

/// Times `op` and its backward to all inputs; the sum in front of it is part of the time.
fn backward(bencher: Bencher<'_, '_>, work: usize, inputs: &[Tensor], op: impl Fn(&[Tensor]) -> Tensor) {
    let vars: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    bencher
        .counter(ItemsCount::new(work))
        .bench_local(|| op(&tensors).sum_all().unwrap().backward().unwrap());
}

/// Rows, columns in, columns out.
const SHAPES: [(usize, usize, usize); 6] = [
    (2048, 2048, 2048),
    (1024, 512, 1408),
    (1024, 1408, 512),
    (256, 512, 640),
    (8, 512, 1408),
    (1, 512, 1408),
];

#[divan::bench(args = [2048])]
fn ceiling(bencher: Bencher<'_, '_>, n: usize) {
    let layer = Linear::frozen(&random(&[n, n], 0), None).unwrap();
    forward(bencher, 2 * n * n * n, &[random(&[n, n], 1)], |x| layer.forward(&x[0]).unwrap());
}

#[divan::bench(args = SHAPES)]
fn linear_frozen(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let layer = Linear::frozen(&random(&[n, k], 0), None).unwrap();
    forward(bencher, 2 * m * k * n, &[random(&[m, k], 1)], |x| layer.forward(&x[0]).unwrap());
}

#[divan::bench(args = SHAPES)]
fn linear_frozen_backward(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let layer = Linear::frozen(&random(&[n, k], 0), None).unwrap();
    backward(bencher, 4 * m * k * n, &[random(&[m, k], 1)], |x| layer.forward(&x[0]).unwrap());
}

/// The same with a residual added in the same pass.
#[divan::bench(args = SHAPES)]
fn linear_added_backward(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let layer = Linear::frozen(&random(&[n, k], 0), None).unwrap();
    let inputs = [random(&[m, k], 1), random(&[m, n], 2)];
    backward(bencher, 4 * m * k * n, &inputs, |x| layer.forward_added(&x[0], &x[1]).unwrap());
}

#[divan::bench(args = SHAPES)]
fn linear_trained_backward(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let layer = Linear::trainable(&Var::from_tensor(&random(&[n, k], 0)).unwrap(), None);
    backward(bencher, 6 * m * k * n, &[random(&[m, k], 1)], |x| layer.forward(&x[0]).unwrap());
}

#[divan::bench(args = SHAPES)]
fn linear_adapted_backward(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let half = |shape: &[usize], index| Var::from_tensor(&random(shape, index)).unwrap().as_tensor().clone();
    let low_rank = LowRank { a: half(&[16, k], 2), b: half(&[n, 16], 3), scaling: 2.0 };
    let layer = Linear::frozen(&random(&[n, k], 0), None).unwrap().with_low_rank(low_rank);
    backward(bencher, 4 * m * k * n + 6 * 16 * m * (k + n), &[random(&[m, k], 1)], |x| {
        layer.forward(&x[0]).unwrap()
    });
}

/// The same with dropout in front of the adapter: a mask for each call.
#[divan::bench(args = SHAPES)]
fn linear_dropped_backward(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let half = |shape: &[usize], index| Var::from_tensor(&random(shape, index)).unwrap().as_tensor().clone();
    let low_rank = LowRank { a: half(&[16, k], 2), b: half(&[n, 16], 3), scaling: 2.0 };
    let dropout = Arc::new(Dropout::default());
    let layer_dropout = LayerDropout { dropout: dropout.clone(), layer: 0, kind: 0 };
    let layer = Linear::frozen(&random(&[n, k], 0), None)
        .unwrap()
        .with_low_rank(low_rank)
        .with_dropout(layer_dropout);
    let names = (0..m as u64).map(|row| [row, 0, 0]).collect();
    let _active = dropout.begin(Draw { rate: 0.1, seed: 0, index: 0, rows: vec![(0, names)] });
    backward(bencher, 4 * m * k * n + 6 * 16 * m * (k + n), &[random(&[m, k], 1)], |x| {
        layer.forward(&x[0]).unwrap()
    });
}

/// A frozen layer held and multiplied in bfloat16.
fn half_layer(k: usize, n: usize) -> Linear {
    let weight: Vec<f32> = random(&[n, k], 0).flatten_all().unwrap().to_vec1().unwrap();
    let weight: Vec<bf16> = weight.into_iter().map(bf16::from_f32).collect();
    Linear::frozen_values(Values::Half(&weight), [n, k], None, &Device::Cpu, Reader::NONE)
        .unwrap()
        .with_arithmetic(Arithmetic::Half)
}

#[divan::bench(args = SHAPES)]
fn linear_half(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let layer = half_layer(k, n);
    forward(bencher, 2 * m * k * n, &[random(&[m, k], 1)], |x| layer.forward(&x[0]).unwrap());
}

#[divan::bench(args = SHAPES)]
fn linear_half_backward(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let layer = half_layer(k, n);
    backward(bencher, 4 * m * k * n, &[random(&[m, k], 1)], |x| layer.forward(&x[0]).unwrap());
}

/// Heads of the decoder, over causal sequences; and of the vision tower, over windows.
fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> Heads {
    Heads { num_heads, num_kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() }
}

fn qkv(rows: usize, heads: Heads) -> [Tensor; 3] {
    let width = |count: usize| count * heads.head_dim;
    let key = width(heads.num_kv_heads);
    [random(&[rows, width(heads.num_heads)], 1), random(&[rows, key], 2), random(&[rows, key], 3)]
}

const CAUSAL: [(usize, usize); 4] = [(8, 120), (4, 176), (1, 1024), (1, 4096)];

#[divan::bench(args = CAUSAL)]
fn attention_causal(bencher: Bencher<'_, '_>, (count, length): (usize, usize)) {
    let (heads, layout) = (heads(8, 2, 64), Arc::new(Layout::causal(&vec![length; count])));
    let work = 4 * 512 * count * length * (length + 1) / 2;
    forward(bencher, work, &qkv(count * length, heads), |x| {
        attention(&x[0], &x[1], &x[2], heads, &layout).unwrap()
    });
}

#[divan::bench(args = CAUSAL)]
fn attention_causal_backward(bencher: Bencher<'_, '_>, (count, length): (usize, usize)) {
    let (heads, layout) = (heads(8, 2, 64), Arc::new(Layout::causal(&vec![length; count])));
    let work = 12 * 512 * count * length * (length + 1) / 2;
    backward(bencher, work, &qkv(count * length, heads), |x| {
        attention(&x[0], &x[1], &x[2], heads, &layout).unwrap()
    });
}

const WINDOWS: [(usize, usize); 3] = [(64, 64), (16, 256), (1, 1024)];

#[divan::bench(args = WINDOWS)]
fn attention_windows(bencher: Bencher<'_, '_>, (count, length): (usize, usize)) {
    let (heads, layout) = (heads(6, 6, 64), Arc::new(Layout::windows(&vec![length; count])));
    forward(bencher, 4 * 384 * count * length * length, &qkv(count * length, heads), |x| {
        attention(&x[0], &x[1], &x[2], heads, &layout).unwrap()
    });
}

#[divan::bench(args = WINDOWS)]
fn attention_windows_backward(bencher: Bencher<'_, '_>, (count, length): (usize, usize)) {
    let (heads, layout) = (heads(6, 6, 64), Arc::new(Layout::windows(&vec![length; count])));
    backward(bencher, 12 * 384 * count * length * length, &qkv(count * length, heads), |x| {
        attention(&x[0], &x[1], &x[2], heads, &layout).unwrap()
    });
}

/// Windows whose rows hold query, key and value one after another, rotated on the way.
#[divan::bench(args = WINDOWS)]
fn attention_joint_backward(bencher: Bencher<'_, '_>, (count, length): (usize, usize)) {
    let (heads, layout) = (heads(6, 6, 64), Arc::new(Layout::windows(&vec![length; count])));
    let rows = count * length;
    let (cos, sin) = (random(&[rows, 32], 2), random(&[rows, 32], 3));
    backward(bencher, 12 * 384 * count * length * length, &[random(&[rows, 3 * 384], 1)], |x| {
        joint_attention(&x[0], (&cos, &sin), heads, &layout).unwrap()
    });
}

/// Sequences, and keys of each.
const CACHED: [(usize, usize); 4] = [(1, 184), (8, 184), (16, 184), (8, 1024)];

/// One new row of each sequence over the keys that a cache holds.
#[divan::bench(args = CACHED)]
fn attention_decode(bencher: Bencher<'_, '_>, (count, length): (usize, usize)) {
    let heads = heads(8, 2, 64);
    let block = |sequence: usize| Block {
        queries: sequence..sequence + 1,
        keys: vec![sequence * length..(sequence + 1) * length],
        is_causal: true,
    };
    let layout = Arc::new(Layout { blocks: (0..count).map(block).collect() });
    let [_, k, v] = qkv(count * length, heads);
    forward(bencher, 4 * 512 * count * length, &[random(&[count, 512], 1), k, v], |x| {
        attention(&x[0], &x[1], &x[2], heads, &layout).unwrap()
    });
}

const ROWS: usize = 2048;

#[divan::bench]
fn rms_norm(bencher: Bencher<'_, '_>) {
    let weight = random(&[512], 2);
    forward(bencher, ROWS * 512, &[random(&[ROWS, 512], 1)], |x| {
        norm::rms_norm(&x[0], &weight, 1e-6).unwrap()
    });
}

#[divan::bench]
fn rms_norm_backward(bencher: Bencher<'_, '_>) {
    let weight = random(&[512], 2);
    backward(bencher, ROWS * 512, &[random(&[ROWS, 512], 1)], |x| {
        norm::rms_norm(&x[0], &weight, 1e-6).unwrap()
    });
}

#[divan::bench]
fn layer_norm(bencher: Bencher<'_, '_>) {
    let (weight, bias) = (random(&[384], 2), random(&[384], 3));
    forward(bencher, ROWS * 384, &[random(&[ROWS, 384], 1)], |x| {
        norm::layer_norm(&x[0], &weight, &bias, 1e-6).unwrap()
    });
}

#[divan::bench]
fn layer_norm_backward(bencher: Bencher<'_, '_>) {
    let (weight, bias) = (random(&[384], 2), random(&[384], 3));
    backward(bencher, ROWS * 384, &[random(&[ROWS, 384], 1)], |x| {
        norm::layer_norm(&x[0], &weight, &bias, 1e-6).unwrap()
    });
}

#[divan::bench]
fn rotary_backward(bencher: Bencher<'_, '_>) {
    let (cos, sin) = (random(&[ROWS, 32], 2), random(&[ROWS, 32], 3));
    backward(bencher, ROWS * 512, &[random(&[ROWS, 512], 1)], |x| rotary::rotary(&x[0], &cos, &sin).unwrap());
}

#[divan::bench(args = [Activation::Silu, Activation::GeluTanh, Activation::GeluErf])]
fn activate_backward(bencher: Bencher<'_, '_>, kind: Activation) {
    backward(bencher, ROWS * 1408, &[random(&[ROWS, 1408], 1)], |x| {
        activation::activate(&x[0], kind).unwrap()
    });
}

#[divan::bench]
fn gated_mlp_middle(bencher: Bencher<'_, '_>) {
    let inputs = [random(&[ROWS, 1408], 1), random(&[ROWS, 1408], 2)];
    forward(bencher, ROWS * 1408, &inputs, |x| activation::gated(&x[0], &x[1], Activation::Silu).unwrap());
}

#[divan::bench]
fn gated_mlp_middle_backward(bencher: Bencher<'_, '_>) {
    let inputs = [random(&[ROWS, 1408], 1), random(&[ROWS, 1408], 2)];
    backward(bencher, ROWS * 1408, &inputs, |x| activation::gated(&x[0], &x[1], Activation::Silu).unwrap());
}

#[divan::bench(args = [2112, 32768])]
fn log_probs_backward(bencher: Bencher<'_, '_>, vocabulary: usize) {
    let head = Linear::frozen(&random(&[vocabulary, 512], 0), None).unwrap();
    let targets: Vec<u32> = (0..256).collect();
    backward(bencher, 6 * 256 * 512 * vocabulary, &[random(&[256, 512], 1)], |x| {
        log_probs_of(&x[0], &head, &targets, 1.0).unwrap()
    });
}

#[divan::bench(args = [2112, 32768])]
fn divergence_backward(bencher: Bencher<'_, '_>, vocabulary: usize) {
    let head = Linear::frozen(&random(&[vocabulary, 512], 0), None).unwrap();
    let inputs = [random(&[256, 512], 1), random(&[256, 512], 2)];
    backward(bencher, 12 * 256 * 512 * vocabulary, &inputs, |x| divergence_of(&x[0], &x[1], &head).unwrap());
}

#[divan::bench]
fn select_rows_backward(bencher: Bencher<'_, '_>) {
    let places: Vec<u32> = (0..ROWS as u32).rev().step_by(2).collect();
    backward(bencher, ROWS / 2 * 512, &[random(&[ROWS, 512], 1)], |x| rows::select(&x[0], &places).unwrap());
}

#[divan::bench]
fn add_rows_backward(bencher: Bencher<'_, '_>) {
    let places: Vec<u32> = (0..512).collect();
    let inputs = [random(&[ROWS, 512], 1), random(&[512, 512], 2)];
    backward(bencher, ROWS * 512, &inputs, |x| rows::add(&x[0], &places, &x[1]).unwrap());
}

/// Query, key and value of the decoder out of one product; what joins them again is part of the time.
#[divan::bench]
fn split_columns_backward(bencher: Bencher<'_, '_>) {
    backward(bencher, ROWS * 768, &[random(&[ROWS, 768], 1)], |x| {
        let [q, k, v] = rows::split_columns(&x[0], [512, 128, 128]).unwrap();
        let sum = |part: &Tensor| part.sum(1).unwrap();
        ((sum(&q) + sum(&k)).unwrap() + sum(&v)).unwrap()
    });
}

#[divan::bench]
fn place_rows_backward(bencher: Bencher<'_, '_>) {
    let places: Vec<u32> = (0..512).collect();
    let inputs = [random(&[ROWS, 512], 1), random(&[512, 512], 2)];
    backward(bencher, ROWS * 512, &inputs, |x| rows::replace(&x[0], &places, &x[1]).unwrap());
}

#[divan::bench]
fn convolution_backward(bencher: Bencher<'_, '_>) {
    let planes = Planes { batch: 16, height: 32, width: 32 };
    let layer = Linear::frozen(&random(&[32, 288], 0), None).unwrap();
    let pixels = 16 * 32 * 32;
    backward(bencher, 4 * pixels * 288 * 32, &[random(&[pixels, 32], 1)], |x| {
        convolve(&x[0], planes, &layer).unwrap()
    });
}
