//! Pointwise non-linearities, alone and gated.

use super::kernel::math::{self, for_each_isa};
use super::kernel::{computed, computed_together, is_fused, slice, with_slice};
use super::plain;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

/// Elements that one task handles at a time.
const CHUNK: usize = 16 * 1024;

/// A pointwise non-linearity, named as in Hugging Face's `hidden_act`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU with the hyperbolic tangent (`gelu_pytorch_tanh`).
    GeluTanh,
    /// GELU with the error function (`gelu`).
    GeluErf,
    /// `x · sigmoid(1.702 x)` (`quick_gelu`).
    QuickGelu,
}

/// Applies `activation` to every element.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if !is_fused(x) {
        return plain::activate(x, activation);
    }
    x.contiguous()?.apply_op1(Activate(activation))
}

/// `activation(gate) · up`, the middle of a gated MLP.
///
/// # Shapes
/// - `gate`, `up`: `[rows, width]`
/// - returns: same
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    if !is_fused(gate) {
        return plain::gated(gate, up, activation);
    }
    if gate.dims() != up.dims() {
        candle_core::bail!("gate {:?} and up {:?} differ", gate.shape(), up.shape());
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, Gated(activation))
}

/// Value and derivative at `x`.
#[inline(always)]
fn at(activation: Activation, x: f32) -> (f32, f32) {
    match activation {
        Activation::Silu => {
            let s = math::sigmoid(x);
            (x * s, s + x * s * (1.0 - s))
        }
        Activation::QuickGelu => {
            let s = math::sigmoid(1.702 * x);
            (x * s, s + 1.702 * x * s * (1.0 - s))
        }
        Activation::GeluTanh => {
            const C: f32 = 0.797_884_6;
            let t = math::tanh(C * (x + 0.044_715 * x * x * x));
            let slope = C * (1.0 + 3.0 * 0.044_715 * x * x);
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
        }
        Activation::GeluErf => {
            let phi = 0.5 * (1.0 + math::erf(x * std::f32::consts::FRAC_1_SQRT_2));
            let density = 0.398_942_3 * math::exp(-0.5 * x * x);
            (x * phi, phi + x * density)
        }
    }
}

macro_rules! with_constant {
    ($activation:expr, $inner:ident($($arg:expr),*)) => {
        // One loop for each activation, so that each vectorises.
        match $activation {
            Activation::Silu => $inner(Activation::Silu, $($arg),*),
            Activation::GeluTanh => $inner(Activation::GeluTanh, $($arg),*),
            Activation::GeluErf => $inner(Activation::GeluErf, $($arg),*),
            Activation::QuickGelu => $inner(Activation::QuickGelu, $($arg),*),
        }
    };
}

#[inline(always)]
fn values_of(activation: Activation, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = at(activation, *x).0;
    }
}

#[inline(always)]
fn slopes_of(activation: Activation, x: &[f32], grad: &[f32], dx: &mut [f32]) {
    for ((dx, x), grad) in dx.iter_mut().zip(x).zip(grad) {
        *dx = at(activation, *x).1 * grad;
    }
}

#[inline(always)]
fn gated_values_of(activation: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        *y = at(activation, *gate).0 * up;
    }
}

#[inline(always)]
fn gated_slopes_of(
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    grad: &[f32],
    d_gate: &mut [f32],
    d_up: &mut [f32],
) {
    let inputs = gate.iter().zip(up).zip(grad);
    for (((gate, up), grad), (d_gate, d_up)) in inputs.zip(d_gate.iter_mut().zip(d_up)) {
        let (value, slope) = at(activation, *gate);
        *d_up = grad * value;
        *d_gate = grad * up * slope;
    }
}

for_each_isa! {
    fn values(activation: Activation, x: &[f32], y: &mut [f32]) {
        with_constant!(activation, values_of(x, y));
    }
}

for_each_isa! {
    fn slopes(activation: Activation, x: &[f32], grad: &[f32], dx: &mut [f32]) {
        with_constant!(activation, slopes_of(x, grad, dx));
    }
}

for_each_isa! {
    fn gated_values(activation: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
        with_constant!(activation, gated_values_of(gate, up, y));
    }
}

for_each_isa! {
    fn gated_slopes(activation: Activation, gate: &[f32], up: &[f32], grad: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
        with_constant!(activation, gated_slopes_of(gate, up, grad, d_gate, d_up));
    }
}

/// The `i`-th chunk of `data`.
fn part(data: &[f32], i: usize) -> &[f32] {
    &data[i * CHUNK..data.len().min((i + 1) * CHUNK)]
}

struct Activate(Activation);

impl CustomOp1 for Activate {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let y = computed(x.len(), CHUNK, |i, y| values(self.0, part(x, i), y));
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let dx = with_slice(x, |x| {
            with_slice(grad, |grad| {
                computed(x.len(), CHUNK, |i, dx| slopes(self.0, part(x, i), part(grad, i), dx))
            })
        })??;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

struct Gated(Activation);

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(gate, gate_layout)?, slice(up, up_layout)?);
        let y = computed(gate.len(), CHUNK, |i, y| gated_values(self.0, part(gate, i), part(up, i), y));
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let n = gate.elem_count();
        let [d_gate, d_up] = with_slice(gate, |gate| {
            with_slice(up, |up| {
                with_slice(grad, |grad| {
                    computed_together([n, n], [CHUNK, CHUNK], |i, [d_gate, d_up]| {
                        gated_slopes(self.0, part(gate, i), part(up, i), part(grad, i), d_gate, d_up);
                    })
                })
            })
        })???;
        let shape = gate.shape();
        Ok((
            Some(Tensor::from_vec(d_gate, shape, gate.device())?),
            Some(Tensor::from_vec(d_up, shape, gate.device())?),
        ))
    }
}
