//! Each operation as a composition of candle's differentiable operations.
//!
//! The path of every device but the CPU, and the independent reference of the fused CPU operations. Slow, short
//! and plain on purpose.

use super::activation::Activation;
use super::attention::{Heads, Layout};
use super::convolution::Planes;
use candle_core::{D, DType, Result, Tensor};

/// `x · weightᵀ + bias`, see [`super::linear`].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.matmul(&weight.t()?)?;
    bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}

/// `x · weightᵀ + bias` with `x` rounded to the bfloat16 of `weight`, see [`super::linear::Arithmetic`]. The gradient passes the
/// rounding unchanged, itself rounded.
pub fn half_linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = linear(&x.to_dtype(DType::BF16)?, weight, None)?.to_dtype(DType::F32)?;
    bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
}

/// See [`super::norm::rms_norm`].
pub fn rms_norm(x: &Tensor, weight: &Tensor, rms_norm_eps: f64) -> Result<Tensor> {
    let width = weight.dims1()?;
    let shape = x.shape().clone();
    let x = x.reshape(((), width))?;
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean_square + rms_norm_eps)?.sqrt()?)?.broadcast_mul(weight)?.reshape(shape)
}

/// See [`super::norm::layer_norm`].
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)
}

/// See [`super::convolution::neighbourhoods`].
pub fn neighbourhoods(x: &Tensor, planes: Planes) -> Result<Tensor> {
    let (rows, channels) = x.dims2()?;
    let Planes { batch, height, width } = planes;
    let padded = x.reshape((batch, height, width, channels))?;
    let padded = padded.pad_with_zeros(1, 1, 1)?.pad_with_zeros(2, 1, 1)?;
    let shifted = (0..9)
        .map(|k| padded.narrow(1, k / 3, height)?.narrow(2, k % 3, width)?.reshape((rows, channels)))
        .collect::<Result<Vec<_>>>()?;
    Tensor::stack(&shifted, 2)?.reshape((rows, 9 * channels))
}

/// See [`super::rotary::rotary`].
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let half = cos.dims2()?.1;
    let x = x.reshape((rows, width / (2 * half), 2, half))?;
    let (first, second) = (x.narrow(2, 0, 1)?.squeeze(2)?, x.narrow(2, 1, 1)?.squeeze(2)?);
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let rotated_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let rotated_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Tensor::stack(&[rotated_first, rotated_second], 2)?.reshape((rows, width))
}

/// See [`super::attention::attention`].
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, layout: &Layout) -> Result<Tensor> {
    let (queries, _) = q.dims2()?;
    let (keys, _) = k.dims2()?;
    let repeat = heads.num_heads / heads.num_kv_heads;
    let split = |t: &Tensor, rows, n| t.reshape((rows, n, heads.head_dim))?.transpose(0, 1)?.contiguous();
    let expand = |t: Tensor| {
        let (n, rows, dim) = t.dims3()?;
        t.unsqueeze(1)?.broadcast_as((n, repeat, rows, dim))?.contiguous()?.reshape((n * repeat, rows, dim))
    };
    let q = split(q, queries, heads.num_heads)?;
    let k = expand(split(k, keys, heads.num_kv_heads)?)?;
    let v = expand(split(v, keys, heads.num_kv_heads)?)?;
    let mut mask = vec![f32::NEG_INFINITY; queries * keys];
    for (query, key) in layout.visible_pairs() {
        mask[query * keys + key] = 0.0;
    }
    let mask = Tensor::from_vec(mask, (1, queries, keys), q.device())?.to_dtype(q.dtype())?;
    let scores = (q.matmul(&k.t()?)? * f64::from(heads.scale))?.broadcast_add(&mask)?;
    let probabilities =
        candle_nn::ops::softmax(&scores.to_dtype(DType::F32)?, D::Minus1)?.to_dtype(q.dtype())?;
    probabilities.matmul(&v)?.transpose(0, 1)?.reshape((queries, heads.num_heads * heads.head_dim))
}

/// See [`super::activation::activate`].
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    match activation {
        Activation::Silu => x * candle_nn::ops::sigmoid(x)?,
        Activation::GeluTanh => x.gelu(),
        Activation::GeluErf => x.gelu_erf(),
        Activation::QuickGelu => x * candle_nn::ops::sigmoid(&(x * 1.702)?)?,
    }
}

/// See [`super::activation::gated`].
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    activate(gate, activation)? * up
}

/// See [`super::divergence::divergence_of`].
pub fn divergence_of(p: &Tensor, q: &Tensor) -> Result<Tensor> {
    let log_shares = |logits: &Tensor| {
        let shifted = logits.to_dtype(DType::F32)?;
        let shifted = shifted.broadcast_sub(&shifted.detach().max_keepdim(D::Minus1)?)?;
        shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
    };
    let (p, q) = (log_shares(p)?, log_shares(q)?);
    (p.exp()? * (&p - &q)?)?.sum(D::Minus1)
}

/// See [`super::cross_entropy::log_probs_of`].
pub fn log_probs_of(logits: &Tensor, targets: &Tensor, temperature: f64) -> Result<Tensor> {
    let logits = (logits.to_dtype(DType::F32)? / temperature)?;
    let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    shifted.gather(&targets.unsqueeze(1)?, 1)?.sub(&log_sum)?.squeeze(1)
}
