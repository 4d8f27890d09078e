//! Grouped-query attention over packed sequences: causal, windowed, bidirectional, and with a shared prefix.

use super::kernel::attention::{Backward, Operands, backward, forward};
use super::kernel::{is_fused, slice, with_slice, zeros};
use super::plain;
use candle_core::{CpuStorage, CustomOp3, Result, Shape, Tensor};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Consecutive query rows that see the same keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Rows of the query tensor.
    pub queries: Range<usize>,
    /// Rows of the key and value tensors, in the order of the sequence. A shared prefix is one range here, a
    /// sequence's own rows another.
    pub keys: Vec<Range<usize>>,
    /// When set, the last range ends with the queries' own rows: query `r` of `n` sees every earlier range, and of
    /// the last one all but its final `n - 1 - r` keys.
    pub is_causal: bool,
}

/// Who sees whom in a packed batch. Query rows in no block are not allowed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layout {
    /// Blocks in the order of their query rows, covering each exactly once.
    pub blocks: Vec<Block>,
}

impl Layout {
    /// Causal sequences one after another, of these lengths; keys are the queries' own rows.
    pub fn causal(lengths: &[usize]) -> Self {
        Self::consecutive(lengths, true)
    }

    /// Bidirectional windows one after another, of these lengths.
    pub fn windows(lengths: &[usize]) -> Self {
        Self::consecutive(lengths, false)
    }

    fn consecutive(lengths: &[usize], is_causal: bool) -> Self {
        let mut start = 0;
        let mut blocks = Vec::with_capacity(lengths.len());
        for &length in lengths {
            let rows = start..start + length;
            blocks.push(Block { queries: rows.clone(), keys: vec![rows.clone()], is_causal });
            start = rows.end;
        }
        Self { blocks }
    }

    /// That every query row is covered once, in order, and every key exists.
    fn check(&self, queries: usize, keys: usize) -> Result<()> {
        let mut next = 0;
        for block in &self.blocks {
            let own = block.keys.last().map_or(0, ExactSizeIterator::len);
            let fits = block.queries.start == next
                && block.keys.iter().all(|range| range.end <= keys && !range.is_empty())
                && (!block.is_causal || own >= block.queries.len())
                && own > 0;
            if !fits {
                candle_core::bail!(
                    "attention layout: {block:?} does not fit {queries} queries and {keys} keys"
                );
            }
            next = block.queries.end;
        }
        if next != queries {
            candle_core::bail!("attention layout covers {next} of {queries} queries");
        }
        Ok(())
    }

    /// Every (query row, key row) that may meet.
    pub fn visible_pairs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.blocks.iter().flat_map(|block| {
            let count = block.queries.len();
            let total: usize = block.keys.iter().map(ExactSizeIterator::len).sum();
            block.queries.clone().enumerate().flat_map(move |(r, query)| {
                let visible = if block.is_causal { total - (count - 1 - r) } else { total };
                block.keys.iter().cloned().flatten().take(visible).map(move |key| (query, key))
            })
        })
    }
}

/// How a row splits into heads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; each serves `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor on the scores, `1 / sqrt(head_dim)` as a rule.
    pub scale: f32,
}

/// Softmax attention: each query row over the key rows its block lets it see.
///
/// The backward recomputes the probabilities from the scores; only one number for each query row and head is kept.
///
/// # Shapes
/// - `q`: `[queries, num_heads · head_dim]`
/// - `k`, `v`: `[keys, num_kv_heads · head_dim]`
/// - returns: as `q`
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads, layout: &Arc<Layout>) -> Result<Tensor> {
    let ((queries, width), (keys, key_width)) = (q.dims2()?, k.dims2()?);
    if width != heads.num_heads * heads.head_dim
        || key_width != heads.num_kv_heads * heads.head_dim
        || v.dims2()? != (keys, key_width)
        || !heads.num_heads.is_multiple_of(heads.num_kv_heads)
    {
        candle_core::bail!(
            "attention of {heads:?} was given q {:?}, k {:?}, v {:?}",
            q.shape(),
            k.shape(),
            v.shape()
        );
    }
    layout.check(queries, keys)?;
    if !is_fused(q) {
        return plain::attention(q, k, v, heads, layout);
    }
    let op = Attention { heads, layout: layout.clone(), log_sum: Mutex::default() };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

struct Attention {
    heads: Heads,
    layout: Arc<Layout>,
    /// Log-sum-exp of each head and query row, from forward to backward.
    log_sum: Mutex<Vec<f32>>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &candle_core::Layout,
        k: &CpuStorage,
        k_layout: &candle_core::Layout,
        v: &CpuStorage,
        v_layout: &candle_core::Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let operands = Operands {
            q: slice(q, q_layout)?,
            k: slice(k, k_layout)?,
            v: slice(v, v_layout)?,
            heads: self.heads,
        };
        let mut out = zeros(operands.q.len());
        let mut log_sum = zeros(operands.q.len() / self.heads.head_dim);
        forward(operands, &self.layout, &mut out, &mut log_sum);
        *self.log_sum.lock().unwrap_or_else(PoisonError::into_inner) = log_sum;
        Ok((CpuStorage::F32(out), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let log_sum = self.log_sum.lock().unwrap_or_else(PoisonError::into_inner);
        let mut dq = zeros(q.elem_count());
        let (mut dk, mut dv) = (zeros(k.elem_count()), zeros(k.elem_count()));
        let mut run = |q: &[f32], k: &[f32], v: &[f32], out: &[f32], grad: &[f32]| {
            let state = Backward { out, log_sum: &log_sum, grad, dq: &mut dq, dk: &mut dk, dv: &mut dv };
            backward(Operands { q, k, v, heads: self.heads }, &self.layout, state);
        };
        with_slice(q, |q| {
            with_slice(k, |k| {
                with_slice(v, |v| with_slice(out, |out| with_slice(grad, |grad| run(q, k, v, out, grad))))
            })
        })?????;
        let tensor = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}
