//! Softmax attention and its backward, block by block, probabilities recomputed instead of stored.
//!
//! Scores of a query row are chains over the head's width, the softmax sums over fixed lanes of the key's place in
//! the sequence, and the result is a chain over keys in that order: how many rows are computed together, and
//! whether a prefix is shared, changes no byte.
#![expect(unsafe_code, reason = "threads write disjoint columns of one matrix through raw pointers")]

use super::gemm::{Output, Packed, Right, View, product};
use super::math::{self, for_each_isa};
use crate::nn::attention::{Block, Heads, Layout};
use rayon::prelude::*;
use std::ops::Range;

/// Query rows worked on at a time: scores of this many rows stay in the cache.
const QUERY_ROWS: usize = 64;

/// Rows of a matrix, `stride` elements apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
}

impl<'a> Rows<'a> {
    /// The columns of head `head` of the rows `rows`.
    fn head(self, rows: Range<usize>, head: usize, head_dim: usize) -> View<'a> {
        let start = rows.start * self.stride + head * head_dim;
        View::strided(&self.data[start..], rows.len(), head_dim, self.stride)
    }
}

/// Operands of one attention, rows packed as in [`crate::nn::attention::attention`].
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    pub(crate) q: Rows<'a>,
    pub(crate) k: Rows<'a>,
    pub(crate) v: Rows<'a>,
    pub(crate) queries: usize,
    pub(crate) heads: Heads,
}

impl Operands<'_> {
    /// Elements of a row of the result, which stand close.
    fn query_width(&self) -> usize {
        self.heads.num_heads * self.heads.head_dim
    }
}

/// Reused memory of one thread.
#[derive(Default)]
struct Scratch {
    keys: Vec<Packed>,
    values: Vec<Packed>,
    scores: Vec<f32>,
    gradients: Vec<f32>,
    packed: Packed,
}

fn key_count(block: &Block) -> usize {
    block.keys.iter().map(ExactSizeIterator::len).sum()
}

/// Keys that query `row` of `block` sees.
fn visible(block: &Block, row: usize, total: usize) -> usize {
    if block.is_causal { total - (block.queries.len() - 1 - row) } else { total }
}

/// `scores[rows, total] = a · bᵀ` for the key ranges one after another, up to key `limit`.
fn against_keys(
    a: View<'_>,
    packed: &[Packed],
    block: &Block,
    limit: usize,
    scores: &mut [f32],
    total: usize,
) {
    let mut offset = 0;
    for (range, packed) in block.keys.iter().zip(packed) {
        if offset >= limit {
            break;
        }
        product(a, Right::Packed(packed), &mut scores[offset..], total, false, false);
        offset += range.len();
    }
}

for_each_isa! {
    /// Turns `lens[i]` leading scores of each row into probabilities, clears the rest; writes log-sum-exp.
    fn softmax_rows(scores: &mut [f32], total: usize, lens: &[usize], scale: f32, log_sum: &mut [f32]) {
        for ((row, &len), log_sum) in scores.chunks_mut(total).zip(lens).zip(log_sum) {
            let (row, rest) = row.split_at_mut(len);
            let largest = math::max(row);
            for value in row.iter_mut() {
                *value = math::exp((*value - largest) * scale);
            }
            let sum = math::sum(row);
            let inverse = 1.0 / sum;
            for value in row.iter_mut() {
                *value *= inverse;
            }
            rest.fill(0.0);
            *log_sum = largest * scale + sum.ln();
        }
    }
}

for_each_isa! {
    /// From raw scores and `grad · valueᵀ` to probabilities (in `scores`) and score gradients (in `gradients`).
    fn softmax_rows_backward(scores: &mut [f32], gradients: &mut [f32], total: usize, lens: &[usize], scale: f32, log_sum: &[f32], inner: &[f32]) {
        let rows = scores.chunks_mut(total).zip(gradients.chunks_mut(total)).zip(lens).zip(log_sum.iter().zip(inner));
        for (((row, grad), &len), (&log_sum, &inner)) in rows {
            let (row, row_rest) = row.split_at_mut(len);
            let (grad, grad_rest) = grad.split_at_mut(len);
            for (p, g) in row.iter_mut().zip(grad.iter_mut()) {
                let probability = math::exp(*p * scale - log_sum);
                *p = probability;
                *g = probability * (*g - inner) * scale;
            }
            row_rest.fill(0.0);
            grad_rest.fill(0.0);
        }
    }
}

/// Attention, `[queries, num_heads · head_dim]`, and each query row's log-sum-exp, `[num_heads, queries]`. The blocks cover
/// every query row.
pub(crate) fn forward(x: Operands<'_>, layout: &Layout) -> (Vec<f32>, Vec<f32>) {
    let queries = x.queries;
    let tasks = layout.blocks.len() * x.heads.num_kv_heads;
    let lens = [queries * x.query_width(), queries * x.heads.num_heads];
    let mut results = lens.map(Vec::with_capacity);
    let [out, log_sum] = std::array::from_fn(|i| Output::of_spare(&mut results[i], lens[i]));
    let work: usize =
        layout.blocks.iter().map(|b| b.queries.len() * key_count(b)).sum::<usize>() * x.query_width();
    let run = |scratch: &mut Scratch, task: usize| {
        let (block, kv_head) = (&layout.blocks[task / x.heads.num_kv_heads], task % x.heads.num_kv_heads);
        forward_block(x, block, kv_head, queries, out, log_sum, scratch);
    };
    if work < 16 * 1024 || rayon::current_num_threads() == 1 {
        let mut scratch = Scratch::default();
        (0..tasks).for_each(|task| run(&mut scratch, task));
    } else {
        (0..tasks).into_par_iter().with_min_len(tasks.div_ceil(16)).for_each_init(Scratch::default, run);
    }
    for (result, len) in results.iter_mut().zip(lens) {
        // SAFETY: every head of every query row was written by its block's task.
        unsafe { result.set_len(len) };
    }
    results.into()
}

fn forward_block(
    x: Operands<'_>,
    block: &Block,
    kv_head: usize,
    queries: usize,
    out: Output,
    log_sum: Output,
    scratch: &mut Scratch,
) {
    let (dim, width) = (x.heads.head_dim, x.query_width());
    let total = key_count(block);
    scratch.keys.resize_with(block.keys.len().max(scratch.keys.len()), Packed::default);
    for (packed, range) in scratch.keys.iter_mut().zip(&block.keys) {
        packed.pack(x.k.head(range.clone(), kv_head, dim).transposed(), false);
    }
    let repeat = x.heads.num_heads / x.heads.num_kv_heads;
    for head in kv_head * repeat..(kv_head + 1) * repeat {
        for q0 in (0..block.queries.len()).step_by(QUERY_ROWS) {
            let rows = QUERY_ROWS.min(block.queries.len() - q0);
            let lens: [usize; QUERY_ROWS] =
                std::array::from_fn(|i| if i < rows { visible(block, q0 + i, total) } else { 0 });
            let lens = &lens[..rows];
            scratch.scores.resize(rows * total, 0.0);
            let start = block.queries.start + q0;
            let limit = lens[rows - 1];
            let q = x.q.head(start..start + rows, head, dim);
            against_keys(q, &scratch.keys, block, limit, &mut scratch.scores, total);
            let mut sums = [0.0; QUERY_ROWS];
            softmax_rows(&mut scratch.scores, total, lens, x.heads.scale, &mut sums[..rows]);
            // SAFETY: (head, query row) pairs of different tasks are disjoint.
            unsafe { log_sum.from(head * queries + start).write(&sums[..rows]) };
            let out = out.from(start * width + head * dim);
            let mut offset = 0;
            for range in &block.keys {
                let count = range.len().min(limit.saturating_sub(offset));
                if count == 0 && offset > 0 {
                    break;
                }
                let p = View::strided(&scratch.scores[offset..], rows, count, total);
                let v = x.v.head(range.start..range.start + count, kv_head, dim);
                // SAFETY: these rows and this head's columns belong to this task alone.
                unsafe { out.gemm_serial(p, v, width, offset > 0, &mut scratch.packed) };
                offset += count;
            }
        }
    }
}

/// What the backward reads of the forward, and where it writes.
#[derive(Clone, Copy)]
pub(crate) struct Backward<'a> {
    pub(crate) out: &'a [f32],
    pub(crate) log_sum: &'a [f32],
    pub(crate) grad: &'a [f32],
    /// As the result; overwritten.
    pub(crate) dq: Output,
    /// `[keys, num_kv_heads · head_dim]`, zero on entry.
    pub(crate) dk: Output,
    /// The same, with rows `dv_stride` apart.
    pub(crate) dv: Output,
    pub(crate) dv_stride: usize,
}

/// Gradients of attention.
///
/// # Safety
/// No other thread touches the elements of `dq`, `dk` and `dv` meanwhile.
pub(crate) unsafe fn backward(x: Operands<'_>, layout: &Layout, state: Backward<'_>) {
    let (places, side_rows) = side_places(layout);
    let width = x.heads.num_kv_heads * x.heads.head_dim;
    let mut sides = [(); 2].map(|()| super::cleared(side_rows * width));
    let [dk_side, dv_side] = sides.each_mut().map(|side| Output::new(side));
    let tasks = layout.blocks.len() * x.heads.num_kv_heads;
    let run = |scratch: &mut Scratch, task: usize| {
        let (index, kv_head) = (task / x.heads.num_kv_heads, task % x.heads.num_kv_heads);
        let targets: Vec<KeyGradients> = layout.blocks[index]
            .keys
            .iter()
            .zip(&places[index])
            .map(|(range, place)| match place {
                None => KeyGradients {
                    dk: state.dk.from(range.start * width),
                    dv: state.dv.from(range.start * state.dv_stride),
                    dv_stride: state.dv_stride,
                },
                Some(row) => KeyGradients {
                    dk: dk_side.from(row * width),
                    dv: dv_side.from(row * width),
                    dv_stride: width,
                },
            })
            .collect();
        backward_block(x, &layout.blocks[index], kv_head, state, &targets, scratch);
    };
    if tasks == 1 || rayon::current_num_threads() == 1 {
        let mut scratch = Scratch::default();
        (0..tasks).for_each(|task| run(&mut scratch, task));
    } else {
        (0..tasks).into_par_iter().with_min_len(tasks.div_ceil(16)).for_each_init(Scratch::default, run);
    }
    for (block, places) in layout.blocks.iter().zip(&places) {
        for (range, place) in block.keys.iter().zip(places) {
            let Some(row) = place else { continue };
            for (at, key) in (*row..).zip(range.clone()) {
                for (side, (to, stride)) in sides.iter().zip([(state.dk, width), (state.dv, state.dv_stride)])
                {
                    // SAFETY: all tasks have ended; the caller's promise.
                    let sums = unsafe { to.from(key * stride).as_slice(width) };
                    for (sum, value) in sums.iter_mut().zip(&side[at * width..]) {
                        *sum += value;
                    }
                }
            }
        }
    }
}

/// Where the gradients of one range of keys are summed.
#[derive(Clone, Copy)]
struct KeyGradients {
    dk: Output,
    dv: Output,
    dv_stride: usize,
}

/// For each block's ranges of keys, the row of side memory where its gradients are summed, and how many rows that takes:
/// keys that several blocks see get one sum for each, added up in the order of the blocks, so that blocks need not wait
/// for each other; keys of one block alone need no side memory.
fn side_places(layout: &Layout) -> (Vec<Vec<Option<usize>>>, usize) {
    let mut ranges: Vec<(usize, usize, usize, usize)> = Vec::new();
    for (block, keys) in layout.blocks.iter().map(|block| &block.keys).enumerate() {
        ranges.extend(keys.iter().enumerate().map(|(i, range)| (range.start, range.end, block, i)));
    }
    ranges.sort_unstable();
    let mut places: Vec<Vec<Option<usize>>> =
        layout.blocks.iter().map(|block| vec![None; block.keys.len()]).collect();
    let mut rows = 0;
    let mut first = 0;
    while first < ranges.len() {
        // A run of ranges each of which meets one before it.
        let (mut end, mut last) = (ranges[first].1, first + 1);
        while last < ranges.len() && ranges[last].0 < end {
            end = end.max(ranges[last].1);
            last += 1;
        }
        if last - first > 1 {
            for &(start, end, block, i) in &ranges[first..last] {
                places[block][i] = Some(rows);
                rows += end - start;
            }
        }
        first = last;
    }
    (places, rows)
}

fn backward_block(
    x: Operands<'_>,
    block: &Block,
    kv_head: usize,
    state: Backward<'_>,
    targets: &[KeyGradients],
    scratch: &mut Scratch,
) {
    let Backward { out, log_sum, grad, dq, .. } = state;
    let (dim, width, queries) = (x.heads.head_dim, x.query_width(), x.queries);
    let key_width = x.heads.num_kv_heads * dim;
    let grads = Rows { data: grad, stride: width };
    let total = key_count(block);
    let slots = block.keys.len();
    scratch.keys.resize_with(slots.max(scratch.keys.len()), Packed::default);
    scratch.values.resize_with(slots.max(scratch.values.len()), Packed::default);
    for (idx, range) in block.keys.iter().enumerate() {
        scratch.keys[idx].pack(x.k.head(range.clone(), kv_head, dim).transposed(), false);
        scratch.values[idx].pack(x.v.head(range.clone(), kv_head, dim).transposed(), false);
    }
    let repeat = x.heads.num_heads / x.heads.num_kv_heads;
    for head in kv_head * repeat..(kv_head + 1) * repeat {
        for q0 in (0..block.queries.len()).step_by(QUERY_ROWS) {
            let rows = QUERY_ROWS.min(block.queries.len() - q0);
            let start = block.queries.start + q0;
            let lens: [usize; QUERY_ROWS] =
                std::array::from_fn(|i| if i < rows { visible(block, q0 + i, total) } else { 0 });
            let lens = &lens[..rows];
            let limit = lens[rows - 1];
            scratch.scores.resize(rows * total, 0.0);
            scratch.gradients.resize(rows * total, 0.0);
            let (q, g) =
                (x.q.head(start..start + rows, head, dim), grads.head(start..start + rows, head, dim));
            against_keys(q, &scratch.keys, block, limit, &mut scratch.scores, total);
            against_keys(g, &scratch.values, block, limit, &mut scratch.gradients, total);
            let inner: [f32; QUERY_ROWS] = std::array::from_fn(|i| {
                if i >= rows {
                    return 0.0;
                }
                let at = (start + i) * width + head * dim;
                math::dot(&grad[at..at + dim], &out[at..at + dim])
            });
            softmax_rows_backward(
                &mut scratch.scores,
                &mut scratch.gradients,
                total,
                lens,
                x.heads.scale,
                &log_sum[head * queries + start..][..rows],
                &inner[..rows],
            );
            let dq = dq.from(start * width + head * dim);
            let mut offset = 0;
            for (range, target) in block.keys.iter().zip(targets) {
                let count = range.len().min(limit.saturating_sub(offset));
                if count == 0 && offset > 0 {
                    break;
                }
                let keys = range.start..range.start + count;
                let p = View::strided(&scratch.scores[offset..], rows, count, total);
                let ds = View::strided(&scratch.gradients[offset..], rows, count, total);
                let (dk, dv) = (target.dk.from(kv_head * dim), target.dv.from(kv_head * dim));
                let dv_stride = target.dv_stride;
                // SAFETY: query rows and this head's columns belong to this task alone, and so do its sums of keys: no
                // other block has these keys, or it sums them elsewhere.
                unsafe {
                    let k = x.k.head(keys, kv_head, dim);
                    dq.gemm_serial(ds, k, width, offset > 0, &mut scratch.packed);
                    dv.gemm_serial(p.transposed(), g, dv_stride, true, &mut scratch.packed);
                    dk.gemm_serial(ds.transposed(), q, key_width, true, &mut scratch.packed);
                }
                offset += count;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_several_blocks_are_summed_apart() {
        let block = |queries: Range<usize>, keys: Vec<Range<usize>>| Block { queries, keys, is_causal: true };
        let layout = Layout {
            blocks: vec![
                block(0..3, vec![0..3]),
                block(3..5, vec![0..3, 3..5]),
                block(5..7, vec![0..3, 5..7]),
                block(7..9, vec![7..9]),
                block(9..10, vec![6..9, 9..10]),
            ],
        };
        // Keys 0..3 three times; 5..7, 7..9 and 6..9 meet.
        let (places, rows) = side_places(&layout);
        assert_eq!(rows, 3 * 3 + 2 + 3 + 2);
        let shared: Vec<Vec<bool>> = places.iter().map(|p| p.iter().map(Option::is_some).collect()).collect();
        assert_eq!(shared, [vec![true], vec![true, false], vec![true, true], vec![true], vec![true, false]]);
        let mut taken: Vec<usize> = places.into_iter().flatten().flatten().collect();
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), 6);
        assert_eq!(side_places(&Layout::windows(&[4, 4, 2])).1, 0);
    }
}
