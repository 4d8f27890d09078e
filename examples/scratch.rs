#![allow(missing_docs, clippy::all, unused)]
//! x
use candle_core::{Device, Tensor, Var};
use safemed::nn::attention::*;
use safemed::nn::linear::Linear;
use std::sync::Arc;
use std::time::Instant;
#[global_allocator]
static A: mimalloc::MiMalloc = mimalloc::MiMalloc;
fn main() {
    rayon::ThreadPoolBuilder::new().stack_size(64 << 20).build().unwrap().install(go)
}
fn go() {
    for (m, n, k) in [
        (2048, 2048, 2048),
        (1600, 64, 64),
        (1600, 192, 64),
        (1600, 64, 192),
        (512, 1408, 512),
        (8, 2048, 512),
        (1, 2048, 512),
        (192, 64, 64),
    ] {
        let x = Tensor::ones((m, k), candle_core::DType::F32, &Device::Cpu).unwrap();
        let w = Tensor::ones((n, k), candle_core::DType::F32, &Device::Cpu).unwrap();
        let l = Linear::frozen(&w, None).unwrap();
        let reps = (4e9 / (2.0 * m as f64 * n as f64 * k as f64)).clamp(3.0, 2000.0) as usize;
        for _ in 0..3 {
            l.forward(&x).unwrap();
        }
        let t = Instant::now();
        for _ in 0..reps {
            l.forward(&x).unwrap();
        }
        let s = t.elapsed().as_secs_f64() / reps as f64;
        let wt = w.t().unwrap();
        let t = Instant::now();
        for _ in 0..reps.min(200) {
            x.matmul(&wt).unwrap();
        }
        let c = t.elapsed().as_secs_f64() / reps.min(200) as f64;
        println!(
            "{m}x{n}x{k}: {:.1} GF/s {:.1} us; candle {:.1} GF/s",
            2.0 * (m * n * k) as f64 / s / 1e9,
            s * 1e6,
            2.0 * (m * n * k) as f64 / c / 1e9
        );
        let v = Var::from_tensor(&x).unwrap();
        let wv = Var::from_tensor(&w).unwrap();
        let l = Linear::trainable(&wv, None);
        let t = Instant::now();
        let r = (reps / 4).max(2);
        for _ in 0..r {
            l.forward(&v).unwrap().sum_all().unwrap().backward().unwrap();
        }
        let s = t.elapsed().as_secs_f64() / r as f64;
        println!("   trained fwd+bwd {:.1} GF/s {:.1} us", 6.0 * (m * n * k) as f64 / s / 1e9, s * 1e6);
    }
    for (seqs, len, h, d) in [(32usize, 64usize, 4usize, 16usize), (2, 512, 8, 64)] {
        let w = h * d;
        let x = Tensor::ones((seqs * len, w), candle_core::DType::F32, &Device::Cpu).unwrap();
        let v = Var::from_tensor(&x).unwrap();
        let heads = Heads { num_heads: h, num_kv_heads: h, head_dim: d, scale: 0.25 };
        let lay = Arc::new(Layout::windows(&vec![len; seqs]));
        let t = Instant::now();
        for _ in 0..50 {
            attention(&x, &x, &x, heads, &lay).unwrap();
        }
        println!("attn fwd {:.1} us", t.elapsed().as_secs_f64() / 50.0 * 1e6);
        let t = Instant::now();
        for _ in 0..50 {
            attention(&v, &v, &v, heads, &lay).unwrap().sum_all().unwrap().backward().unwrap();
        }
        println!("attn fwd+bwd {:.1} us", t.elapsed().as_secs_f64() / 50.0 * 1e6);
    }
}
