//! Where every token and patch stands: rotary positions of prompts with images, rotary tables, attention windows and
//! the taps of an interpolated position table.
//!
//! Plain data, computed once per prompt or grid; no gradient flows here. Still images only: for them the families
//! agree. A grid is `[frames, rows, columns]` in patches, and patches stand in merge-block order: the
//! `spatial_merge_size²` patches of a block are neighbours, blocks go row by row.

use super::config::{TextConfig, VisionConfig};
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};

/// Frames, rows and columns of an image, in patches.
pub type Grid = [usize; 3];

/// Rotary positions of one prompt.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PromptPositions {
    /// Temporal, height and width position of every token.
    pub ids: [Vec<i64>; 3],
    /// What to add to a later token's index to get its position (all three alike): zero or negative, as an image
    /// takes fewer positions than tokens.
    pub rope_delta: i64,
}

impl PromptPositions {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids[0].len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.ids[0].is_empty()
    }

    /// Appends `count` text tokens.
    pub fn extend_text(&mut self, count: usize) {
        for index in self.len()..self.len() + count {
            let position = index as i64 + self.rope_delta;
            self.ids.iter_mut().for_each(|axis| axis.push(position));
        }
    }
}

/// Merged tokens that an image of this grid takes.
pub fn image_tokens(grid: Grid, spatial_merge_size: usize) -> usize {
    grid[0] * (grid[1] / spatial_merge_size) * (grid[2] / spatial_merge_size)
}

/// Positions of a prompt: text counts up by one on all three axes; an image's tokens share the temporal position and
/// count rows and columns from there, and the text after it goes on past the longer side.
///
/// `input_ids` holds one `image_token_id` per merged patch; `grids` lists the images in order.
///
/// # Errors
/// A data error when placeholders and grids do not match.
pub fn prompt_positions(
    input_ids: &[u32],
    image_token_id: u32,
    grids: &[Grid],
    spatial_merge_size: usize,
) -> Result<PromptPositions> {
    let mut ids: [Vec<i64>; 3] = std::array::from_fn(|_| Vec::with_capacity(input_ids.len()));
    let mut next = 0i64;
    let mut index = 0;
    let mut images = grids.iter();
    while index < input_ids.len() {
        if input_ids[index] != image_token_id {
            ids.iter_mut().for_each(|axis| axis.push(next));
            next += 1;
            index += 1;
            continue;
        }
        let Some(&grid) = images.next() else {
            return Err(Error::data(format!(
                "the prompt has more image placeholders than its {} images need",
                grids.len()
            )));
        };
        let count = image_tokens(grid, spatial_merge_size);
        let end = index + count;
        if count == 0 || end > input_ids.len() || input_ids[index..end].iter().any(|&id| id != image_token_id)
        {
            return Err(Error::data(format!(
                "an image of grid {grid:?} needs {count} placeholders in a row, at token {index} there are fewer"
            )));
        }
        let (rows, columns) = (grid[1] / spatial_merge_size, grid[2] / spatial_merge_size);
        for frame in 0..grid[0] {
            for row in 0..rows {
                for column in 0..columns {
                    for (axis, offset) in ids.iter_mut().zip([frame, row, column]) {
                        axis.push(next + offset as i64);
                    }
                }
            }
        }
        next += (grid[1].max(grid[2]) / spatial_merge_size) as i64;
        index = end;
    }
    if images.next().is_some() {
        return Err(Error::data(format!(
            "the prompt has fewer image placeholders than its {} images need",
            grids.len()
        )));
    }
    let highest = ids.iter().flatten().max().map_or(0, |&position| position + 1);
    Ok(PromptPositions { ids, rope_delta: highest - input_ids.len() as i64 })
}

/// `base^(-2i / width)` for `i` in `0..width/2`, rounded to float32 where the reference rounds.
fn inverse_frequencies(base: f64, width: usize) -> Vec<f32> {
    (0..width / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / width as f32;
            1.0 / (base.powf(f64::from(exponent)) as f32)
        })
        .collect()
}

/// Cosines and sines of angles, as two tensors `[rows, width]`.
fn tables(angles: &[f32], width: usize, device: &Device) -> Result<(Tensor, Tensor)> {
    let shape = (angles.len() / width.max(1), width);
    let of = |function: fn(f64) -> f64| -> Result<Tensor> {
        let values: Vec<f32> = angles.iter().map(|&angle| function(f64::from(angle)) as f32).collect();
        Ok(Tensor::from_vec(values, shape, device)?)
    };
    Ok((of(f64::cos)?, of(f64::sin)?))
}

/// Which of the three axes (0 temporal, 1 height, 2 width) turns frequency `index` of the decoder.
fn axis_of_frequency(text: &TextConfig, index: usize) -> usize {
    let [temporal, height, width] = text.mrope_section;
    if text.mrope_interleaved {
        match index % 3 {
            1 if index < 3 * height => 1,
            2 if index < 3 * width => 2,
            _ => 0,
        }
    } else if index < temporal {
        0
    } else if index < temporal + height {
        1
    } else {
        2
    }
}

/// The decoder's rotary table for these positions.
///
/// # Shapes
/// - returns: cosines and sines, each `[tokens, head_dim / 2]`, for the half-rotation form
///
/// # Errors
/// A tensor error of `device`.
pub fn rotary_table(
    text: &TextConfig,
    positions: &[Vec<i64>; 3],
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let frequencies = inverse_frequencies(text.rope_theta, text.head_dim);
    let axes: Vec<usize> = (0..frequencies.len()).map(|index| axis_of_frequency(text, index)).collect();
    let mut angles = Vec::with_capacity(positions[0].len() * frequencies.len());
    for token in 0..positions[0].len() {
        for (&axis, &frequency) in axes.iter().zip(&frequencies) {
            angles.push(positions[axis][token] as f32 * frequency);
        }
    }
    tables(&angles, frequencies.len(), device)
}

/// Row and column of every patch, in merge-block order, frame after frame.
pub fn patch_coordinates(grid: Grid, spatial_merge_size: usize) -> Vec<[usize; 2]> {
    let [frames, rows, columns] = grid;
    let merge = spatial_merge_size;
    let mut out = Vec::with_capacity(frames * rows * columns);
    for _ in 0..frames {
        for block_row in 0..rows / merge {
            for block_column in 0..columns / merge {
                for row in 0..merge {
                    for column in 0..merge {
                        out.push([block_row * merge + row, block_column * merge + column]);
                    }
                }
            }
        }
    }
    out
}

/// The vision tower's rotary table: half of a head's frequencies turn with the row, half with the column.
///
/// # Shapes
/// - returns: cosines and sines, each `[patches of all grids, head_dim / 2]`, patches in merge-block order
///
/// # Errors
/// A tensor error of `device`.
pub fn vision_rotary_table(
    vision: &VisionConfig,
    grids: &[Grid],
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let frequencies = inverse_frequencies(vision.rope_theta, vision.head_dim() / 2);
    let mut angles = Vec::new();
    for &grid in grids {
        for place in patch_coordinates(grid, vision.spatial_merge_size) {
            for coordinate in place {
                angles.extend(frequencies.iter().map(|&frequency| coordinate as f32 * frequency));
            }
        }
    }
    tables(&angles, 2 * frequencies.len(), device)
}

/// Patches of every frame of every image, in order: who sees whom without windows.
pub fn frame_lengths(grids: &[Grid]) -> Vec<usize> {
    grids.iter().flat_map(|&[frames, rows, columns]| std::iter::repeat_n(rows * columns, frames)).collect()
}

/// The order that puts every attention window's patches side by side.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WindowPartition {
    /// Merged blocks (of `spatial_merge_size²` patches) in window order: entry `i` is the original place of the block
    /// that stands at place `i`.
    pub order: Vec<usize>,
    /// Patches of each window, without empty ones.
    pub lengths: Vec<usize>,
}

impl WindowPartition {
    /// Where each block of the original order stands in window order: the inverse of `order`.
    pub fn inverse(&self) -> Vec<usize> {
        let mut inverse = vec![0; self.order.len()];
        for (place, &original) in self.order.iter().enumerate() {
            inverse[original] = place;
        }
        inverse
    }

    /// `order` spelt out for patches, `unit = spatial_merge_size²` of them per block.
    pub fn patch_order(&self, unit: usize) -> Vec<usize> {
        self.order.iter().flat_map(|&block| block * unit..(block + 1) * unit).collect()
    }

    /// Boundaries of the windows: 0, then the running sum of `lengths`.
    pub fn boundaries(&self) -> Vec<usize> {
        let mut sum = 0;
        std::iter::once(0)
            .chain(self.lengths.iter().map(|&length| {
                sum += length;
                sum
            }))
            .collect()
    }
}

/// Cuts every frame into windows of `window_size` pixels, from its top left corner; windows at the right and lower
/// edges may be smaller.
pub fn window_partition(
    grids: &[Grid],
    spatial_merge_size: usize,
    window_size: usize,
    patch_size: usize,
) -> WindowPartition {
    let side = (window_size / spatial_merge_size / patch_size).max(1);
    let unit = spatial_merge_size * spatial_merge_size;
    let mut partition = WindowPartition::default();
    let mut first = 0;
    for &[frames, patch_rows, patch_columns] in grids {
        let (rows, columns) = (patch_rows / spatial_merge_size, patch_columns / spatial_merge_size);
        for _ in 0..frames {
            for top in (0..rows).step_by(side) {
                for left in (0..columns).step_by(side) {
                    let (bottom, right) = ((top + side).min(rows), (left + side).min(columns));
                    for row in top..bottom {
                        partition.order.extend((left..right).map(|column| first + row * columns + column));
                    }
                    partition.lengths.push((bottom - top) * (right - left) * unit);
                }
            }
            first += rows * columns;
        }
    }
    partition
}

/// For every patch, the four rows of a learned position table that it lies between, and their weights.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PositionTaps {
    /// Rows of the table, four per patch: upper left, upper right, lower left, lower right.
    pub indices: Vec<u32>,
    /// Their weights, which add up to one.
    pub weights: Vec<f32>,
}

/// Bilinear interpolation, corners aligned, of a `side × side` table to each grid; patches in merge-block order.
pub fn position_taps(grids: &[Grid], side: usize, spatial_merge_size: usize) -> PositionTaps {
    let mut taps = PositionTaps::default();
    for &grid in grids {
        let [_, rows, columns] = grid;
        for [row, column] in patch_coordinates(grid, spatial_merge_size) {
            let (row_taps, row_weights) = axis_taps(row, rows, side);
            let (column_taps, column_weights) = axis_taps(column, columns, side);
            for (&row_tap, &row_weight) in row_taps.iter().zip(&row_weights) {
                for (&column_tap, &column_weight) in column_taps.iter().zip(&column_weights) {
                    taps.indices.push((row_tap * side + column_tap) as u32);
                    taps.weights.push(row_weight * column_weight);
                }
            }
        }
    }
    taps
}

/// The two neighbours of place `index` of `count` on an axis of `side` table entries, and their weights.
fn axis_taps(index: usize, count: usize, side: usize) -> ([usize; 2], [f32; 2]) {
    let source = index as f32 * (side - 1) as f32 / count.saturating_sub(1).max(1) as f32;
    let floor = source.floor();
    let lower = floor as usize;
    let upper_weight = source - floor;
    ([lower.min(side - 1), (lower + 1).min(side - 1)], [1.0 - upper_weight, upper_weight])
}
