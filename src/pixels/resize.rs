//! Bicubic resizing with antialiasing, exact in 8 bits and as a linear operator on floats.
//!
//! The kernel is Keys' cubic with a = -0.5, widened by the scale when shrinking (Keys 1981; the filter of Pillow and
//! of torch's antialiased resize). The 8-bit version reproduces torchvision's on the CPU: weights in 16-bit fixed
//! point, horizontal pass first, levels rounded and clamped between the passes. The float operator has no rounding
//! and no clamping, so it is linear, and its transpose is here too.

use super::RgbImage8;
use crate::error::{Error, Result};
use rayon::prelude::*;

/// For every output place, a run of input places and their weights.
#[derive(Debug, Clone, PartialEq)]
struct Taps<T> {
    starts: Vec<usize>,
    /// `weights[offsets[i]..offsets[i + 1]]` belong to output `i`.
    offsets: Vec<usize>,
    weights: Vec<T>,
}

impl<T: Copy> Taps<T> {
    fn len(&self) -> usize {
        self.starts.len()
    }

    /// First input place and weights of output `index`.
    fn run(&self, index: usize) -> (usize, &[T]) {
        (self.starts[index], &self.weights[self.offsets[index]..self.offsets[index + 1]])
    }

    fn map<U>(&self, function: impl Fn(T) -> U) -> Taps<U> {
        Taps {
            starts: self.starts.clone(),
            offsets: self.offsets.clone(),
            weights: self.weights.iter().map(|&weight| function(weight)).collect(),
        }
    }
}

/// Keys' cubic with a = -0.5.
fn cubic(x: f64) -> f64 {
    let (a, x) = (-0.5, x.abs());
    if x < 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    } else {
        0.0
    }
}

/// The weights of one axis, from `input` places to `output` places; those of an output add up to one.
fn cubic_taps(input: usize, output: usize) -> Taps<f64> {
    let scale = input as f64 / output as f64;
    let stretch = scale.max(1.0);
    let support = 2.0 * stretch;
    let longest = support.ceil() as usize * 2 + 1;
    let mut taps = Taps { starts: Vec::with_capacity(output), offsets: vec![0], weights: Vec::new() };
    for index in 0..output {
        let center = scale * (index as f64 + 0.5);
        let start = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(input).min(start + longest);
        let run: Vec<f64> =
            (start..end).map(|place| cubic((place as f64 - center + 0.5) / stretch)).collect();
        let total: f64 = run.iter().sum();
        taps.starts.push(start);
        taps.weights.extend(run.iter().map(|weight| weight / total));
        taps.offsets.push(taps.weights.len());
    }
    taps
}

impl Taps<f64> {
    /// 16-bit fixed-point weights, and the number of bits after the point: as many as the largest weight allows.
    fn fixed(&self) -> (Taps<i32>, u32) {
        let largest = self.weights.iter().copied().fold(0.0, f64::max);
        let mut precision = 0;
        while precision < 22 && 0.5 + largest * f64::from(1 << (precision + 1)) < 32768.0 {
            precision += 1;
        }
        let one = f64::from(1 << precision);
        (self.map(|weight| (weight * one + 0.5f64.copysign(weight)) as i32), precision)
    }
}

impl Taps<f32> {
    /// The transposed weights: for each of `input` places, the outputs that it goes to.
    fn transposed(&self, input: usize) -> Self {
        let mut columns: Vec<(usize, Vec<f32>)> = vec![(0, Vec::new()); input];
        for index in 0..self.len() {
            let (start, weights) = self.run(index);
            for (column, &weight) in columns[start..].iter_mut().zip(weights) {
                if column.1.is_empty() {
                    column.0 = index;
                }
                // Runs never move back, so that a place's outputs are consecutive.
                column.1.push(weight);
            }
        }
        let mut out = Self { starts: Vec::with_capacity(input), offsets: vec![0], weights: Vec::new() };
        for (start, weights) in columns {
            out.starts.push(start);
            out.weights.extend(weights);
            out.offsets.push(out.weights.len());
        }
        out
    }
}

/// An upper bound of the spectral norm of one axis.
fn axis_norm(taps: &Taps<f32>) -> f64 {
    let gram = Gram::new(taps);
    let mut vector = vec![1.0; taps.len()];
    let mut largest = 0.0;
    for _ in 0..100 {
        let next = gram.times(&vector);
        largest = next.iter().map(|v| v * v).sum::<f64>().sqrt();
        vector = next.into_iter().map(|v| v / largest).collect();
    }
    // The iteration comes from below; the smallest of these that is proven is the bound.
    let mut slack = 1e-4;
    while !gram.is_below(largest * (1.0 + slack)) {
        slack *= 2.0;
    }
    (largest * (1.0 + slack)).sqrt()
}

/// `A A^T` of an axis: symmetric, and zero away from the diagonal.
struct Gram {
    /// Row `i` holds the entries `i - reach ..= i`.
    rows: Vec<Vec<f64>>,
    reach: usize,
}

impl Gram {
    fn new(taps: &Taps<f32>) -> Self {
        let end = |i: usize| taps.run(i).0 + taps.run(i).1.len();
        // Runs move on, so that those which overlap are neighbours.
        let first = |i: usize| (0..=i).find(|&j| end(j) > taps.run(i).0).unwrap_or(i);
        let reach = (0..taps.len()).map(|i| i - first(i)).max().unwrap_or(0);
        let product = |i: usize, j: usize| -> f64 {
            let ((a, left), (b, right)) = (taps.run(i), taps.run(j));
            let from = a.max(b);
            let pairs = left.iter().skip(from - a).zip(right.iter().skip(from - b));
            pairs.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
        };
        let row = |i: usize| (i.saturating_sub(reach)..=i).map(|j| product(i, j)).collect();
        Self { rows: (0..taps.len()).map(row).collect(), reach }
    }

    fn times(&self, vector: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; vector.len()];
        for (i, row) in self.rows.iter().enumerate() {
            let start = i + 1 - row.len();
            for (j, value) in (start..).zip(row) {
                out[i] += value * vector[j];
                if j != i {
                    out[j] += value * vector[i];
                }
            }
        }
        out
    }

    /// Whether every eigenvalue is below `bound`: then `bound - G` has a Cholesky factor.
    fn is_below(&self, bound: f64) -> bool {
        let mut factor: Vec<Vec<f64>> = Vec::with_capacity(self.rows.len());
        for (i, row) in self.rows.iter().enumerate() {
            let start = i + 1 - row.len();
            let mut own = Vec::with_capacity(row.len());
            for (j, value) in (start..=i).zip(row) {
                let above: &[f64] = if j == i { &own } else { &factor[j] };
                // Both rows begin within `reach` of their diagonals.
                let first = start.max((j + 1).saturating_sub(self.reach + 1));
                let sum: f64 = (first..j)
                    .map(|k| own[k - start] * above[k - ((j + 1).saturating_sub(self.reach + 1))])
                    .sum();
                let rest = if j == i { bound - value - sum } else { -value - sum };
                if j < i {
                    let pivot = above[above.len() - 1];
                    own.push(rest / pivot);
                } else if rest > 1e-12 * bound {
                    own.push(rest.sqrt());
                } else {
                    return false;
                }
            }
            factor.push(own);
        }
        true
    }
}

/// Bicubic resizing of float planes: a fixed linear map and its transpose.
///
/// Each number of a result is summed in one order, whatever the number of planes or threads.
#[derive(Debug, Clone, PartialEq)]
pub struct ResizeOperator {
    input: [usize; 2],
    output: [usize; 2],
    rows: Taps<f32>,
    columns: Taps<f32>,
    rows_back: Taps<f32>,
    columns_back: Taps<f32>,
}

impl ResizeOperator {
    /// The operator from `[height, width]` to `[height, width]`.
    ///
    /// # Errors
    /// A data error when a side is zero.
    pub fn new(input: [usize; 2], output: [usize; 2]) -> Result<Self> {
        check_sides(input, output)?;
        let axis = |axis: usize| cubic_taps(input[axis], output[axis]).map(|weight| weight as f32);
        let (rows, columns) = (axis(0), axis(1));
        let (rows_back, columns_back) = (rows.transposed(input[0]), columns.transposed(input[1]));
        Ok(Self { input, output, rows, columns, rows_back, columns_back })
    }

    /// The most by which the operator can stretch a change of the image, in the Euclidean norm: an upper bound, a tenth of a
    /// per cent too large at most as a rule.
    ///
    /// The operator is a product of its two axes, and so is its norm. Of an axis `A` it is the root of the largest
    /// eigenvalue of `A A^T`; a bound on that is proven by a Cholesky factor.
    pub fn norm(&self) -> f64 {
        axis_norm(&self.rows) * axis_norm(&self.columns)
    }

    /// Height and width of what [`Self::apply`] takes.
    pub fn input_size(&self) -> [usize; 2] {
        self.input
    }

    /// Height and width of what [`Self::apply`] returns.
    pub fn output_size(&self) -> [usize; 2] {
        self.output
    }

    /// Resizes planes `[n, height, width]`, row-major; values beyond the input's range can occur (overshoot).
    ///
    /// # Errors
    /// A data error when `planes` is not a whole number of planes.
    pub fn apply(&self, planes: &[f32]) -> Result<Vec<f32>> {
        check_planes(planes, self.input)?;
        let narrow = along_rows(planes, self.input[1], &self.columns);
        Ok(across_rows(&narrow, [self.input[0], self.output[1]], &self.rows))
    }

    /// As [`Self::apply`] for values in [0, 1], clipped to that range after each of the two passes, as eight-bit resizing does.
    /// Clipping brings nothing further apart, so that [`Self::norm`] bounds this map too.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn apply_clipped(&self, planes: &[f32]) -> Result<Vec<f32>> {
        let mut wide = self.first_pass(planes)?;
        clip(&mut wide);
        let mut out = across_rows(&wide, [self.input[0], self.output[1]], &self.rows);
        clip(&mut out);
        Ok(out)
    }

    /// Gradients of [`Self::apply_clipped`] by its argument `planes`, given those by its result: the transpose, with nothing
    /// for values that were clipped.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn clipped_gradient(&self, planes: &[f32], gradient: &[f32]) -> Result<Vec<f32>> {
        check_planes(gradient, self.output)?;
        let first = self.first_pass(planes)?;
        let mut clipped = first.clone();
        clip(&mut clipped);
        let second = across_rows(&clipped, [self.input[0], self.output[1]], &self.rows);
        let tall = across_rows(&kept(gradient, &second), self.output, &self.rows_back);
        Ok(along_rows(&kept(&tall, &first), self.output[1], &self.columns_back))
    }

    /// The first pass.
    fn first_pass(&self, planes: &[f32]) -> Result<Vec<f32>> {
        check_planes(planes, self.input)?;
        Ok(along_rows(planes, self.input[1], &self.columns))
    }

    /// The transpose of [`Self::apply`]: takes gradients of its result to gradients of its argument.
    ///
    /// # Errors
    /// A data error when `planes` is not a whole number of planes.
    pub fn transpose_apply(&self, planes: &[f32]) -> Result<Vec<f32>> {
        check_planes(planes, self.output)?;
        let tall = across_rows(planes, self.output, &self.rows_back);
        Ok(along_rows(&tall, self.output[1], &self.columns_back))
    }
}

fn clip(values: &mut [f32]) {
    for value in values {
        *value = value.clamp(0.0, 1.0);
    }
}

/// `gradient` where `values` are in [0, 1], else zero.
fn kept(gradient: &[f32], values: &[f32]) -> Vec<f32> {
    let keep = |(&g, v): (&f32, &f32)| if (0.0..=1.0).contains(v) { g } else { 0.0 };
    gradient.iter().zip(values).map(keep).collect()
}

fn check_sides(input: [usize; 2], output: [usize; 2]) -> Result<()> {
    if input.contains(&0) || output.contains(&0) {
        return Err(Error::data(format!(
            "an image of {input:?} cannot be resized to {output:?}: a side is zero"
        )));
    }
    Ok(())
}

fn check_planes(planes: &[f32], [height, width]: [usize; 2]) -> Result<()> {
    if !planes.len().is_multiple_of(height * width) {
        return Err(Error::data(format!("{} numbers are no planes of {height} by {width}", planes.len())));
    }
    Ok(())
}

/// Applies `taps` within each row of `width`.
fn along_rows(planes: &[f32], width: usize, taps: &Taps<f32>) -> Vec<f32> {
    let mut out = vec![0f32; planes.len() / width * taps.len()];
    out.par_chunks_mut(taps.len()).zip(planes.par_chunks(width)).for_each(|(out, row)| {
        for (index, value) in out.iter_mut().enumerate() {
            let (start, weights) = taps.run(index);
            *value = row[start..].iter().zip(weights).map(|(&x, &weight)| x * weight).sum();
        }
    });
    out
}

/// Applies `taps` across the rows of each plane of `[height, width]`.
fn across_rows(planes: &[f32], [height, width]: [usize; 2], taps: &Taps<f32>) -> Vec<f32> {
    let count = planes.len() / (height * width);
    let mut out = vec![0f32; count * taps.len() * width];
    out.par_chunks_mut(width).enumerate().for_each(|(row, out)| {
        let plane = &planes[row / taps.len() * height * width..];
        let (start, weights) = taps.run(row % taps.len());
        for (source, &weight) in plane[start * width..].chunks_exact(width).zip(weights) {
            for (value, &x) in out.iter_mut().zip(source) {
                *value += x * weight;
            }
        }
    });
    out
}

/// Resizes an 8-bit image exactly as torchvision's antialiased bicubic does on the CPU.
///
/// # Errors
/// A data error when a side is zero.
pub fn resize_u8(image: &RgbImage8, height: usize, width: usize) -> Result<RgbImage8> {
    check_sides([image.height, image.width], [height, width])?;
    let mut data = std::borrow::Cow::Borrowed(&image.data);
    if width != image.width {
        let (taps, precision) = cubic_taps(image.width, width).fixed();
        let mut out = vec![0u8; 3 * width * image.height];
        out.par_chunks_mut(3 * width).zip(data.par_chunks(3 * image.width)).for_each(|(out, row)| {
            for (index, pixel) in out.chunks_exact_mut(3).enumerate() {
                let (start, weights) = taps.run(index);
                for (channel, level) in pixel.iter_mut().enumerate() {
                    let run = row[3 * start + channel..].iter().step_by(3);
                    *level = fixed_sum(run.zip(weights), precision);
                }
            }
        });
        data = std::borrow::Cow::Owned(out);
    }
    if height != image.height {
        let (taps, precision) = cubic_taps(image.height, height).fixed();
        let mut out = vec![0u8; 3 * width * height];
        out.par_chunks_mut(3 * width).enumerate().for_each(|(row, out)| {
            let (start, weights) = taps.run(row);
            for (column, level) in out.iter_mut().enumerate() {
                let run = data[3 * width * start + column..].iter().step_by(3 * width);
                *level = fixed_sum(run.zip(weights), precision);
            }
        });
        data = std::borrow::Cow::Owned(out);
    }
    RgbImage8::new(width, height, data.into_owned())
}

/// A weighted sum of levels in fixed point, rounded half up and clamped.
fn fixed_sum<'a>(terms: impl Iterator<Item = (&'a u8, &'a i32)>, precision: u32) -> u8 {
    let half = if precision > 0 { 1 << (precision - 1) } else { 0 };
    let sum: i32 = terms.map(|(&level, &weight)| i32::from(level) * weight).sum();
    ((sum + half) >> precision).clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::stream;
    use rand::Rng;

    fn random(count: usize, name: &str) -> Vec<f32> {
        let mut stream = stream(1, name, &[]);
        (0..count).map(|_| stream.random::<f32>()).collect()
    }

    const SIZES: [([usize; 2], [usize; 2]); 6] = [
        ([9, 7], [4, 5]),
        ([5, 6], [13, 8]),
        ([40, 3], [6, 12]),
        ([8, 8], [8, 8]),
        ([1, 1], [3, 4]),
        ([9, 30], [1, 1]),
    ];

    /// Hard edges and noise of full contrast: everything overshoots.
    fn harsh(height: usize, width: usize) -> RgbImage8 {
        let level = |i: usize| match (i / 3 % width / 5 + i / 3 / width / 4) % 3 {
            0 => 0,
            1 => 255,
            _ => (i * 7919 % 256) as u8,
        };
        RgbImage8::new(width, height, (0..3 * height * width).map(level).collect()).unwrap()
    }

    fn planes(image: &RgbImage8) -> Vec<f32> {
        let plane = |c: usize| image.data.iter().skip(c).step_by(3).map(|u| f32::from(*u) / 255.0);
        (0..3).flat_map(plane).collect()
    }

    #[test]
    fn the_clipped_map_is_eight_bit_resizing_but_for_its_roundings() {
        for (from, to) in
            [([64, 48], [28, 28]), ([20, 33], [56, 84]), ([90, 90], [64, 64]), ([24, 24], [64, 64])]
        {
            let image = harsh(from[0], from[1]);
            let operator = ResizeOperator::new(from, to).unwrap();
            let wanted = planes(&resize_u8(&image, to[0], to[1]).unwrap());
            let largest = |found: &[f32]| {
                found.iter().zip(&wanted).map(|(a, b)| 255.0 * (a - b).abs()).fold(0.0, f32::max)
            };
            let clipped = largest(&operator.apply_clipped(&planes(&image)).unwrap());
            assert!(clipped <= 1.75, "{from:?} to {to:?}: {clipped} levels");
            // Without clipping the two differ by more than any rounding.
            assert!(largest(&operator.apply(&planes(&image)).unwrap()) > 5.0);
        }
    }

    #[test]
    fn the_clipped_gradient_equals_differences() {
        let image = harsh(13, 17);
        let operator = ResizeOperator::new([13, 17], [9, 24]).unwrap();
        // Inside the range, so that a small step changes no clipping but that of the overshoot.
        let point: Vec<f32> = planes(&image).iter().map(|v| 0.01 + 0.98 * v).collect();
        let weights: Vec<f32> = (0..3 * 9 * 24).map(|i| ((i * 31 + 7) % 13) as f32 - 6.0).collect();
        let value = |planes: &[f32]| -> f64 {
            let out = operator.apply_clipped(planes).unwrap();
            out.iter().zip(&weights).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
        };
        let gradient = operator.clipped_gradient(&point, &weights).unwrap();
        let linear = operator.transpose_apply(&weights).unwrap();
        assert!(gradient.iter().zip(&linear).any(|(a, b)| (a - b).abs() > 0.1), "nothing was clipped");
        let (mut wrong, mut total) = (0.0, 0.0);
        for direction in 0..20usize {
            let step = |i: usize| if (i * 37 + direction * 101) % 7 < 3 { 1.0f32 } else { -1.0 };
            let moved = |by: f32| {
                value(&point.iter().enumerate().map(|(i, p)| p + by * step(i)).collect::<Vec<f32>>())
            };
            let difference = (moved(1e-4) - moved(-1e-4)) / 2e-4;
            let slope: f64 = gradient.iter().enumerate().map(|(i, g)| f64::from(g * step(i))).sum();
            wrong += (difference - slope).abs();
            total += slope.abs();
        }
        // A few values stand within a step of the clip.
        assert!(wrong < 2e-2 * total, "{wrong} of {total}");
    }

    #[test]
    fn the_norm_bounds_every_stretch_and_is_nearly_reached() {
        // Known to three digits: 1 / 2.27, 1 / 3.01, 1 / 4.51 and 1 / 0.57 (from the singular values of the axes).
        for (from, to, known) in [(512, 224, 2.27), (1024, 336, 3.01), (2048, 448, 4.51), (256, 448, 0.57)] {
            let norm = ResizeOperator::new([from, from], [to, to]).unwrap().norm();
            assert!((norm * known - 1.0).abs() < 1.5e-2, "{from} to {to}: 1 / {}", 1.0 / norm);
        }
        for (input, output) in [([40, 31], [17, 60]), ([12, 12], [12, 12]), ([9, 30], [28, 28])] {
            let operator = ResizeOperator::new(input, output).unwrap();
            let norm = operator.norm();
            // Power iteration approaches the norm from below.
            let mut image: Vec<f32> =
                (0..input[0] * input[1]).map(|i| ((i * 7 + 3) % 11) as f32 - 4.0).collect();
            let length = |v: &[f32]| v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let mut stretch = 0.0;
            for _ in 0..300 {
                let scale = length(&image) as f32;
                for value in &mut image {
                    *value /= scale;
                }
                let resized = operator.apply(&image).unwrap();
                stretch = length(&resized);
                assert!(stretch <= norm * (1.0 + 1e-6), "{input:?} {output:?}: {stretch} {norm}");
                image = operator.transpose_apply(&resized).unwrap();
            }
            assert!(norm < 1.01 * stretch, "{input:?} {output:?}: {stretch} {norm}");
        }
    }

    #[test]
    fn the_transpose_is_the_transpose() {
        for (input, output) in SIZES {
            let operator = ResizeOperator::new(input, output).unwrap();
            let x = random(2 * input[0] * input[1], "x");
            let y = random(2 * output[0] * output[1], "y");
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                assert_eq!(a.len(), b.len());
                a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
            };
            let forward = dot(&operator.apply(&x).unwrap(), &y);
            let backward = dot(&x, &operator.transpose_apply(&y).unwrap());
            assert!((forward - backward).abs() < 1e-4 * forward.abs().max(1.0), "{input:?} {output:?}");
        }
    }

    #[test]
    fn a_plane_is_resized_alike_in_any_batch() {
        let operator = ResizeOperator::new([9, 7], [4, 12]).unwrap();
        let x = random(5 * 63, "batch");
        let together = operator.apply(&x).unwrap();
        let back = operator.transpose_apply(&together).unwrap();
        for plane in 0..5 {
            let alone = operator.apply(&x[63 * plane..63 * (plane + 1)]).unwrap();
            assert_eq!(alone, together[48 * plane..48 * (plane + 1)]);
            assert_eq!(operator.transpose_apply(&alone).unwrap(), back[63 * plane..63 * (plane + 1)]);
        }
    }

    #[test]
    fn constants_stay_and_a_ramp_keeps_its_slope_inside() {
        for (input, output) in SIZES {
            let operator = ResizeOperator::new(input, output).unwrap();
            let flat = operator.apply(&vec![0.25; input[0] * input[1]]).unwrap();
            assert!(flat.iter().all(|value| (value - 0.25).abs() < 1e-6));
        }
        let ramp: Vec<f32> = (0..30).map(|x| x as f32).collect();
        for (width, scale) in [(60, 0.5), (10, 3.0)] {
            let found = ResizeOperator::new([1, 30], [1, width]).unwrap().apply(&ramp).unwrap();
            for (index, value) in found.iter().enumerate().take(width - width / 4).skip(width / 4) {
                let want = (index as f32 + 0.5) * scale - 0.5;
                assert!((value - want).abs() < 1e-4, "{width} {index} {value} {want}");
            }
        }
    }

    #[test]
    fn the_same_size_changes_nothing() {
        let data: Vec<u8> = (0..3 * 48).map(|index| (index * 29 % 256) as u8).collect();
        let image = RgbImage8::new(8, 6, data).unwrap();
        assert_eq!(resize_u8(&image, 6, 8).unwrap(), image);
        let x = random(48, "same");
        assert_eq!(ResizeOperator::new([6, 8], [6, 8]).unwrap().apply(&x).unwrap(), x);
    }

    #[test]
    fn eight_bits_follow_the_float_operator_within_rounding() {
        // Away from 0 and 255, where the clamp between the passes would show.
        let data: Vec<u8> = random(3 * 31 * 23, "levels").iter().map(|x| (x * 100.0) as u8 + 78).collect();
        let image = RgbImage8::new(31, 23, data).unwrap();
        let planes: Vec<f32> = (0..3)
            .flat_map(|c| image.data.iter().skip(c).step_by(3).map(|&level| f32::from(level)))
            .collect();
        for (height, width) in [(8, 11), (50, 70), (23, 9), (60, 31)] {
            let found = resize_u8(&image, height, width).unwrap();
            let exact = ResizeOperator::new([23, 31], [height, width]).unwrap().apply(&planes).unwrap();
            for (index, &level) in found.data.iter().enumerate() {
                let want = exact[index % 3 * height * width + index / 3];
                // Half a level from each pass, the first one's stretched by the second's negative lobes.
                assert!((f32::from(level) - want).abs() < 1.4, "{level} {want}");
            }
        }
    }

    #[test]
    fn zero_sides_and_torn_planes_are_refused() {
        let image = RgbImage8::filled(2, 2, [1; 3]).unwrap();
        assert!(resize_u8(&image, 0, 4).is_err());
        assert!(ResizeOperator::new([0, 1], [1, 1]).is_err());
        let operator = ResizeOperator::new([2, 2], [3, 3]).unwrap();
        assert!(operator.apply(&[0.0; 5]).is_err());
        assert!(operator.transpose_apply(&[0.0; 8]).is_err());
    }
}
