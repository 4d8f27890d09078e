//! Grouped-query attention over packed sequences: causal, windowed, bidirectional, and with a shared prefix.

use super::plain;
use candle_core::{Result, Tensor};
use std::ops::Range;

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
/// # Shapes
/// - `q`: `[queries, num_heads · head_dim]`
/// - `k`, `v`: `[keys, num_kv_heads · head_dim]`
/// - returns: as `q`
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: Heads,
    layout: &std::sync::Arc<Layout>,
) -> Result<Tensor> {
    plain::attention(q, k, v, heads, layout)
}
