//! The CPU's arithmetic: matrix product, attention, pointwise functions, reductions.
//!
//! Every element of every result is computed by one fixed sequence of operations that depends on neither the
//! number of rows nor of threads. Vector instructions are chosen at run time; no result depends on a batch.
//! This is one of the few places where `unsafe` is allowed: each use says why it is sound.

pub(crate) mod attention;
pub(crate) mod gemm;
pub(crate) mod math;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

pub(crate) use crate::backend::{Isa, isa};

/// The elements of a contiguous float32 operand.
pub(crate) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let all = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&all[start..end]),
        None => bail!("a fused CPU operation needs contiguous operands"),
    }
}

/// Runs `f` on the elements of `tensor`, made contiguous first where needed.
pub(crate) fn with_slice<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => Ok(f(slice(cpu, layout)?)),
        _ => bail!("a fused CPU operation was given a tensor of another device"),
    }
}

/// Runs `f` on the elements of several tensors.
pub(crate) fn with_slices<const N: usize, R>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> R,
) -> Result<R> {
    let mut contiguous = Vec::with_capacity(N);
    for tensor in tensors {
        contiguous.push(tensor.contiguous()?);
    }
    let guards: Vec<_> = contiguous.iter().map(Tensor::storage_and_layout).collect();
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slot, (storage, layout)) in slices.iter_mut().zip(&guards) {
        *slot = match &**storage {
            Storage::Cpu(cpu) => slice(cpu, layout)?,
            _ => bail!("a fused CPU operation was given a tensor of another device"),
        };
    }
    Ok(f(slices))
}

/// Memory full of zeros, cleared by all threads: where it is large.
pub(crate) fn cleared(len: usize) -> Vec<f32> {
    computed(len, 64 * 1024, |_, chunk| chunk.fill(0.0))
}

/// Memory full of zeros, for sums.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    vec![0.0; len]
}

/// New memory computed chunk by chunk in parallel: `f(i, chunk)` writes every element of the `i`-th chunk.
///
/// The memory is first touched by the thread that computes it; clearing it beforehand would cost as much as the
/// operation itself and bring it into the wrong core's cache.
pub(crate) fn computed(len: usize, chunk: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let [values] = computed_together([len], [chunk], |i, [values]| f(i, values));
    values
}

/// As [`computed`] for several results at once, each with its own length and chunk.
#[expect(unsafe_code, reason = "new memory is written before it is read")]
pub(crate) fn computed_together<const N: usize>(
    lens: [usize; N],
    chunks: [usize; N],
    f: impl Fn(usize, [&mut [f32]; N]) + Sync,
) -> [Vec<f32>; N] {
    let mut results = lens.map(Vec::<f32>::with_capacity);
    let outputs: [gemm::Output; N] =
        std::array::from_fn(|i| gemm::Output::of_spare(&mut results[i], lens[i]));
    let count = lens[0].div_ceil(chunks[0].max(1));
    let run = |i: usize| {
        // SAFETY: chunks are disjoint and within the memory just allocated; `f` writes before anything reads.
        let parts = std::array::from_fn(|r| unsafe {
            let start = i * chunks[r];
            outputs[r].from(start).as_slice(chunks[r].min(lens[r] - start))
        });
        f(i, parts);
    };
    if count <= 1 {
        (0..count).for_each(run);
    } else {
        (0..count).into_par_iter().for_each(run);
    }
    for (result, len) in results.iter_mut().zip(lens) {
        // SAFETY: every element was written above.
        unsafe { result.set_len(len) };
    }
    results
}

/// Whether the fused CPU path applies: float32 on the CPU.
pub(crate) fn is_fused(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == candle_core::DType::F32
}
