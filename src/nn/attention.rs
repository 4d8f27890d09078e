//! Grouped-query attention over packed sequences: causal, windowed, bidirectional, and with a shared prefix.

#![expect(unsafe_code, reason = "gradients are written through pointers that several threads share")]

use super::kernel::attention::{Backward, Operands, Rows, backward, forward};
use super::kernel::gemm::Output;
use super::kernel::{cleared, is_fused, slice, with_slices};
use super::rotary::{self, Angles};
use super::{plain, rows};
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Result, Shape, Tensor};
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

    /// The same for the query rows `rows` alone (ascending), which then stand one after another; keys stay as they are.
    ///
    /// # Errors
    /// When rows do not ascend, or one is in no block.
    pub fn of_rows(&self, rows: &[u32]) -> Result<Self> {
        let mut blocks: Vec<Block> = Vec::new();
        let mut of = self.blocks.iter().peekable();
        let mut last: Option<usize> = None;
        for (place, row) in rows.iter().map(|&row| row as usize).enumerate() {
            if last.is_some_and(|last| row <= last) {
                candle_core::bail!("rows {rows:?} do not ascend");
            }
            let is_new =
                last.is_none_or(|last| row != last + 1) || of.peek().is_some_and(|b| b.queries.end <= row);
            while of.peek().is_some_and(|block| block.queries.end <= row) {
                of.next();
            }
            let Some(block) = of.peek().filter(|block| block.queries.start <= row) else {
                candle_core::bail!("query row {row} is in no block");
            };
            if is_new {
                let keys = block.keys.clone();
                blocks.push(Block { queries: place..place, keys, is_causal: block.is_causal });
            }
            if let Some(own) = blocks.last_mut() {
                own.queries.end = place + 1;
                if let (true, Some(keys), Some(all)) = (own.is_causal, own.keys.last_mut(), block.keys.last())
                {
                    // What the last of these rows does not see ends the range, as it did for the block's last row.
                    keys.end = all.end - (block.queries.end - 1 - row);
                }
            }
            last = Some(row);
        }
        Ok(Self { blocks })
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

impl Attention {
    fn operands<'a>(&self, q: &'a [f32], k: &'a [f32], v: &'a [f32]) -> Operands<'a> {
        let Heads { num_heads, num_kv_heads, head_dim, .. } = self.heads;
        let rows = |data, heads| Rows { data, stride: heads * head_dim };
        Operands {
            q: rows(q, num_heads),
            k: rows(k, num_kv_heads),
            v: rows(v, num_kv_heads),
            queries: q.len() / (num_heads * head_dim),
            heads: self.heads,
        }
    }
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
        let [q, k, v] = [slice(q, q_layout)?, slice(k, k_layout)?, slice(v, v_layout)?];
        let (out, log_sum) = forward(self.operands(q, k, v), &self.layout);
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
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|like| cleared(like.elem_count()));
        with_slices([q, k, v, out, grad], |[q, k, v, out, grad]| {
            let x = self.operands(q, k, v);
            let [dq, dk, dv] = [&mut dq, &mut dk, &mut dv].map(|values| Output::new(values));
            let state = Backward { out, log_sum: &log_sum, grad, dq, dk, dv, dv_stride: x.v.stride };
            // SAFETY: the gradients are borrowed for the whole call.
            unsafe { backward(x, &self.layout, state) };
        })?;
        let tensor = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device());
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

/// Attention over rows that hold query, key and value one after another, with queries and keys rotated: what a vision
/// block does between its two projections, without a copy of any of the three.
///
/// # Shapes
/// - `qkv`: `[rows, 3 · num_heads · head_dim]`; as many key heads as query heads
/// - `cos`, `sin`: `[rows, head_dim / 2]`, constants
/// - returns: `[rows, num_heads · head_dim]`
///
/// # Errors
/// When shapes or layout do not fit.
pub fn joint_attention(
    qkv: &Tensor,
    (cos, sin): (&Tensor, &Tensor),
    heads: Heads,
    layout: &Arc<Layout>,
) -> Result<Tensor> {
    let (rows, width) = (qkv.dims2()?.0, heads.num_heads * heads.head_dim);
    if qkv.dims2()?.1 != 3 * width || heads.num_kv_heads != heads.num_heads {
        candle_core::bail!("joint attention of {heads:?} was given {:?}", qkv.shape());
    }
    layout.check(rows, rows)?;
    if !is_fused(qkv) {
        let [q, k, v] = rows::split_columns(qkv, [width; 3])?;
        let (q, k) = (rotary::rotary(&q, cos, sin)?, rotary::rotary(&k, cos, sin)?);
        return attention(&q, &k, &v, heads, layout);
    }
    let angles = Angles::new(cos, sin, rows, width)?;
    let op = JointAttention { heads, layout: layout.clone(), angles, log_sum: Mutex::default() };
    qkv.contiguous()?.apply_op1(op)
}

struct JointAttention {
    heads: Heads,
    layout: Arc<Layout>,
    angles: Angles,
    log_sum: Mutex<Vec<f32>>,
}

impl JointAttention {
    fn width(&self) -> usize {
        self.heads.num_heads * self.heads.head_dim
    }

    /// Queries and keys, rotated.
    fn rotated(&self, qkv: &[f32]) -> Result<[Vec<f32>; 2]> {
        let width = self.width();
        Ok([
            self.angles.rotated(qkv, 3 * width, 0, width)?,
            self.angles.rotated(qkv, 3 * width, width, width)?,
        ])
    }

    fn operands<'a>(&self, [q, k]: [&'a [f32]; 2], qkv: &'a [f32]) -> Operands<'a> {
        let width = self.width();
        Operands {
            q: Rows { data: q, stride: width },
            k: Rows { data: k, stride: width },
            v: Rows { data: &qkv[2 * width..], stride: 3 * width },
            queries: q.len() / width,
            heads: self.heads,
        }
    }
}

impl CustomOp1 for JointAttention {
    fn name(&self) -> &'static str {
        "joint-attention"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &candle_core::Layout) -> Result<(CpuStorage, Shape)> {
        let qkv = slice(storage, layout)?;
        let [q, k] = self.rotated(qkv)?;
        let (out, log_sum) = forward(self.operands([&q, &k], qkv), &self.layout);
        *self.log_sum.lock().unwrap_or_else(PoisonError::into_inner) = log_sum;
        Ok((CpuStorage::F32(out), Shape::from((layout.shape().dims2()?.0, self.width()))))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let log_sum = self.log_sum.lock().unwrap_or_else(PoisonError::into_inner);
        let width = self.width();
        let mut gradient = cleared(qkv.elem_count());
        with_slices([qkv, out, grad], |[qkv, out, grad]| -> Result<()> {
            let [q, k] = self.rotated(qkv)?;
            let [mut dq, mut dk] = [(); 2].map(|()| cleared(q.len()));
            let all = Output::new(&mut gradient);
            let state = Backward {
                out,
                log_sum: &log_sum,
                grad,
                dq: Output::new(&mut dq),
                dk: Output::new(&mut dk),
                dv: all.from(2 * width),
                dv_stride: 3 * width,
            };
            // SAFETY: the gradients are borrowed for the whole call.
            unsafe { backward(self.operands([&q, &k], qkv), &self.layout, state) };
            self.angles.turn_back(&dq, &mut gradient, 3 * width, 0)?;
            self.angles.turn_back(&dk, &mut gradient, 3 * width, width)
        })??;
        Ok(Some(Tensor::from_vec(gradient, qkv.shape(), qkv.device())?))
    }
}
