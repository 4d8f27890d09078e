//! The linear layer: frozen (input gradient only) or trainable, with or without bias and a low-rank adapter.
//!
//! On the CPU a frozen weight is rearranged once into the panels that the matrix product reads, which serves one row
//! of decoding as well as a thousand of prefill. Its backward reads the same panels, and never computes a weight gradient.

use super::dropout::LayerDropout;
use super::kernel::gemm::{
    Packed, Right, Start, View, gemm, gemm_new, half_product_new, product, product_new,
};
use super::kernel::{is_fused, slice, with_slice, zeros};
use super::plain;
use super::rows;
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, Var,
};
use half::bf16;
use std::ops::Range;
use std::sync::Arc;

/// A matrix that multiplies from the right, transposed: `y = x · weightᵀ + bias`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    low_rank: Option<LowRank>,
    /// Of the low-rank update's input.
    dropout: Option<LayerDropout>,
    arithmetic: Arithmetic,
}

/// What a frozen weight is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// float32 as it is.
    #[default]
    Single,
    /// Rows, and gradients on their way back, rounded to bfloat16; sums are float32. For weights held in bfloat16.
    Half,
}

/// Numbers of a weight, row-major, in either type that frozen weights are held in.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// float32.
    Single(&'a [f32]),
    /// bfloat16: half the memory, and products to the byte those of the same values in float32.
    Half(&'a [bf16]),
}

/// Who is told how far the numbers of a weight have been read.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// Called before these numbers are read: whoever looks at them too finds them in memory and leaves them in the cache.
    pub before: &'a (dyn Fn(Range<usize>) + Sync),
    /// Called when these numbers are not needed any more.
    pub after: &'a (dyn Fn(Range<usize>) + Sync),
}

impl Reader<'_> {
    /// Nobody.
    pub const NONE: Self = Self { before: &|_| (), after: &|_| () };
}

impl std::fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

/// What is done to each tensor of a layer to make another layer of them.
pub type TensorMap<'a> = &'a dyn Fn(&Tensor) -> Result<Tensor>;

/// A low-rank update of a weight: y gains scaling · (x · Aᵀ) · Bᵀ.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, in]`.
    pub a: Tensor,
    /// `[out, rank]`.
    pub b: Tensor,
    /// What the product is multiplied with.
    pub scaling: f64,
}

impl LowRank {
    fn map(&self, f: TensorMap<'_>) -> Result<Self> {
        Ok(Self { a: f(&self.a)?, b: f(&self.b)?, scaling: self.scaling })
    }

    /// `y` with the update of `x` added.
    fn add_to(&self, y: &Tensor, x: &Tensor) -> Result<Tensor> {
        if !is_fused(x) {
            let inner = plain::linear(x, &self.a, None)?;
            return y + (plain::linear(&inner, &self.b, None)? * self.scaling)?;
        }
        let inner = x.contiguous()?.apply_op2(&self.a.contiguous()?, TrainedLinear)?;
        y.contiguous()?.apply_op3(&inner, &self.b.contiguous()?, AddScaled(self.scaling as f32))
    }
}

#[derive(Debug, Clone)]
enum Weight {
    /// Frozen: panels of the transposed weight, `[in, out]`, which the way back turns as it goes.
    Panels(Arc<Packed>),
    Tensor(Tensor),
}

impl Linear {
    fn of_parts(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias, low_rank: None, dropout: None, arithmetic: Arithmetic::default() }
    }

    /// A layer whose weights never get a gradient.
    ///
    /// # Shapes
    /// - `weight`: `[out, in]`, `bias`: `[out]`
    pub fn frozen(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let (out, input) = weight.dims2()?;
        if !is_fused(weight) {
            let (weight, bias) = (Weight::Tensor(weight.detach()), bias.map(Tensor::detach));
            return Ok(Self::of_parts(weight, bias));
        }
        with_slice(weight, |values| {
            Self::frozen_values(Values::Single(values), [out, input], bias, weight.device(), Reader::NONE)
        })?
    }

    /// As [`Linear::frozen`], from numbers that are copied nowhere else on the way.
    ///
    /// # Shapes
    /// - `weight`: `shape`, `[out, in]`; `bias`: `[out]`, on `device`
    ///
    /// `reader` is told as numbers are copied, so that it can look at them and no more than a part of a mapped file is in
    /// memory; on a device other than the CPU it is told nothing.
    ///
    /// # Errors
    /// When the weight has another shape, or the device has no room.
    pub fn frozen_values(
        weight: Values<'_>,
        shape: [usize; 2],
        bias: Option<&Tensor>,
        device: &Device,
        reader: Reader<'_>,
    ) -> Result<Self> {
        let [out, input] = shape;
        let len = match weight {
            Values::Single(values) => values.len(),
            Values::Half(values) => values.len(),
        };
        if out.checked_mul(input) != Some(len) {
            candle_core::bail!("a weight {out} x {input} cannot have {len} numbers");
        }
        let bias = bias.map(Tensor::detach);
        if !device.is_cpu() {
            let tensor = match weight {
                Values::Single(values) => Tensor::from_slice(values, (out, input), device)?,
                Values::Half(values) => Tensor::from_slice(values, (out, input), device)?,
            };
            return Ok(Self::of_parts(Weight::Tensor(tensor), bias));
        }
        let panels = match weight {
            Values::Single(values) => Packed::of_rows(values, out, input, reader),
            Values::Half(values) => Packed::half_of_rows(values, out, input, reader),
        };
        Ok(Self::of_parts(Weight::Panels(Arc::new(panels)), bias))
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
        Self::of_parts(Weight::Tensor(weight.clone()), bias.cloned())
    }

    /// The same layer multiplying in this arithmetic, where its weight is frozen and held in bfloat16; others go on in
    /// float32.
    #[must_use]
    pub fn with_arithmetic(self, arithmetic: Arithmetic) -> Self {
        let arithmetic = if self.is_half() { arithmetic } else { Arithmetic::Single };
        Self { arithmetic, ..self }
    }

    /// The same layer with a low-rank update over it.
    #[must_use]
    pub fn with_low_rank(self, low_rank: LowRank) -> Self {
        Self { low_rank: Some(low_rank), ..self }
    }

    /// The same layer with dropout before its low-rank update, as PEFT has it: the weight itself sees all of its input.
    #[must_use]
    pub fn with_dropout(self, dropout: LayerDropout) -> Self {
        Self { dropout: Some(dropout), ..self }
    }

    /// `x · weightᵀ + bias`, and the low-rank update where there is one.
    ///
    /// # Shapes
    /// - `x`: `[rows, in]`
    /// - returns: `[rows, out]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.adapted(self.base(x)?, x)
    }

    /// `residual + x · weightᵀ + bias`, and the low-rank update where there is one: one pass over the result instead of two.
    ///
    /// # Shapes
    /// - `x`: `[rows, in]`
    /// - `residual`, returns: `[rows, out]`
    pub fn forward_added(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let y = match &self.weight {
            Weight::Panels(weight) => {
                let op = self.frozen_op(weight);
                x.contiguous()?.apply_op2(&residual.contiguous()?, op)?
            }
            Weight::Tensor(_) => (residual + self.base(x)?)?,
        };
        self.adapted(y, x)
    }

    fn adapted(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        let Some(low_rank) = &self.low_rank else { return Ok(y) };
        match self.dropout.as_ref().map(|dropout| dropout.apply(x)).transpose()?.flatten() {
            Some(dropped) => low_rank.add_to(&y, &dropped),
            None => low_rank.add_to(&y, x),
        }
    }

    fn base(&self, x: &Tensor) -> Result<Tensor> {
        match (&self.weight, &self.bias) {
            (Weight::Panels(weight), _) => x.contiguous()?.apply_op1(self.frozen_op(weight)),
            (Weight::Tensor(weight), bias) if !is_fused(x) => match self.arithmetic {
                Arithmetic::Single => plain::linear(x, &weight.to_dtype(x.dtype())?, bias.as_ref()),
                Arithmetic::Half => plain::half_linear(x, weight, bias.as_ref()),
            },
            (Weight::Tensor(weight), None) => x.contiguous()?.apply_op2(&weight.contiguous()?, TrainedLinear),
            (Weight::Tensor(weight), Some(bias)) => {
                x.contiguous()?.apply_op3(&weight.contiguous()?, bias, TrainedLinear)
            }
        }
    }

    fn frozen_op(&self, weight: &Arc<Packed>) -> FrozenLinear {
        FrozenLinear { weight: weight.clone(), bias: self.bias.clone(), arithmetic: self.arithmetic }
    }

    /// Rows of the weight, in that order: the layer read as an embedding table.
    ///
    /// # Shapes
    /// - returns: `[rows.len(), in]`
    ///
    /// # Errors
    /// When a row does not exist.
    pub fn weight_rows(&self, rows: &[u32]) -> Result<Tensor> {
        match &self.weight {
            Weight::Tensor(weight) => rows::select(weight, rows)?.to_dtype(DType::F32),
            Weight::Panels(packed) => {
                rows::check(rows, packed.n)?;
                Tensor::from_vec(packed.gather(rows), (rows.len(), packed.k), &Device::Cpu)
            }
        }
    }

    /// Whether its frozen weight is held in bfloat16.
    pub fn is_half(&self) -> bool {
        match &self.weight {
            Weight::Panels(packed) => packed.is_half(),
            Weight::Tensor(weight) => weight.dtype() == DType::BF16,
        }
    }

    /// The same layer over `f` of every tensor that may train; frozen weights are shared, and nothing is ever dropped.
    pub fn map(&self, f: TensorMap<'_>) -> Result<Self> {
        let weight = match &self.weight {
            Weight::Tensor(weight) => Weight::Tensor(f(weight)?),
            Weight::Panels(weight) => Weight::Panels(weight.clone()),
        };
        let low_rank = self.low_rank.as_ref().map(|low_rank| low_rank.map(f)).transpose()?;
        Ok(Self {
            weight,
            bias: self.bias.as_ref().map(f).transpose()?,
            low_rank,
            dropout: None,
            arithmetic: self.arithmetic,
        })
    }

    /// The weight as a tensor `[out, in]` without its low-rank update, for export.
    pub fn weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Panels(packed) => {
                let shape = (packed.n, packed.k);
                Tensor::from_vec(packed.unpack_transposed(), shape, &Device::Cpu)
            }
            Weight::Tensor(weight) => weight.to_dtype(DType::F32),
        }
    }

    /// The frozen panels, or the tensor that may be trained.
    pub(crate) fn parts(&self) -> (Option<&Packed>, Option<&Tensor>, Option<&Tensor>) {
        match &self.weight {
            Weight::Panels(weight) => (Some(weight), None, self.bias.as_ref()),
            Weight::Tensor(weight) => (None, Some(weight), self.bias.as_ref()),
        }
    }
}

/// y + scaling · u · bᵀ of `y` `[rows, out]`, `u` `[rows, rank]` and `b` `[out, rank]`.
struct AddScaled(f32);

impl CustomOp3 for AddScaled {
    fn name(&self) -> &'static str {
        "low-rank-update"
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        y_layout: &Layout,
        u: &CpuStorage,
        u_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, rank) = u_layout.shape().dims2()?;
        let out = b_layout.shape().dims2()?.0;
        let u: Vec<f32> = slice(u, u_layout)?.iter().map(|value| value * self.0).collect();
        let b = View::new(slice(b, b_layout)?, out, rank).transposed();
        let sum = gemm_new(View::new(&u, rows, rank), b, Start::Added(slice(y, y_layout)?, None));
        Ok((CpuStorage::F32(sum), Shape::from((rows, out))))
    }

    fn bwd(
        &self,
        y: &Tensor,
        u: &Tensor,
        b: &Tensor,
        _sum: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (du, db) = trained_backward(u, b, grad)?;
        let scaled = |gradient: Option<Tensor>| gradient.map(|g| g * f64::from(self.0)).transpose();
        Ok((y.track_op().then(|| grad.clone()), scaled(du)?, scaled(db)?))
    }
}

struct FrozenLinear {
    weight: Arc<Packed>,
    bias: Option<Tensor>,
    arithmetic: Arithmetic,
}

impl CustomOp1 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.compute(storage, layout, None)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.input_gradient(x, grad).map(Some)
    }
}

impl FrozenLinear {
    fn compute(&self, x: &CpuStorage, layout: &Layout, added: Option<&[f32]>) -> Result<(CpuStorage, Shape)> {
        let (rows, _) = layout.shape().dims2()?;
        let packed = &*self.weight;
        let x = View::new(slice(x, layout)?, rows, packed.k);
        let product = |bias: Option<&[f32]>| {
            let start = added.map_or(Start::bias(bias), |added| Start::Added(added, bias));
            self.product(x, Right::Packed(packed), start)
        };
        let y = match &self.bias {
            Some(bias) => with_slice(bias, |bias| product(Some(bias)))?,
            None => product(None),
        };
        Ok((CpuStorage::F32(y), Shape::from((rows, packed.n))))
    }

    fn input_gradient(&self, x: &Tensor, grad: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let packed = &*self.weight;
        let dx = with_slice(grad, |grad| {
            self.product(View::new(grad, rows, packed.n), Right::Transposed(packed), Start::Zero)
        })?;
        Tensor::from_vec(dx, (rows, width), x.device())
    }

    fn product(&self, a: View<'_>, b: Right<'_>, start: Start<'_>) -> Vec<f32> {
        match self.arithmetic {
            Arithmetic::Single => product_new(a, b, start),
            Arithmetic::Half => half_product_new(a, b, start),
        }
    }
}

impl CustomOp2 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear-added"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, wanted) = (layout.shape().dims2()?.0, self.weight.n);
        if residual_layout.shape().dims() != [rows, wanted] {
            candle_core::bail!("a residual of {:?} for [{rows}, {wanted}]", residual_layout.shape());
        }
        self.compute(x, layout, Some(slice(residual, residual_layout)?))
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = x.track_op().then(|| self.input_gradient(x, grad)).transpose()?;
        Ok((dx, residual.track_op().then(|| grad.clone())))
    }
}

struct TrainedLinear;

fn trained_forward(x: &[f32], weight: &[f32], rows: usize, out: usize, bias: Option<&[f32]>) -> Vec<f32> {
    let input = weight.len() / out;
    gemm_new(View::new(x, rows, input), View::new(weight, out, input).transposed(), Start::bias(bias))
}

/// Gradients of the input and the weight, each only where something below wants it.
fn trained_backward(x: &Tensor, weight: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (rows, input) = x.dims2()?;
    let out = weight.dims2()?.0;
    with_slice(grad, |grad| -> Result<_> {
        let grad = View::new(grad, rows, out);
        let dx = if x.track_op() {
            let dx = with_slice(weight, |w| gemm_new(grad, View::new(w, out, input), Start::Zero))?;
            Some(Tensor::from_vec(dx, (rows, input), x.device())?)
        } else {
            None
        };
        let dw = if weight.track_op() {
            let dw = with_slice(x, |x| gemm_new(grad.transposed(), View::new(x, rows, input), Start::Zero))?;
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
        (Some(packed), _, _) => {
            let grad = View::new(grad, rows, packed.n);
            product(grad, Right::Transposed(packed), dx, packed.k, false, true);
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
        (Some(packed), _, _) => Ok(f(packed)),
        (None, Some(weight), _) => {
            let (out, input) = weight.dims2()?;
            let packed = with_slice(weight, |w| Packed::new(View::new(w, out, input).transposed()))?;
            Ok(f(&packed))
        }
        (None, None, _) => candle_core::bail!("a linear layer without a weight"),
    }
}
