//! Matrix product with a fixed order of summation.
//!
//! `c[i][j]` is one chain of fused multiply-adds over `p = 0, 1, …, k-1`, started from zero or from the old value.
//! Blocking, threads, packing and the number of rows change which elements are computed together, never the chain,
//! so a row's result is the same bytes in any batch. Blocks along `k` continue the chain from memory.
#![expect(unsafe_code, reason = "vector kernels on raw pointers; bounds are checked once at the entrance")]

use super::super::linear::Reader;
use super::math::for_each_isa;
use super::{Isa, isa};
use half::bf16;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Columns of a packed panel.
const PANEL: usize = 32;
/// Lanes of the vector that kernels are written in.
const LANES: usize = 16;
/// Most rows of a register tile.
const TILE_ROWS: usize = 8;
/// Depth of a block along `k`: a panel of this depth stays in the second-level cache.
const DEPTH: usize = 1024;
/// Most rows of a block: with its panel it stays in the second-level cache.
const BLOCK_ROWS: usize = 128;

/// Panels turned at once: few enough to stay in a cache, enough that rows are not read anew for every one of them.
const TURNED_PANELS: usize = 8;

/// Rows of a register tile: sixteen sums of 512 bits, or twelve of 256.
fn tile_rows() -> usize {
    match isa() {
        Isa::Avx512 => TILE_ROWS,
        Isa::Avx2 | Isa::Baseline => 6,
    }
}
/// Multiply-adds below which starting threads costs more than it gains.
const PARALLEL_WORK: usize = 128 * 1024;

/// A strided view of a matrix inside a slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a, T = f32> {
    pub(crate) data: &'a [T],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl<'a, T: Copy> View<'a, T> {
    /// A row-major matrix.
    pub(crate) fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// Rows `row_stride` apart, columns adjacent.
    pub(crate) fn strided(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transpose, by exchanging strides.
    pub(crate) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn check(&self) {
        if self.rows > 0 && self.columns > 0 {
            let last = (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride;
            assert!(last < self.data.len(), "matrix view reaches beyond its data");
        }
    }
}

/// A right-hand matrix rearranged into panels of [`PANEL`] columns, each contiguous along `k`.
#[derive(Debug, Clone)]
pub(crate) struct Packed {
    pub(crate) k: usize,
    pub(crate) n: usize,
    data: Panels,
}

/// What panels are made of.
#[derive(Debug, Clone)]
enum Panels {
    Single(Vec<f32>),
    /// bfloat16, two rows (along `k`) woven together: see [`pair`]. Of an odd number of rows the last is woven with zeros.
    ///
    /// Widened, which is exact, on the way into a register they give the bytes that the same values in float32 would;
    /// woven they are what instructions for inner products of bfloat16 take.
    Half(Vec<u32>),
}

/// Two adjacent bfloat16 numbers of a column, the first in the low half.
fn pair(first: bf16, second: bf16) -> u32 {
    u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
}

/// The `p`-th number of the pair.
fn of_pair(pair: u32, p: usize) -> bf16 {
    bf16::from_bits(if p.is_multiple_of(2) { pair as u16 } else { (pair >> 16) as u16 })
}

impl Default for Packed {
    fn default() -> Self {
        Self { k: 0, n: 0, data: Panels::Single(Vec::new()) }
    }
}

impl Packed {
    /// Packs `b` (`[k, n]`).
    pub(crate) fn new(b: View<'_>) -> Self {
        let mut packed = Self::default();
        packed.pack(b, true);
        packed
    }

    /// Packs the transpose of `rows` (`[n, k]`, row-major): a checkpoint's weight. `reader` is told which of `rows`
    /// are read next and which will not be read again.
    pub(crate) fn of_rows(rows: &[f32], n: usize, k: usize, reader: Reader<'_>) -> Self {
        Self { k, n, data: Panels::Single(panels_of_rows(rows, n, k, reader)) }
    }

    /// The same, kept in bfloat16.
    pub(crate) fn half_of_rows(rows: &[bf16], n: usize, k: usize, reader: Reader<'_>) -> Self {
        let as_stored = bytemuck::try_cast_slice::<bf16, u32>(rows).ok();
        let as_stored = as_stored.filter(|_| k.is_multiple_of(2) && cfg!(target_endian = "little"));
        let panels = if let Some(pairs) = as_stored {
            let numbers = |pairs: Range<usize>| 2 * pairs.start..2 * pairs.end;
            let before = |pairs| (reader.before)(numbers(pairs));
            let after = |pairs| (reader.after)(numbers(pairs));
            panels_of_rows(pairs, n, k / 2, Reader { before: &before, after: &after })
        } else {
            (reader.before)(0..rows.len());
            let pairs = woven(rows, k);
            (reader.after)(0..rows.len());
            panels_of_rows(&pairs, n, k.div_ceil(2), Reader::NONE)
        };
        Self { k, n, data: Panels::Half(panels) }
    }

    /// Packs into the memory already held.
    pub(crate) fn pack(&mut self, b: View<'_>, parallel: bool) {
        (self.k, self.n) = (b.rows, b.columns);
        if let Panels::Half(_) = self.data {
            self.data = Panels::Single(Vec::new());
        }
        if let Panels::Single(data) = &mut self.data {
            pack_panels(b, data, parallel);
        }
    }

    /// Whether the panels are bfloat16.
    pub(crate) fn is_half(&self) -> bool {
        matches!(self.data, Panels::Half(_))
    }

    /// Columns `columns` of the matrix (rows of a checkpoint's weight), one after another, `k` numbers each.
    pub(crate) fn gather(&self, columns: &[u32]) -> Vec<f32> {
        super::computed(columns.len() * self.k, self.k.max(1), |i, row| {
            let (panel, lane) = (columns[i] as usize / PANEL, columns[i] as usize % PANEL);
            match &self.data {
                Panels::Single(data) => {
                    let panel = &data[panel * self.k * PANEL..];
                    for (p, value) in row.iter_mut().enumerate() {
                        *value = panel[p * PANEL + lane];
                    }
                }
                Panels::Half(data) => {
                    let panel = &data[panel * self.k.div_ceil(2) * PANEL..];
                    for (p, value) in row.iter_mut().enumerate() {
                        *value = of_pair(panel[p / 2 * PANEL + lane], p).to_f32();
                    }
                }
            }
        })
    }

    /// Undoes the packing: `[n, k]` row-major, the layout of a checkpoint's weight.
    pub(crate) fn unpack_transposed(&self) -> Vec<f32> {
        let all: Vec<u32> = (0..self.n as u32).collect();
        self.gather(&all)
    }

    /// Panels `panels` of the transpose (`[n, k]`) from depth `depth.start`, a multiple of [`PANEL`], to `depth.end`, one
    /// after another in the memory of `turned`, each as long as the number returned.
    ///
    /// Both sides consist of squares of [`PANEL`] by [`PANEL`] numbers, contiguous on either.
    fn turn(&self, panels: Range<usize>, depth: Range<usize>, turned: &mut Vec<u32>) -> usize {
        let square_len = |depth: usize| match &self.data {
            Panels::Single(_) => depth * PANEL,
            Panels::Half(_) => depth.div_ceil(2) * PANEL,
        };
        let (len, whole) = (square_len(depth.len()), square_len(PANEL));
        if turned.len() < panels.len() * len {
            turned.resize(panels.len() * len, 0);
        }
        // The squares of adjacent panels are adjacent in memory.
        for (square, start) in (depth.start / PANEL..).zip((0..len).step_by(whole)) {
            for (panel, out) in panels.clone().zip(turned.chunks_exact_mut(len)) {
                let out = &mut out[start..len.min(start + whole)];
                let width = PANEL.min(self.k - panel * PANEL);
                match &self.data {
                    Panels::Single(data) => {
                        let source = &data[(square * self.k + panel * PANEL) * PANEL..];
                        turn_square(source, width, bytemuck::cast_slice_mut(out));
                    }
                    Panels::Half(data) => {
                        let source = &data[(square * self.k.div_ceil(2) + panel * PANEL / 2) * PANEL..];
                        turn_woven_square(source, width.div_ceil(2), out);
                    }
                }
            }
        }
        len
    }

    /// What is at `words`, which holds numbers as the panels do.
    fn elements(&self, words: *const u32) -> Elements {
        match self.data {
            Panels::Single(_) => Elements::Single(words.cast()),
            Panels::Half(_) => Elements::Half(words),
        }
    }

    /// Where panel `panel` begins at depth `p0`, which is even.
    fn start(&self, panel: usize, p0: usize) -> Elements {
        match &self.data {
            Panels::Single(data) => Elements::Single(data[(panel * self.k + p0) * PANEL..].as_ptr()),
            Panels::Half(data) => {
                Elements::Half(data[(panel * self.k.div_ceil(2) + p0 / 2) * PANEL..].as_ptr())
            }
        }
    }
}

/// The panels of `b` (`[k, n]`) in the memory of `data`.
fn pack_panels<T: Copy + Default + Send + Sync>(b: View<'_, T>, data: &mut Vec<T>, parallel: bool) {
    b.check();
    let panel_len = b.rows * PANEL;
    data.resize(b.columns.div_ceil(PANEL) * panel_len, T::default());
    if panel_len == 0 {
        return;
    }
    if parallel && b.rows * b.columns > 64 * 1024 {
        data.par_chunks_mut(panel_len).enumerate().for_each(|(panel, out)| pack_panel(b, panel * PANEL, out));
    } else {
        for (panel, out) in data.chunks_mut(panel_len).enumerate() {
            pack_panel(b, panel * PANEL, out);
        }
    }
}

/// The panels of the transpose of `rows` (`[n, k]`), a megabyte of `rows` at a time.
fn panels_of_rows<T: Copy + Default + Send + Sync>(
    rows: &[T],
    n: usize,
    k: usize,
    reader: Reader<'_>,
) -> Vec<T> {
    const AT_A_TIME: usize = 1 << 18;
    let panel_len = k * PANEL;
    let mut data = vec![T::default(); n.div_ceil(PANEL) * panel_len];
    if panel_len == 0 {
        return data;
    }
    let view = View::new(rows, n, k).transposed();
    view.check();
    let panels = AT_A_TIME.div_ceil(panel_len);
    data.par_chunks_mut(panels * panel_len).enumerate().for_each(|(chunk, out)| {
        let first = chunk * panels;
        for (panel, out) in (first..).zip(out.chunks_exact_mut(panel_len)) {
            (reader.before)(panel * panel_len..((panel + 1) * panel_len).min(rows.len()));
            pack_panel(view, panel * PANEL, out);
        }
        (reader.after)(first * panel_len..((first + panels) * panel_len).min(rows.len()));
    });
    data
}

for_each_isa! {
/// The transpose of the first `width` rows of `source`, [`PANEL`] apart, as rows of [`PANEL`], as many as `out` has.
fn turn_square(source: &[f32], width: usize, out: &mut [f32]) {
    transpose::<f32, PANEL>(source, PANEL, width, out);
}
}

for_each_isa! {
/// As [`turn_square`] for woven rows: `width` of them, each of two rows.
///
/// Two numbers below one another and two beside them become two beside one another and two below: a transpose of pairs of
/// pairs, and of the four numbers in each the two in the middle change places.
fn turn_woven_square(source: &[u32], width: usize, out: &mut [u32]) {
    let fours = source.as_chunks::<2>().0;
    let turned = out.as_chunks_mut::<2>().0;
    transpose::<[u32; 2], { PANEL / 2 }>(fours, PANEL / 2, width, turned);
    for [first, second] in turned {
        (*first, *second) = (*first & 0xffff | *second << 16, *first >> 16 | *second & 0xffff_0000);
    }
}
}

/// Rows of `k` numbers each as rows of pairs.
fn woven(rows: &[bf16], k: usize) -> Vec<u32> {
    let width = k.div_ceil(2);
    let mut pairs = vec![0; rows.len().checked_div(k).unwrap_or(0) * width];
    if width > 0 {
        pairs.par_chunks_mut(width).zip(rows.par_chunks(k)).for_each(|(pairs, row)| {
            for (out, numbers) in pairs.iter_mut().zip(row.chunks(2)) {
                *out = pair(numbers[0], numbers.get(1).copied().unwrap_or(bf16::ZERO));
            }
        });
    }
    pairs
}

for_each_isa! {
/// A row of float32 numbers as pairs of bfloat16, each rounded to the nearest, to even where two are as near.
fn weave_row(row: &[f32], pairs: &mut [u32]) {
    let half = |value: f32| {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        // What is no number stays none: rounding must not carry it into infinity.
        if value.is_nan() { bits | 0x0040_0000 } else { rounded }
    };
    let (whole, rest) = row.as_chunks::<2>();
    for (out, [first, second]) in pairs.iter_mut().zip(whole) {
        *out = half(*first) >> 16 | (half(*second) & 0xffff_0000);
    }
    if let (Some(out), [last]) = (pairs.last_mut(), rest) {
        *out = half(*last) >> 16;
    }
}
}

/// The rows of `a` as pairs of bfloat16.
fn rounded_rows(a: View<'_>) -> Vec<u32> {
    assert_eq!(a.column_stride, 1, "rows to be rounded must be contiguous");
    let width = a.columns.div_ceil(2);
    let mut pairs = vec![0; a.rows * width];
    if width == 0 {
        return pairs;
    }
    a.check();
    let rows_at_a_time = (16 * 1024 / width).max(1);
    pairs.par_chunks_mut(rows_at_a_time * width).enumerate().for_each(|(chunk, pairs)| {
        for (row, pairs) in (chunk * rows_at_a_time..).zip(pairs.chunks_exact_mut(width)) {
            weave_row(&a.data[row * a.row_stride..][..a.columns], pairs);
        }
    });
    pairs
}

/// Where a tile finds its right-hand side.
#[derive(Debug, Clone, Copy)]
enum Elements {
    Single(*const f32),
    /// Woven bfloat16 numbers.
    Half(*const u32),
}

impl Elements {
    /// `columns` elements further.
    fn right(self, columns: usize) -> Self {
        match self {
            Self::Single(data) => Self::Single(data.wrapping_add(columns)),
            Self::Half(data) => Self::Half(data.wrapping_add(columns)),
        }
    }

    /// The address, whatever the numbers are.
    fn address(self) -> *const u8 {
        match self {
            Self::Single(data) => data.cast(),
            Self::Half(data) => data.cast(),
        }
    }
}

/// The transpose of `width` rows of `source`, `stride` apart, each as long as there are rows of `ROW` elements in `out`.
#[inline(always)]
fn transpose<T: Copy, const ROW: usize>(source: &[T], stride: usize, width: usize, out: &mut [T]) {
    // Tiles keep both sides within the cache; blocks of four by four become shuffles of vectors.
    const DEEP: usize = 64;
    const BLOCK: usize = 4;
    for (tile, out) in out.chunks_mut(DEEP * ROW).enumerate() {
        let out = out.as_chunks_mut::<ROW>().0;
        let source = &source[tile * DEEP..];
        let blocks = if width == ROW { ROW } else { 0 };
        for j in (0..blocks).step_by(BLOCK) {
            let rows: [&[T]; BLOCK] = std::array::from_fn(|row| &source[(j + row) * stride..][..out.len()]);
            let (whole, rest) = out.as_chunks_mut::<BLOCK>();
            let at = whole.len() * BLOCK;
            let starts = rows.map(|row| row.as_chunks::<BLOCK>().0);
            for (p, out) in whole.iter_mut().enumerate() {
                let block = starts.map(|row| row[p]);
                for (q, out) in out.iter_mut().enumerate() {
                    out[j..j + BLOCK].copy_from_slice(&block.map(|row| row[q]));
                }
            }
            for (q, out) in rest.iter_mut().enumerate() {
                out[j..j + BLOCK].copy_from_slice(&rows.map(|row| row[at + q]));
            }
        }
        for j in blocks..width {
            for (row, value) in out.iter_mut().zip(&source[j * stride..]) {
                row[j] = *value;
            }
        }
    }
}

fn pack_panel<T: Copy + Default>(b: View<'_, T>, column: usize, out: &mut [T]) {
    let width = PANEL.min(b.columns - column);
    if b.column_stride == 1 {
        for (p, row) in out.chunks_exact_mut(PANEL).enumerate() {
            let start = p * b.row_stride + column;
            row[..width].copy_from_slice(&b.data[start..start + width]);
            row[width..].fill(T::default());
        }
        return;
    }
    if width < PANEL {
        out.fill(T::default());
    }
    if b.row_stride == 1 {
        transpose::<T, PANEL>(&b.data[column * b.column_stride..], b.column_stride, width, out);
        return;
    }
    for (p, row) in out.chunks_exact_mut(PANEL).enumerate() {
        for (j, value) in row[..width].iter_mut().enumerate() {
            *value = b.data[p * b.row_stride + (column + j) * b.column_stride];
        }
    }
}

/// What each element's chain of multiply-adds starts from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Zero.
    Zero,
    /// What the result's memory holds.
    Result,
    /// The bias of its column.
    Bias(&'a [f32]),
    /// The element at its place of a row-major matrix of the result's shape, plus the bias of its column where there is one.
    Added(&'a [f32], Option<&'a [f32]>),
}

impl<'a> Start<'a> {
    /// A bias, if there is one.
    pub(crate) fn bias(bias: Option<&'a [f32]>) -> Self {
        bias.map_or(Self::Zero, Self::Bias)
    }

    fn check(&self, rows: usize, columns: usize) {
        let (matrix, bias) = match *self {
            Self::Zero | Self::Result => (None, None),
            Self::Bias(bias) => (None, Some(bias)),
            Self::Added(matrix, bias) => (Some(matrix), bias),
        };
        assert!(bias.is_none_or(|bias| bias.len() == columns), "a bias of another width");
        assert!(matrix.is_none_or(|matrix| matrix.len() == rows * columns), "a sum of other shapes");
    }

    /// The element that column `column` of row `row` of `columns` starts from; none where that is the result itself.
    fn at(&self, row: usize, column: usize, columns: usize) -> Option<f32> {
        match *self {
            Self::Zero => Some(0.0),
            Self::Result => None,
            Self::Bias(bias) => Some(bias[column]),
            Self::Added(matrix, bias) => {
                Some(matrix[row * columns + column] + bias.map_or(0.0, |b| b[column]))
            }
        }
    }
}

/// A right-hand side, `[k, n]`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Right<'a> {
    /// In panels.
    Packed(&'a Packed),
    /// The transpose of what is in panels (`[n, k]`): turned a few panels at a time on the way, with the
    /// bytes that panels of the transpose itself would give. So no second layout takes memory.
    Transposed(&'a Packed),
    /// Rows read in place: columns adjacent, their number a multiple of 16.
    Direct(View<'a>),
}

impl Right<'_> {
    /// Whether it is held in bfloat16.
    fn is_half(&self) -> bool {
        match self {
            Self::Packed(packed) | Self::Transposed(packed) => packed.is_half(),
            Self::Direct(_) => false,
        }
    }

    fn dims(&self) -> (usize, usize) {
        match self {
            Self::Packed(packed) => (packed.k, packed.n),
            Self::Transposed(packed) => (packed.n, packed.k),
            Self::Direct(view) => (view.rows, view.columns),
        }
    }
}

/// A left-hand side, `[m, k]`.
#[derive(Debug, Clone, Copy)]
enum Left<'a> {
    /// As it is.
    Single(View<'a>),
    /// Rows of pairs of bfloat16, for a right-hand side in bfloat16: products of bfloat16, summed in float32.
    Pairs(View<'a, u32>),
}

impl Left<'_> {
    fn rows(&self) -> usize {
        match self {
            Self::Single(view) => view.rows,
            Self::Pairs(view) => view.rows,
        }
    }

    /// Where row `row` begins at depth `p0`, and how far it is to the next row and the next column.
    fn start(&self, row: usize, p0: usize) -> (*const f32, usize, usize) {
        match self {
            Self::Single(a) => {
                (a.data[row * a.row_stride + p0 * a.column_stride..].as_ptr(), a.row_stride, a.column_stride)
            }
            Self::Pairs(a) => (a.data[row * a.row_stride + p0 / 2..].as_ptr().cast(), a.row_stride, 1),
        }
    }
}

/// Whether a view can be read in place.
pub(crate) fn is_direct(b: &View<'_>) -> bool {
    b.column_stride == 1 && b.columns.is_multiple_of(LANES)
}

/// `c = a · b`, or `c += a · b`, in parallel where the work is worth it.
///
/// `c` is row-major with rows `row_stride` apart.
pub(crate) fn gemm(a: View<'_>, b: View<'_>, c: &mut [f32], row_stride: usize, accumulate: bool) {
    if is_direct(&b) {
        product(a, Right::Direct(b), c, row_stride, accumulate, true);
    } else {
        product(a, Right::Packed(&Packed::new(b)), c, row_stride, accumulate, true);
    }
}

/// `start + a · b` in new memory, `rows x columns`; `start` is not [`Start::Result`].
///
/// The memory is first touched by the threads that compute it: clearing it beforehand would cost as much as a small
/// product.
pub(crate) fn product_new(a: View<'_>, b: Right<'_>, start: Start<'_>) -> Vec<f32> {
    assert!(!matches!(start, Start::Result), "new memory holds nothing to start from");
    let (rows, (_, columns)) = (a.rows, b.dims());
    let len = rows * columns;
    let mut c = Vec::with_capacity(len);
    let out = Output::of_spare(&mut c, len);
    // SAFETY: nothing else knows the new memory; it has room for `len` elements.
    unsafe { product_into(Left::Single(a), b, out, columns, start, true) };
    // SAFETY: the product wrote every element.
    unsafe { c.set_len(len) };
    c
}

/// As [`product_new`] with the rows of `a` rounded to bfloat16, which `b` is in: each product is exact, and is added in
/// float32, for every two of them along `k` the second first (the order of the instruction there is for it).
pub(crate) fn half_product_new(a: View<'_>, b: Right<'_>, start: Start<'_>) -> Vec<f32> {
    let (depth, columns) = b.dims();
    assert!(b.is_half() && a.columns == depth, "a product of bfloat16 needs bfloat16 of the same depth");
    assert!(!matches!(start, Start::Result), "new memory holds nothing to start from");
    let pairs = rounded_rows(a);
    let a = Left::Pairs(View::new(&pairs, a.rows, a.columns.div_ceil(2)));
    let len = a.rows() * columns;
    let mut c = Vec::with_capacity(len);
    let out = Output::of_spare(&mut c, len);
    // SAFETY: nothing else knows the new memory; it has room for `len` elements.
    unsafe { product_into(a, b, out, columns, start, true) };
    // SAFETY: the product wrote every element.
    unsafe { c.set_len(len) };
    c
}

/// As [`product_new`] for a right-hand side in any layout.
pub(crate) fn gemm_new(a: View<'_>, b: View<'_>, start: Start<'_>) -> Vec<f32> {
    if is_direct(&b) {
        product_new(a, Right::Direct(b), start)
    } else {
        product_new(a, Right::Packed(&Packed::new(b)), start)
    }
}

/// As [`gemm`], on the calling thread only; `scratch` is reused between calls.
#[cfg(test)]
fn gemm_serial(
    a: View<'_>,
    b: View<'_>,
    c: &mut [f32],
    row_stride: usize,
    accumulate: bool,
    scratch: &mut Packed,
) {
    // SAFETY: `c` is borrowed for the whole call.
    unsafe { Output::new(c).gemm_serial(a, b, row_stride, accumulate, scratch) }
}

/// A matrix that several threads write, each its own elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    data: *mut f32,
    len: usize,
}
// SAFETY: whoever writes through an `Output` promises to touch elements that no other thread touches.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// Shares `data` among the tasks of one operation.
    pub(crate) fn new(data: &mut [f32]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len() }
    }

    /// The memory that `vector` holds but has not filled; it has room for `len` elements.
    pub(crate) fn of_spare(vector: &mut Vec<f32>, len: usize) -> Self {
        assert!(vector.capacity() >= len);
        Self { data: vector.as_mut_ptr(), len }
    }

    /// The first `len` elements.
    ///
    /// # Safety
    /// No other thread touches them while the slice lives; they are written before they are read.
    pub(crate) unsafe fn as_slice<'a>(self, len: usize) -> &'a mut [f32] {
        assert!(len <= self.len);
        // SAFETY: in bounds; undisturbed by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data, len) }
    }

    /// The matrix from element `start` on.
    pub(crate) fn from(self, start: usize) -> Self {
        assert!(start <= self.len);
        Self { data: self.data.wrapping_add(start), len: self.len - start }
    }

    /// Copies `values` to the front.
    ///
    /// # Safety
    /// No other thread touches these elements meanwhile.
    pub(crate) unsafe fn write(self, values: &[f32]) {
        assert!(values.len() <= self.len);
        // SAFETY: in bounds; undisturbed by the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.data, values.len()) };
    }

    /// As [`gemm_serial`] into this matrix.
    ///
    /// # Safety
    /// No other thread touches the elements of the result meanwhile.
    pub(crate) unsafe fn gemm_serial(
        self,
        a: View<'_>,
        b: View<'_>,
        row_stride: usize,
        accumulate: bool,
        scratch: &mut Packed,
    ) {
        let b = if is_direct(&b) {
            Right::Direct(b)
        } else {
            scratch.pack(b, false);
            Right::Packed(scratch)
        };
        // SAFETY: the caller's promise.
        unsafe { product_into(Left::Single(a), b, self, row_stride, start_of(accumulate), false) };
    }
}

/// The product proper. See [`gemm`].
pub(crate) fn product(
    a: View<'_>,
    b: Right<'_>,
    c: &mut [f32],
    row_stride: usize,
    accumulate: bool,
    parallel: bool,
) {
    // SAFETY: `c` is borrowed for the whole call.
    unsafe { product_into(Left::Single(a), b, Output::new(c), row_stride, start_of(accumulate), parallel) }
}

fn start_of(accumulate: bool) -> Start<'static> {
    if accumulate { Start::Result } else { Start::Zero }
}

/// # Safety
/// No other thread touches the result's elements meanwhile.
unsafe fn product_into(
    a: Left<'_>,
    b: Right<'_>,
    out: Output,
    row_stride: usize,
    start: Start<'_>,
    parallel: bool,
) {
    let (k, n) = b.dims();
    let m = a.rows();
    if m == 0 || n == 0 {
        return;
    }
    match a {
        Left::Single(a) => {
            assert_eq!(a.columns, k, "inner dimensions of a matrix product differ");
            a.check();
        }
        Left::Pairs(a) => {
            assert_eq!(a.columns, k.div_ceil(2), "inner dimensions of a matrix product differ");
            assert!(b.is_half(), "pairs meet something else");
            a.check();
        }
    }
    assert!((m - 1) * row_stride + n <= out.len, "result of a matrix product does not fit");
    if let Right::Direct(view) = b {
        view.check();
        assert!(is_direct(&view), "a right-hand side must be packed first");
    }
    start.check(m, n);
    if k == 0 {
        for row in 0..m {
            let values: Option<Vec<f32>> = (0..n).map(|column| start.at(row, column, n)).collect();
            if let Some(values) = values {
                // SAFETY: in bounds as just checked; undisturbed by the caller's promise.
                unsafe { out.from(row * row_stride).write(&values) };
            }
        }
        return;
    }
    let panels = n.div_ceil(PANEL);
    let threads = rayon::current_num_threads();
    if !parallel || threads == 1 || m * n * k < PARALLEL_WORK {
        block(a, b, out, row_stride, start, 0..m, 0..panels);
        return;
    }
    // A few tasks for each thread; rows are split first, for then every thread reads each panel once. Panels that are turned
    // are split first: none is turned twice.
    let (row_blocks, tasks) = (m.div_ceil(BLOCK_ROWS), 4 * threads);
    let (row_tasks, panel_tasks) = if let Right::Transposed(_) = b {
        let panel_tasks = tasks.min(panels);
        (tasks.div_ceil(panel_tasks).min(row_blocks), panel_tasks)
    } else {
        let row_tasks = row_blocks.min(tasks);
        (row_tasks, tasks.div_ceil(row_tasks).min(panels))
    };
    let rows_per = m.div_ceil(row_tasks).next_multiple_of(tile_rows());
    let panels_per = panels.div_ceil(panel_tasks);
    let row_tasks = m.div_ceil(rows_per);
    let panel_tasks = panels.div_ceil(panels_per);
    (0..row_tasks * panel_tasks).into_par_iter().for_each(|task| {
        let (r, p) = (task / panel_tasks * rows_per, task % panel_tasks * panels_per);
        block(a, b, out, row_stride, start, r..(r + rows_per).min(m), p..(p + panels_per).min(panels));
    });
}

thread_local! {
    /// Panels that a thread has turned.
    static TURNED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// One thread's share: `rows` x `panels`, blocked for the caches.
fn block(
    a: Left<'_>,
    b: Right<'_>,
    out: Output,
    row_stride: usize,
    start: Start<'_>,
    rows: Range<usize>,
    panels: Range<usize>,
) {
    let (k, n) = b.dims();
    let tile_rows = tile_rows();
    let block_rows = BLOCK_ROWS / tile_rows * tile_rows;
    let depth = match a {
        Left::Single(_) => DEPTH,
        Left::Pairs(_) => 2 * DEPTH,
    };
    let (mut turned, panels_at_once) = match b {
        Right::Transposed(_) => (TURNED.take(), TURNED_PANELS),
        _ => (Vec::new(), panels.len()),
    };
    for p0 in (0..k).step_by(depth) {
        let depth = depth.min(k - p0);
        for first in panels.clone().step_by(panels_at_once) {
            let panels = first..(first + panels_at_once).min(panels.end);
            let turned_len = match b {
                Right::Transposed(packed) => packed.turn(panels.clone(), p0..p0 + depth, &mut turned),
                _ => 0,
            };
            for r0 in rows.clone().step_by(block_rows) {
                let r1 = (r0 + block_rows).min(rows.end);
                for panel in panels.clone() {
                    let column = panel * PANEL;
                    let (b_start, b_stride) = match b {
                        Right::Packed(packed) => (packed.start(panel, p0), PANEL),
                        Right::Transposed(packed) => {
                            let start = turned[(panel - panels.start) * turned_len..].as_ptr();
                            (packed.elements(start), PANEL)
                        }
                        Right::Direct(view) => {
                            let start = view.data[p0 * view.row_stride + column..].as_ptr();
                            (Elements::Single(start), view.row_stride)
                        }
                    };
                    let mut r = r0;
                    while r < r1 {
                        let count = tile_rows.min(r1 - r);
                        let c = out.data.wrapping_add(r * row_stride + column);
                        let null = std::ptr::null();
                        let (from, from_row, bias) = match start {
                            // Later blocks along `k` go on from what is there.
                            _ if p0 > 0 => (c.cast_const(), row_stride, null),
                            Start::Zero => (null, 0, null),
                            Start::Result => (c.cast_const(), row_stride, null),
                            Start::Bias(bias) => (bias[column..].as_ptr(), 0, null),
                            Start::Added(matrix, bias) => {
                                let bias = bias.map_or(null, |bias| bias[column..].as_ptr());
                                (matrix[r * n + column..].as_ptr(), n, bias)
                            }
                        };
                        let (a_start, a_row, a_column) = a.start(r, p0);
                        let tile = Tile {
                            k: depth,
                            a: a_start,
                            a_row,
                            a_column,
                            pairs: matches!(a, Left::Pairs(_)),
                            b: b_start,
                            b_row: b_stride,
                            c,
                            c_row: row_stride,
                            columns: PANEL.min(n - column),
                            from,
                            from_row,
                            bias,
                        };
                        // SAFETY: `product` checked that `a`, `b` and `c` hold every element of this tile, tasks have
                        // disjoint tiles, and `isa` found the instructions on this processor.
                        unsafe { tile.run(count) };
                        r += count;
                    }
                }
            }
        }
    }
    if !turned.is_empty() {
        TURNED.set(turned);
    }
}

/// Up to [`tile_rows`] rows by up to [`PANEL`] columns of the result.
struct Tile {
    k: usize,
    a: *const f32,
    a_row: usize,
    a_column: usize,
    /// Whether `a` is pairs of bfloat16, and not what its type says.
    pairs: bool,
    b: Elements,
    /// Elements from one row to the next; of woven numbers from one pair of rows to the next.
    b_row: usize,
    c: *mut f32,
    c_row: usize,
    columns: usize,
    /// What the sums start from, as `c` is laid out but for the distance of its rows; null: zero.
    from: *const f32,
    from_row: usize,
    /// Added to every row of `from`; null: nothing.
    bias: *const f32,
}

/// What a kernel multiplies: float32 with float32,
const SINGLE: u8 = 0;
/// float32 with widened bfloat16,
const WIDENED: u8 = 1;
/// or bfloat16 with bfloat16.
const HALF: u8 = 2;

macro_rules! by_rows {
    ($tile:expr, $count:expr, $kernel:ident, $vectors:literal) => {
        match ($tile.b, $tile.pairs) {
            (Elements::Single(_), _) => by_rows!($tile, $count, $kernel, $vectors, SINGLE),
            (Elements::Half(_), false) => by_rows!($tile, $count, $kernel, $vectors, WIDENED),
            (Elements::Half(_), true) => by_rows!($tile, $count, $kernel, $vectors, HALF),
        }
    };
    ($tile:expr, $count:expr, $kernel:ident, $vectors:literal, $what:ident) => {
        // SAFETY: the caller of `Tile::run` vouches for pointers and instructions.
        unsafe {
            match $count {
                1 => $kernel::<1, $vectors, $what>($tile),
                2 => $kernel::<2, $vectors, $what>($tile),
                3 => $kernel::<3, $vectors, $what>($tile),
                4 => $kernel::<4, $vectors, $what>($tile),
                5 => $kernel::<5, $vectors, $what>($tile),
                6 => $kernel::<6, $vectors, $what>($tile),
                7 => $kernel::<7, $vectors, $what>($tile),
                _ => $kernel::<8, $vectors, $what>($tile),
            }
        }
    };
}

impl Tile {
    /// # Safety
    /// All elements the tile names exist, and nobody else writes those of `c`.
    unsafe fn run(&self, count: usize) {
        match isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 if self.pairs && has_inner_products() => {
                if self.columns > LANES {
                    by_rows!(self, count, tile_inner, 2, HALF);
                } else {
                    by_rows!(self, count, tile_inner, 1, HALF);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                if self.columns > LANES {
                    by_rows!(self, count, tile_avx512, 2);
                } else {
                    by_rows!(self, count, tile_avx512, 1);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                for half in self.halves() {
                    by_rows!(&half, count, tile_avx2, 0);
                }
            }
            _ => {
                for half in self.halves() {
                    by_rows!(&half, count, tile_portable, 0);
                }
            }
        }
    }

    /// The tile as one or two tiles of at most [`LANES`] columns.
    fn halves(&self) -> impl Iterator<Item = Tile> + '_ {
        (0..self.columns).step_by(LANES).map(|column| Tile {
            b: self.b.right(column),
            c: self.c.wrapping_add(column),
            columns: LANES.min(self.columns - column),
            from: right(self.from, column),
            bias: right(self.bias, column),
            ..*self
        })
    }
}

/// `count` elements further; what is absent stays absent.
fn right(data: *const f32, count: usize) -> *const f32 {
    if data.is_null() { data } else { data.wrapping_add(count) }
}

/// Whether the processor multiplies pairs of bfloat16.
#[cfg(target_arch = "x86_64")]
fn has_inner_products() -> bool {
    is_x86_feature_detected!("avx512bf16")
}

/// The sums of a tile of at most [`PANEL`] columns before and after its products.
#[cfg(target_arch = "x86_64")]
mod sums {
    use super::{LANES, Tile};
    use std::arch::x86_64::{
        __m512, _mm512_add_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
        _mm512_setzero_ps, _mm512_storeu_ps,
    };

    /// The columns that the last of `VECTORS` vectors has.
    fn mask<const VECTORS: usize>(t: &Tile) -> u16 {
        let last = t.columns - (VECTORS - 1) * LANES;
        if last == LANES { u16::MAX } else { (1u16 << last) - 1 }
    }

    /// What the sums start from.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn load<const ROWS: usize, const VECTORS: usize>(
        t: &Tile,
    ) -> [[__m512; VECTORS]; ROWS] {
        let mask = mask::<VECTORS>(t);
        // SAFETY: see `Tile::run`; partial vectors are masked.
        unsafe {
            let load = |from: *const f32, v: usize| {
                if v + 1 == VECTORS && mask != u16::MAX {
                    _mm512_maskz_loadu_ps(mask, from.add(v * LANES))
                } else {
                    _mm512_loadu_ps(from.add(v * LANES))
                }
            };
            let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
            if !t.from.is_null() {
                for (i, row) in acc.iter_mut().enumerate() {
                    let from = t.from.add(i * t.from_row);
                    for (v, value) in row.iter_mut().enumerate() {
                        *value = load(from, v);
                    }
                }
            }
            if !t.bias.is_null() {
                for row in &mut acc {
                    for (v, value) in row.iter_mut().enumerate() {
                        *value = _mm512_add_ps(*value, load(t.bias, v));
                    }
                }
            }
            acc
        }
    }

    /// Writes the sums.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn store<const ROWS: usize, const VECTORS: usize>(
        t: &Tile,
        acc: &[[__m512; VECTORS]; ROWS],
    ) {
        let mask = mask::<VECTORS>(t);
        // SAFETY: as above.
        unsafe {
            for (i, row) in acc.iter().enumerate() {
                let c = t.c.add(i * t.c_row);
                for (v, value) in row.iter().enumerate() {
                    if v + 1 == VECTORS && mask != u16::MAX {
                        _mm512_mask_storeu_ps(c.add(v * LANES), mask, *value);
                    } else {
                        _mm512_storeu_ps(c.add(v * LANES), *value);
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn tile_avx512<const ROWS: usize, const VECTORS: usize, const WHAT: u8>(t: &Tile) {
    use std::arch::x86_64::{__m512, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps};
    // SAFETY: see `Tile::run`.
    unsafe {
        if WHAT != SINGLE {
            return tile_avx512_woven::<ROWS, VECTORS, WHAT>(t);
        }
        let mut acc = sums::load::<ROWS, VECTORS>(t);
        let mut b_row = t.b.address();
        let stride = t.b_row * 4;
        let b_at = |row: *const u8| {
            let mut b = [_mm512_setzero_ps(); VECTORS];
            for (v, value) in b.iter_mut().enumerate() {
                *value = _mm512_loadu_ps(row.add(v * LANES * 4).cast());
            }
            b
        };
        if t.a_column == 1 {
            let mut a_rows = [t.a; ROWS];
            for (i, row) in a_rows.iter_mut().enumerate() {
                *row = t.a.add(i * t.a_row);
            }
            for p in 0..t.k {
                let b = b_at(b_row);
                for i in 0..ROWS {
                    let x: __m512 = _mm512_set1_ps(*a_rows[i].add(p));
                    for v in 0..VECTORS {
                        acc[i][v] = _mm512_fmadd_ps(x, b[v], acc[i][v]);
                    }
                }
                b_row = b_row.wrapping_add(stride);
            }
        } else {
            let mut a_column = t.a;
            for _ in 0..t.k {
                let b = b_at(b_row);
                for i in 0..ROWS {
                    let x: __m512 = _mm512_set1_ps(*a_column.add(i * t.a_row));
                    for v in 0..VECTORS {
                        acc[i][v] = _mm512_fmadd_ps(x, b[v], acc[i][v]);
                    }
                }
                a_column = a_column.wrapping_add(t.a_column);
                b_row = b_row.wrapping_add(stride);
            }
        }
        sums::store(t, &acc);
    }
}

/// Woven bfloat16 numbers, two rows at a time: the bits of a bfloat16 are the upper half of a float32's.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn tile_avx512_woven<const ROWS: usize, const VECTORS: usize, const WHAT: u8>(t: &Tile) {
    use std::arch::x86_64::{
        __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_fmadd_ps, _mm512_loadu_si512,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_slli_epi32,
    };
    // SAFETY: see `Tile::run`.
    unsafe {
        let mut acc = sums::load::<ROWS, VECTORS>(t);
        let mut b_row = t.b.address();
        let mut a_rows = [t.a; ROWS];
        for (i, row) in a_rows.iter_mut().enumerate() {
            *row = t.a.add(i * t.a_row);
        }
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let mut step = 0;
        for p in (0..t.k).step_by(2) {
            let mut words = [_mm512_setzero_si512(); VECTORS];
            for (v, value) in words.iter_mut().enumerate() {
                *value = _mm512_loadu_si512(b_row.add(v * LANES * 4).cast());
            }
            let first = |word: __m512i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(word));
            let second = |word: __m512i| _mm512_castsi512_ps(_mm512_and_si512(word, upper));
            if WHAT == HALF {
                for i in 0..ROWS {
                    let x = _mm512_set1_epi32((*a_rows[i].add(step)).to_bits() as i32);
                    for v in 0..VECTORS {
                        acc[i][v] = _mm512_fmadd_ps(second(x), second(words[v]), acc[i][v]);
                        acc[i][v] = _mm512_fmadd_ps(first(x), first(words[v]), acc[i][v]);
                    }
                }
                step += 1;
            } else {
                for i in 0..ROWS {
                    let x = _mm512_set1_ps(*a_rows[i].add(step));
                    for v in 0..VECTORS {
                        acc[i][v] = _mm512_fmadd_ps(x, first(words[v]), acc[i][v]);
                    }
                }
                if p + 1 < t.k {
                    for i in 0..ROWS {
                        let x = _mm512_set1_ps(*a_rows[i].add(step + t.a_column));
                        for v in 0..VECTORS {
                            acc[i][v] = _mm512_fmadd_ps(x, second(words[v]), acc[i][v]);
                        }
                    }
                }
                step += 2 * t.a_column;
            }
            b_row = b_row.wrapping_add(t.b_row * 4);
        }
        sums::store(t, &acc);
    }
}

/// Pairs of bfloat16 with woven ones, by the instruction for them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile_inner<const ROWS: usize, const VECTORS: usize, const WHAT: u8>(t: &Tile) {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_si512,
    };
    // SAFETY: see `Tile::run`; both types are 512 bits.
    unsafe {
        let halves = |bits: __m512i| std::mem::transmute::<__m512i, __m512bh>(bits);
        let mut acc = sums::load::<ROWS, VECTORS>(t);
        let mut b_row = t.b.address();
        let mut a_rows = [t.a.cast::<i32>(); ROWS];
        for (i, row) in a_rows.iter_mut().enumerate() {
            *row = row.add(i * t.a_row);
        }
        for q in 0..t.k.div_ceil(2) {
            let mut b = [halves(_mm512_setzero_si512()); VECTORS];
            for (v, value) in b.iter_mut().enumerate() {
                *value = halves(_mm512_loadu_si512(b_row.add(v * LANES * 4).cast()));
            }
            for i in 0..ROWS {
                let x = halves(_mm512_set1_epi32(*a_rows[i].add(q)));
                for v in 0..VECTORS {
                    acc[i][v] = _mm512_dpbf16_ps(acc[i][v], x, b[v]);
                }
            }
            b_row = b_row.wrapping_add(t.b_row * 4);
        }
        sums::store(t, &acc);
    }
}

/// At most [`LANES`] columns, in two vectors of 256 bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2<const ROWS: usize, const UNUSED: usize, const WHAT: u8>(t: &Tile) {
    use std::arch::x86_64::{
        __m256, __m256i, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps,
        _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_slli_epi32, _mm256_storeu_ps,
    };
    const WIDTH: usize = LANES / 2;
    // SAFETY: see `Tile::run`; rows that end within the vectors go through memory of their own.
    unsafe {
        let columns = t.columns;
        let load = |from: *const f32| -> [__m256; 2] {
            if columns == LANES {
                return [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(WIDTH))];
            }
            let mut part = [0f32; LANES];
            std::ptr::copy_nonoverlapping(from, part.as_mut_ptr(), columns);
            [_mm256_loadu_ps(part.as_ptr()), _mm256_loadu_ps(part.as_ptr().add(WIDTH))]
        };
        let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
        if !t.from.is_null() {
            for (i, row) in acc.iter_mut().enumerate() {
                *row = load(t.from.add(i * t.from_row));
            }
        }
        if !t.bias.is_null() {
            let bias = load(t.bias);
            for row in &mut acc {
                *row = [_mm256_add_ps(row[0], bias[0]), _mm256_add_ps(row[1], bias[1])];
            }
        }
        let mut b_row = t.b.address();
        let mut a_rows = [t.a; ROWS];
        for (i, row) in a_rows.iter_mut().enumerate() {
            *row = t.a.add(i * t.a_row);
        }
        let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        // The bits of a bfloat16 are the upper half of a float32's.
        let of_word = |word: __m256i, is_second: bool| {
            let bits = if is_second { _mm256_and_si256(word, upper) } else { _mm256_slli_epi32::<16>(word) };
            _mm256_castsi256_ps(bits)
        };
        macro_rules! multiply {
            ($b:expr, $x:expr) => {
                let b = $b;
                for i in 0..ROWS {
                    let x = $x(i);
                    acc[i][0] = _mm256_fmadd_ps(x, b[0], acc[i][0]);
                    acc[i][1] = _mm256_fmadd_ps(x, b[1], acc[i][1]);
                }
            };
        }
        let mut step = 0;
        if WHAT == SINGLE {
            for _ in 0..t.k {
                let b: [__m256; 2] =
                    std::array::from_fn(|v| _mm256_loadu_ps(b_row.add(v * WIDTH * 4).cast()));
                multiply!(b, |i: usize| _mm256_set1_ps(*a_rows[i].add(step)));
                step += t.a_column;
                b_row = b_row.wrapping_add(t.b_row * 4);
            }
        } else {
            for p in (0..t.k).step_by(2) {
                let words: [__m256i; 2] =
                    std::array::from_fn(|v| _mm256_loadu_si256(b_row.add(v * WIDTH * 4).cast()));
                let halves = |is_second: bool| words.map(|word| of_word(word, is_second));
                if WHAT == HALF {
                    let x = |i: usize, is_second: bool| {
                        of_word(_mm256_set1_epi32((*a_rows[i].add(step)).to_bits() as i32), is_second)
                    };
                    multiply!(halves(true), |i: usize| x(i, true));
                    multiply!(halves(false), |i: usize| x(i, false));
                    step += 1;
                } else {
                    multiply!(halves(false), |i: usize| _mm256_set1_ps(*a_rows[i].add(step)));
                    if p + 1 < t.k {
                        let second = step + t.a_column;
                        multiply!(halves(true), |i: usize| _mm256_set1_ps(*a_rows[i].add(second)));
                    }
                    step += 2 * t.a_column;
                }
                b_row = b_row.wrapping_add(t.b_row * 4);
            }
        }
        for (i, row) in acc.iter().enumerate() {
            let c = t.c.add(i * t.c_row);
            if columns == LANES {
                _mm256_storeu_ps(c, row[0]);
                _mm256_storeu_ps(c.add(WIDTH), row[1]);
            } else {
                let mut part = [0f32; LANES];
                _mm256_storeu_ps(part.as_mut_ptr(), row[0]);
                _mm256_storeu_ps(part.as_mut_ptr().add(WIDTH), row[1]);
                std::ptr::copy_nonoverlapping(part.as_ptr(), c, columns);
            }
        }
    }
}

unsafe fn tile_portable<const ROWS: usize, const UNUSED: usize, const WHAT: u8>(t: &Tile) {
    // SAFETY: see `Tile::run`.
    unsafe { tile_lanes::<ROWS, { cfg!(any(target_feature = "fma", target_arch = "aarch64")) }, WHAT>(t) }
}

/// The kernel in plain Rust, left to the compiler's vectoriser; `FUSED` needs hardware fused multiply-add.
#[inline(always)]
unsafe fn tile_lanes<const ROWS: usize, const FUSED: bool, const WHAT: u8>(t: &Tile) {
    // SAFETY: see `Tile::run`. A right-hand side is readable to its full vector: panels are padded, and rows read in
    // place have a multiple of `LANES` columns.
    unsafe {
        let start = t.b.address();
        let mut acc = [[0f32; LANES]; ROWS];
        if !t.from.is_null() {
            for (i, row) in acc.iter_mut().enumerate() {
                for (j, value) in row[..t.columns].iter_mut().enumerate() {
                    *value = *t.from.add(i * t.from_row + j);
                }
            }
        }
        if !t.bias.is_null() {
            for row in &mut acc {
                for (j, value) in row[..t.columns].iter_mut().enumerate() {
                    *value += *t.bias.add(j);
                }
            }
        }
        let multiply = |acc: &mut [[f32; LANES]; ROWS], i: usize, x: f32, b: &[f32; LANES]| {
            for j in 0..LANES {
                acc[i][j] = if FUSED { x.mul_add(b[j], acc[i][j]) } else { x * b[j] + acc[i][j] };
            }
        };
        // The bits of a bfloat16 are the upper half of a float32's.
        let widened = |word: u32, p: usize| of_pair(word, p).to_f32();
        let steps = if WHAT == HALF { t.k.next_multiple_of(2) } else { t.k };
        for p in 0..steps {
            if WHAT == SINGLE {
                let b: [f32; LANES] = *start.add(p * t.b_row * 4).cast();
                for i in 0..ROWS {
                    multiply(&mut acc, i, *t.a.add(i * t.a_row + p * t.a_column), &b);
                }
                continue;
            }
            // Of a pair of bfloat16 the second comes first.
            let p = if WHAT == HALF { p ^ 1 } else { p };
            let words: [u32; LANES] = *start.add(p / 2 * t.b_row * 4).cast();
            let b = words.map(|word| widened(word, p));
            for i in 0..ROWS {
                let x = match WHAT {
                    HALF => widened((*t.a.add(i * t.a_row + p / 2)).to_bits(), p),
                    _ => *t.a.add(i * t.a_row + p * t.a_column),
                };
                multiply(&mut acc, i, x, &b);
            }
        }
        for (i, row) in acc.iter().enumerate() {
            for (j, value) in row[..t.columns].iter().enumerate() {
                *t.c.add(i * t.c_row + j) = *value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;
    use std::sync::Mutex;

    fn random(len: usize, index: u64) -> Vec<f32> {
        let mut values = vec![0.0; len];
        rng::fill_standard_normal(&mut rng::stream(3, "gemm", &[index]), &mut values);
        values
    }

    fn reference(a: View<'_>, b: View<'_>) -> Vec<f64> {
        let at = |v: &View<'_>, i: usize, j: usize| f64::from(v.data[i * v.row_stride + j * v.column_stride]);
        let mut c = vec![0.0; a.rows * b.columns];
        for i in 0..a.rows {
            for j in 0..b.columns {
                c[i * b.columns + j] = (0..a.columns).map(|p| at(&a, i, p) * at(&b, p, j)).sum();
            }
        }
        c
    }

    fn check_close(ours: &[f32], theirs: &[f64], k: usize) {
        // Rounding of a chain of k unit-variance products: partial sums of size sqrt(k), sqrt(k) roundings.
        let tolerance = 4.0 * 6e-8 * (k as f64) + 1e-6;
        for (x, y) in ours.iter().zip(theirs) {
            assert!((f64::from(*x) - y).abs() <= tolerance * (1.0 + y.abs()), "{x} {y}");
        }
    }

    const SHAPES: [(usize, usize, usize); 9] = [
        (1, 1, 1),
        (3, 17, 5),
        (8, 32, 64),
        (9, 33, 7),
        (64, 64, 64),
        (130, 100, 31),
        (257, 48, 1500),
        (5, 2112, 40),
        (300, 96, 200),
    ];

    #[test]
    fn every_layout_and_edge_equals_double_precision() {
        for (index, &(m, n, k)) in SHAPES.iter().enumerate() {
            let (a, b) = (random(m * k, index as u64), random(k * n, 100 + index as u64));
            let layouts = [
                (View::new(&a, m, k), View::new(&b, k, n)),
                (View::new(&a, k, m).transposed(), View::new(&b, k, n)),
                (View::new(&a, m, k), View::new(&b, n, k).transposed()),
            ];
            for (a, b) in layouts {
                let expected = reference(a, b);
                let mut c = vec![f32::NAN; m * n];
                gemm(a, b, &mut c, n, false);
                check_close(&c, &expected, k);
                gemm(a, b, &mut c, n, true);
                check_close(&c, &expected.iter().map(|v| 2.0 * v).collect::<Vec<_>>(), k);
                let mut serial = vec![f32::NAN; m * n];
                gemm_serial(a, b, &mut serial, n, false, &mut Packed::default());
                let mut parallel = vec![f32::NAN; m * n];
                gemm(a, b, &mut parallel, n, false);
                assert_eq!(serial, parallel);
            }
        }
    }

    #[test]
    fn sums_start_from_biases_and_matrices_as_if_those_had_been_in_the_result() {
        for (index, &(m, n, k)) in
            [(3, 17, 0), (9, 33, 7), (130, 100, 31), (257, 48, 1500)].iter().enumerate()
        {
            let (a, b) = (random(m * k, index as u64), random(k * n, 100 + index as u64));
            let (matrix, bias) = (random(m * n, 200), random(n, 201));
            let (a, b) = (View::new(&a, m, k), View::new(&b, k, n));
            let expected = |start: &dyn Fn(usize) -> f32| {
                let mut c: Vec<f32> = (0..m * n).map(start).collect();
                gemm(a, b, &mut c, n, true);
                c
            };
            let packed = Packed::new(b);
            let ours = |start| product_new(a, Right::Packed(&packed), start);
            assert_eq!(ours(Start::Zero), expected(&|_| 0.0));
            assert_eq!(ours(Start::Bias(&bias)), expected(&|i| bias[i % n]));
            assert_eq!(ours(Start::Added(&matrix, None)), expected(&|i| matrix[i]));
            assert_eq!(ours(Start::Added(&matrix, Some(&bias))), expected(&|i| matrix[i] + bias[i % n]));
        }
    }

    #[test]
    fn a_row_is_the_same_bytes_in_any_batch() {
        let (m, n, k) = (203, 129, 1100);
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let packed = Packed::new(View::new(&b, k, n));
        let mut whole = vec![0.0; m * n];
        product(View::new(&a, m, k), Right::Packed(&packed), &mut whole, n, false, true);
        for rows in [1, 2, 7, 64] {
            for start in (0..m).step_by(rows) {
                let count = rows.min(m - start);
                let mut part = vec![0.0; count * n];
                let view = View::new(&a[start * k..(start + count) * k], count, k);
                product(view, Right::Packed(&packed), &mut part, n, false, true);
                assert_eq!(part, whole[start * n..(start + count) * n]);
            }
        }
    }

    #[test]
    fn packing_is_undone_exactly() {
        let (n, k) = (70, 45);
        let weight = random(n * k, 5);
        let packed = Packed::new(View::new(&weight, n, k).transposed());
        assert_eq!(packed.unpack_transposed(), weight);
        assert_eq!(
            packed.gather(&[69, 3, 3]),
            [&weight[69 * k..], &weight[3 * k..4 * k], &weight[3 * k..4 * k]].concat()
        );
    }

    #[test]
    fn bfloat16_panels_give_the_bytes_of_their_widened_values() {
        for (index, &(m, n, k)) in SHAPES.iter().enumerate() {
            let a = random(m * k, index as u64);
            let weight: Vec<bf16> =
                random(n * k, 50 + index as u64).into_iter().map(bf16::from_f32).collect();
            let widened: Vec<f32> = weight.iter().map(|value| value.to_f32()).collect();
            let half = Packed::half_of_rows(&weight, n, k, Reader::NONE);
            let single = Packed::new(View::new(&widened, n, k).transposed());
            let [looked_at, released] = [(); 2].map(|()| Mutex::new(vec![0u8; n * k]));
            let count = |times: &Mutex<Vec<u8>>, range: Range<usize>| {
                times.lock().unwrap()[range].iter_mut().for_each(|times| *times += 1);
            };
            let before = |range: Range<usize>| count(&looked_at, range);
            let after = |range: Range<usize>| {
                assert!(looked_at.lock().unwrap()[range.clone()].iter().all(|&times| times == 1));
                count(&released, range);
            };
            let of_rows = Packed::of_rows(&widened, n, k, Reader { before: &before, after: &after });
            assert_eq!(of_rows.unpack_transposed(), widened);
            assert!(released.into_inner().unwrap().iter().all(|&times| times == 1));
            assert!(half.is_half() && !single.is_half());
            assert_eq!(half.unpack_transposed(), widened);
            let a = View::new(&a, m, k);
            assert_eq!(
                product_new(a, Right::Packed(&half), Start::Zero),
                product_new(a, Right::Packed(&single), Start::Zero)
            );
        }
    }

    #[test]
    fn panels_turned_on_the_way_give_the_bytes_of_panels_of_the_transpose() {
        // More panels than are turned at once, more rows than a block has, more depth than a block has.
        for (index, &(m, n, k)) in SHAPES.iter().chain([&(131, 2051, 321)]).enumerate() {
            let grad = random(m * n, index as u64);
            let rows: Vec<bf16> = random(n * k, 70 + index as u64).into_iter().map(bf16::from_f32).collect();
            let widened: Vec<f32> = rows.iter().map(|value| value.to_f32()).collect();
            let columns: Vec<bf16> = (0..k).flat_map(|p| rows[p..].iter().step_by(k).copied()).collect();
            let single = Packed::of_rows(&widened, n, k, Reader::NONE);
            let half = Packed::half_of_rows(&rows, n, k, Reader::NONE);
            let of_transpose = Packed::new(View::new(&widened, n, k));
            let half_of_transpose = Packed::half_of_rows(&columns, k, n, Reader::NONE);
            let (grad, start) = (View::new(&grad, m, n), random(m * k, 71));
            let start = Start::Added(&start, None);
            let expected = product_new(grad, Right::Packed(&of_transpose), start);
            for threads in [1, 2, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    assert_eq!(product_new(grad, Right::Transposed(&single), start), expected);
                    assert_eq!(product_new(grad, Right::Transposed(&half), start), expected);
                    assert_eq!(
                        half_product_new(grad, Right::Transposed(&half), start),
                        half_product_new(grad, Right::Packed(&half_of_transpose), start)
                    );
                });
            }
        }
    }

    #[test]
    fn products_of_bfloat16_sum_exact_products_in_single_precision_the_second_of_a_pair_first() {
        for (index, &(m, n, k)) in SHAPES.iter().chain([&(9, 40, 2111)]).enumerate() {
            let a = random(m * k, index as u64);
            let rows: Vec<bf16> = random(n * k, 60 + index as u64).into_iter().map(bf16::from_f32).collect();
            let packed = Packed::half_of_rows(&rows, n, k, Reader::NONE);
            let (right, matrix) = (Right::Packed(&packed), random(m * n, 61));
            let ours = half_product_new(View::new(&a, m, k), right, Start::Added(&matrix, None));
            let rounded: Vec<f32> = a.iter().map(|&value| bf16::from_f32(value).to_f32()).collect();
            for (i, j) in (0..m).step_by(3).flat_map(|i| (0..n).step_by(5).map(move |j| (i, j))) {
                let term = |sum: f32, p: usize| {
                    if p < k { rounded[i * k + p].mul_add(rows[j * k + p].to_f32(), sum) } else { sum }
                };
                let start = matrix[i * n + j];
                let expected = (0..k).step_by(2).fold(start, |sum, p| term(term(sum, p + 1), p));
                assert_eq!(ours[i * n + j], expected, "{m} x {n} x {k} at {i}, {j}");
            }
            let rest = half_product_new(View::new(&a[(m - 1) * k..], 1, k), right, Start::Zero);
            let whole = half_product_new(View::new(&a, m, k), right, Start::Zero);
            assert_eq!(rest, whole[(m - 1) * n..]);
        }
    }

    #[test]
    fn rounding_to_bfloat16_is_to_the_nearest_even_and_keeps_what_is_no_number() {
        let values = [1.0, 1.003_906_2, 1.011_718_8, -2.5e-3, f32::MAX, f32::INFINITY, f32::NAN, 1e-40, 0.1];
        let pairs = rounded_rows(View::new(&values, 1, values.len()));
        let ours: Vec<u16> = pairs.iter().flat_map(|pair| [*pair as u16, (pair >> 16) as u16]).collect();
        assert_eq!(ours.len(), 10);
        for (ours, value) in ours.iter().zip(values) {
            let expected = bf16::from_f32(value);
            assert!(
                *ours == expected.to_bits() || (value.is_nan() && bf16::from_bits(*ours).is_nan()),
                "{value}"
            );
        }
        let quiet_only_below = f32::from_bits(0x7f80_0001);
        assert!(of_pair(rounded_rows(View::new(&[quiet_only_below], 1, 1))[0], 0).is_nan());
    }

    #[test]
    fn the_lesser_kernels_agree_with_the_best() {
        let (m, n, k) = (8, 29, 201);
        let (a, b) = (random(m * k, 8), random(k * n, 9));
        let single = Packed::new(View::new(&b, k, n));
        let rows: Vec<bf16> = single.unpack_transposed().into_iter().map(bf16::from_f32).collect();
        let half = Packed::half_of_rows(&rows, n, k, Reader::NONE);
        let pairs = rounded_rows(View::new(&a, m, k));
        let wholes = [(&single, false), (&half, false), (&half, true)];
        for (packed, of_pairs) in wholes {
            let left = View::new(&a, m, k);
            let expected = if of_pairs {
                half_product_new(left, Right::Packed(packed), Start::Zero)
            } else {
                product_new(left, Right::Packed(packed), Start::Zero)
            };
            let mut plain = vec![0.0; m * n];
            let tile = Tile {
                k,
                a: if of_pairs { pairs.as_ptr().cast() } else { a.as_ptr() },
                a_row: if of_pairs { k.div_ceil(2) } else { k },
                a_column: 1,
                pairs: of_pairs,
                b: packed.start(0, 0),
                b_row: PANEL,
                c: plain.as_mut_ptr(),
                c_row: n,
                columns: n,
                from: std::ptr::null(),
                from_row: 0,
                bias: std::ptr::null(),
            };
            let check = |c: &[f32]| {
                for (x, y) in c.iter().zip(&expected) {
                    assert!((x - y).abs() < 1e-4 * (1.0 + y.abs()), "{x} {y}");
                }
            };
            for half in tile.halves() {
                by_rows!(&half, 8, tile_portable, 0);
            }
            check(&plain);
            #[cfg(target_arch = "x86_64")]
            if crate::backend::isa() >= Isa::Avx2 {
                plain.fill(f32::NAN);
                for half in tile.halves() {
                    by_rows!(&half, 8, tile_avx2, 0);
                }
                check(&plain);
            }
            #[cfg(target_arch = "x86_64")]
            if crate::backend::isa() >= Isa::Avx512 {
                plain.fill(f32::NAN);
                by_rows!(&tile, 8, tile_avx512, 2);
                assert_eq!(plain, expected);
            }
        }
    }
}
