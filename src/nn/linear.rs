//! The linear layer: frozen (input gradient only) or trainable, with or without bias.
//!
//! On the CPU a frozen weight is rearranged once into the panels that the matrix product reads, which serves one row
//! of decoding as well as a thousand of prefill; its backward never computes a weight gradient.

use super::kernel::gemm::{Packed, Right, View, gemm, gemm_new, product, product_new};
use super::kernel::{is_fused, slice, with_slice, zeros};
use super::plain;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, Var};
use std::sync::{Arc, OnceLock};

/// A matrix that multiplies from the right, transposed: `y = x · weightᵀ + bias`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Weight {
    Panels(Arc<FrozenWeight>),
    Tensor(Tensor),
}

/// A frozen weight in the layout of the CPU's matrix product.
#[derive(Debug)]
pub(crate) struct FrozenWeight {
    forward: Packed,
    backward: OnceLock<Packed>,
}

impl FrozenWeight {
    /// Panels of the transposed weight, `[in, out]`.
    pub(crate) fn forward(&self) -> &Packed {
        &self.forward
    }

    /// Panels of the weight itself, `[out, in]`, made when a gradient is first asked for.
    pub(crate) fn backward(&self) -> &Packed {
        self.backward.get_or_init(|| self.forward.transposed())
    }
}

impl Linear {
    /// A layer whose weights never get a gradient.
    ///
    /// # Shapes
    /// - `weight`: `[out, in]`, `bias`: `[out]`
    pub fn frozen(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let (out, input) = weight.dims2()?;
        let bias = bias.map(Tensor::detach);
        if !is_fused(weight) {
            return Ok(Self { weight: Weight::Tensor(weight.detach()), bias });
        }
        let forward = with_slice(weight, |w| Packed::new(View::new(w, out, input).transposed()))?;
        Ok(Self {
            weight: Weight::Panels(Arc::new(FrozenWeight { forward, backward: OnceLock::new() })),
            bias,
        })
    }

    /// A layer whose weight and bias are trained.
    ///
    /// # Shapes
    /// - `weight`: `[out, in]`, `bias`: `[out]`
    pub fn trainable(weight: &Var, bias: Option<&Var>) -> Self {
        Self::of_tensor(weight.as_tensor(), bias.map(Var::as_tensor))
    }

    /// A layer over tensors as they are: they get gradients if they are tracked.
    pub(crate) fn of_tensor(weight: &Tensor, bias: Option<&Tensor>) -> Self {
        Self { weight: Weight::Tensor(weight.clone()), bias: bias.cloned() }
    }

    /// `x · weightᵀ + bias`.
    ///
    /// # Shapes
    /// - `x`: `[rows, in]`
    /// - returns: `[rows, out]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match (&self.weight, &self.bias) {
            (Weight::Panels(weight), bias) => {
                x.contiguous()?.apply_op1(FrozenLinear { weight: weight.clone(), bias: bias.clone() })
            }
            (Weight::Tensor(weight), bias) if !is_fused(x) => plain::linear(x, weight, bias.as_ref()),
            (Weight::Tensor(weight), None) => x.contiguous()?.apply_op2(&weight.contiguous()?, TrainedLinear),
            (Weight::Tensor(weight), Some(bias)) => {
                x.contiguous()?.apply_op3(&weight.contiguous()?, bias, TrainedLinear)
            }
        }
    }

    /// The same weights, shared, without gradients.
    #[must_use]
    pub fn detached(&self) -> Self {
        let weight = match &self.weight {
            Weight::Tensor(weight) => Weight::Tensor(weight.detach()),
            Weight::Panels(weight) => Weight::Panels(weight.clone()),
        };
        Self { weight, bias: self.bias.as_ref().map(Tensor::detach) }
    }

    /// The weight as a tensor `[out, in]`, for export.
    pub fn weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Panels(weight) => {
                let packed = weight.forward();
                let shape = (packed.n, packed.k);
                Tensor::from_vec(packed.unpack_transposed(), shape, &candle_core::Device::Cpu)
            }
            Weight::Tensor(weight) => Ok(weight.clone()),
        }
    }

    /// The frozen panels, or the tensor that may be trained.
    pub(crate) fn parts(&self) -> (Option<&Arc<FrozenWeight>>, Option<&Tensor>, Option<&Tensor>) {
        match &self.weight {
            Weight::Panels(weight) => (Some(weight), None, self.bias.as_ref()),
            Weight::Tensor(weight) => (None, Some(weight), self.bias.as_ref()),
        }
    }
}

struct FrozenLinear {
    weight: Arc<FrozenWeight>,
    bias: Option<Tensor>,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, _) = layout.shape().dims2()?;
        let packed = self.weight.forward();
        let x = View::new(slice(storage, layout)?, rows, packed.k);
        let y = match &self.bias {
            Some(bias) => with_slice(bias, |bias| product_new(x, Right::Packed(packed), Some(bias)))?,
            None => product_new(x, Right::Packed(packed), None),
        };
        Ok((CpuStorage::F32(y), Shape::from((rows, packed.n))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, width) = x.dims2()?;
        let packed = self.weight.backward();
        let dx = with_slice(grad, |grad| {
            product_new(View::new(grad, rows, packed.k), Right::Packed(packed), None)
        })?;
        Ok(Some(Tensor::from_vec(dx, (rows, width), x.device())?))
    }
}

struct TrainedLinear;

fn trained_forward(x: &[f32], weight: &[f32], rows: usize, out: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let input = weight.len() / out;
    gemm_new(View::new(x, rows, input), View::new(weight, out, input).transposed(), bias)
}

/// Gradients of the input and the weight, each only where something below wants it.
fn trained_backward(x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (rows, input) = x.dims2()?;
    let out = weight.dims2()?.0;
    with_slice(grad, |grad| -> Result<_> {
        let grad = View::new(grad, rows, out);
        let dx = if x.track_op() {
            let dx = with_slice(weight, |w| gemm_new(grad, View::new(w, out, input), None))?;
            Some(Tensor::from_vec(dx, (rows, input), x.device())?)
        } else {
            None
        };
        let dw = if weight.track_op() {
            let dw = with_slice(x, |x| gemm_new(grad.transposed(), View::new(x, rows, input), None))?;
            Some(Tensor::from_vec(dw, (out, input), x.device())?)
        } else {
            None
        };
        Ok((dx, dw))
    })?
}

/// Sum of the rows, each column one chain from the first row to the last.
pub(crate) fn sum_rows(rows: &[f32], width: usize) -> Vec<f32> {
    let mut total = zeros(width);
    for row in rows.chunks_exact(width) {
        for (sum, value) in total.iter_mut().zip(row) {
            *sum += value;
        }
    }
    total
}

impl CustomOp2 for TrainedLinear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, _) = x_layout.shape().dims2()?;
        let (out, _) = weight_layout.shape().dims2()?;
        let y = trained_forward(slice(x, x_layout)?, slice(weight, weight_layout)?, rows, out, None);
        Ok((CpuStorage::F32(y), Shape::from((rows, out))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        trained_backward(x, weight, grad)
    }
}

impl CustomOp3 for TrainedLinear {
    fn name(&self) -> &'static str {
        "linear-with-bias"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, _) = x_layout.shape().dims2()?;
        let (out, _) = weight_layout.shape().dims2()?;
        let bias = slice(bias, bias_layout)?;
        let y = trained_forward(slice(x, x_layout)?, slice(weight, weight_layout)?, rows, out, Some(bias));
        Ok((CpuStorage::F32(y), Shape::from((rows, out))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = trained_backward(x, weight, grad)?;
        let db = if bias.track_op() {
            let width = bias.dims1()?;
            Some(Tensor::from_vec(with_slice(grad, |grad| sum_rows(grad, width))?, width, bias.device())?)
        } else {
            None
        };
        Ok((dx, dw, db))
    }
}

/// `dx = grad · weight` for whichever form `head` has; for the chunked cross-entropy.
pub(crate) fn input_gradient(head: &Linear, grad: &[f32], rows: usize, dx: &mut [f32]) -> Result<()> {
    match head.parts() {
        (Some(frozen), _, _) => {
            let packed = frozen.backward();
            product(View::new(grad, rows, packed.k), Right::Packed(packed), dx, packed.n, false, true);
            Ok(())
        }
        (None, Some(weight), _) => {
            let (out, input) = weight.dims2()?;
            with_slice(weight, |w| {
                gemm(View::new(grad, rows, out), View::new(w, out, input), dx, input, false);
            })
        }
        (None, None, _) => candle_core::bail!("a linear layer without a weight"),
    }
}

/// Right-hand side for `x · weightᵀ`, packed now if it is not already.
pub(crate) fn with_forward_panels<R>(head: &Linear, f: impl FnOnce(&Packed) -> R) -> Result<R> {
    match head.parts() {
        (Some(frozen), _, _) => Ok(f(frozen.forward())),
        (None, Some(weight), _) => {
            let (out, input) = weight.dims2()?;
            let packed = with_slice(weight, |w| Packed::new(View::new(w, out, input).transposed()))?;
            Ok(f(&packed))
        }
        (None, None, _) => candle_core::bail!("a linear layer without a weight"),
    }
}
