//! The CPU's arithmetic: matrix product, attention, pointwise functions, reductions.
//!
//! Every element of every result is computed by one fixed sequence of operations that depends on neither the
//! number of rows nor of threads. Vector instructions are chosen at run time; no result depends on a batch.
//! This is one of the few places where `unsafe` is allowed: each use says why it is sound.

pub(crate) mod attention;
pub(crate) mod gemm;
pub(crate) mod math;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};
use std::sync::OnceLock;

/// Vector instructions of this processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// 512-bit vectors.
    Avx512,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// Whatever the compilation target guarantees.
    Baseline,
}

/// The instructions in use, found once.
pub(crate) fn isa() -> Isa {
    static FOUND: OnceLock<Isa> = OnceLock::new();
    *FOUND.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if wide {
                return Isa::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Isa::Avx2;
            }
        }
        Isa::Baseline
    })
}

/// Name of the instructions in use, for `doctor` and provenance.
pub fn isa_name() -> &'static str {
    match isa() {
        Isa::Avx512 => "avx512",
        Isa::Avx2 => "avx2+fma",
        Isa::Baseline => "baseline",
    }
}

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

/// A buffer whose every element the caller writes before anything reads it.
///
/// Filled with zeros: freed memory is kept by the allocator, so this costs one pass at cache speed.
pub(crate) fn buffer(len: usize) -> Vec<f32> {
    vec![0.0; len]
}

/// Whether the fused CPU path applies: float32 on the CPU.
pub(crate) fn is_fused(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == candle_core::DType::F32
}
