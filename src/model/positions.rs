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
            for axis in &mut self.ids {
                axis.push(position);
            }
        }
    }
}

/// Merged tokens that an image of this grid takes.
pub fn image_tokens(grid: Grid, spatial_merge_size: usize) -> usize {
    let [frames, rows, columns] = grid;
    frames.saturating_mul(rows / spatial_merge_size).saturating_mul(columns / spatial_merge_size)
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
            for axis in &mut ids {
                axis.push(next);
            }
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
        let end = index.saturating_add(count);
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
    let [temporal, height, width] = positions;
    for ((&temporal, &height), &width) in temporal.iter().zip(height).zip(width) {
        let place = [temporal, height, width];
        angles
            .extend(axes.iter().zip(&frequencies).map(|(&axis, &frequency)| place[axis] as f32 * frequency));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::VlmConfig;
    use crate::model::test_support::{fixture_json, fixtures, numbers, read_tensors};

    const IMAGE: u32 = 9;

    #[test]
    fn an_image_counts_rows_and_columns_and_text_goes_on_past_its_longer_side() {
        // Two words, an image of 2 by 3 tokens, one word.
        let ids = [1, 1, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 1];
        let mut found = prompt_positions(&ids, IMAGE, &[[1, 4, 6]], 2).unwrap();
        assert_eq!(found.ids[0], [0, 1, 2, 2, 2, 2, 2, 2, 5]);
        assert_eq!(found.ids[1], [0, 1, 2, 2, 2, 3, 3, 3, 5]);
        assert_eq!(found.ids[2], [0, 1, 2, 3, 4, 2, 3, 4, 5]);
        assert_eq!(found.rope_delta, -3);
        found.extend_text(2);
        for axis in &found.ids {
            assert_eq!(axis[9..], [6, 7]);
        }
    }

    #[test]
    fn placeholders_that_do_not_match_the_images_are_refused() {
        let fails = |ids: &[u32], grids: &[Grid]| prompt_positions(ids, IMAGE, grids, 2).is_err();
        assert!(fails(&[1, IMAGE], &[]));
        assert!(fails(&[1, 1], &[[1, 2, 2]]));
        assert!(fails(&[1, IMAGE], &[[1, 2, 4]]));
        assert!(fails(&[IMAGE, 1, IMAGE], &[[1, 2, 4]]));
        assert!(!fails(&[IMAGE, IMAGE], &[[1, 2, 4]]));
    }

    #[test]
    fn without_images_positions_count_up() {
        let found = prompt_positions(&[1, 2, 3], IMAGE, &[], 2).unwrap();
        assert_eq!(found.ids, [vec![0, 1, 2], vec![0, 1, 2], vec![0, 1, 2]]);
        assert_eq!(found.rope_delta, 0);
    }

    #[test]
    fn patches_go_block_by_block() {
        let found = patch_coordinates([1, 4, 4], 2);
        assert_eq!(found[..6], [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]);
        assert_eq!(found[8], [2, 0]);
        assert_eq!(patch_coordinates([2, 2, 2], 2).len(), 8);
    }

    #[test]
    fn windows_cover_every_block_once_and_inverse_undoes_order() {
        let partition = window_partition(&[[1, 10, 6], [1, 4, 4]], 2, 56, 14);
        let mut seen = partition.order.clone();
        seen.sort_unstable();
        assert_eq!(seen, (0..19).collect::<Vec<_>>());
        // Rows of 5 blocks cut 2 + 2 + 1, columns of 3 cut 2 + 1; then a whole window.
        assert_eq!(partition.lengths, [16, 8, 16, 8, 8, 4, 16]);
        assert_eq!(partition.order[..6], [0, 1, 3, 4, 2, 5]);
        let inverse = partition.inverse();
        assert!(partition.order.iter().enumerate().all(|(place, &block)| inverse[block] == place));
        assert_eq!(partition.patch_order(4)[16..20], [8, 9, 10, 11]);
        assert_eq!(partition.boundaries().last(), Some(&76));
    }

    #[test]
    fn taps_reproduce_a_linear_function_of_the_table_and_hit_the_corners() {
        let side = 5;
        let taps = position_taps(&[[1, 4, 6]], side, 2);
        for (patch, [row, column]) in patch_coordinates([1, 4, 6], 2).into_iter().enumerate() {
            let range = 4 * patch..4 * patch + 4;
            let mut value = [0f32; 2];
            for (&index, &weight) in taps.indices[range.clone()].iter().zip(&taps.weights[range]) {
                value[0] += weight * (index as usize / side) as f32;
                value[1] += weight * (index as usize % side) as f32;
            }
            assert!((value[0] - row as f32 * 4.0 / 3.0).abs() < 1e-5, "{value:?}");
            assert!((value[1] - column as f32 * 4.0 / 5.0).abs() < 1e-5, "{value:?}");
        }
        // A single row or column of patches takes the first entries.
        assert_eq!(position_taps(&[[1, 1, 1]], side, 1).weights, [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn vision_angles_turn_rows_then_columns() {
        let Some(dir) = fixtures() else { return };
        let vision = VlmConfig::load(&dir.join("checkpoints/qwen3_vl")).unwrap().vision;
        let (cos, sin) = vision_rotary_table(&vision, &[[1, 4, 6]], &Device::Cpu).unwrap();
        let (cos, sin) = (cos.to_vec2::<f32>().unwrap(), sin.to_vec2::<f32>().unwrap());
        assert_eq!((cos.len(), cos[0].len()), (24, 8));
        for (patch, [row, column]) in patch_coordinates([1, 4, 6], 2).into_iter().enumerate() {
            for index in 0..8 {
                let coordinate = if index < 4 { row } else { column };
                let angle = coordinate as f64 * 10_000f64.powf(-2.0 * (index % 4) as f64 / 8.0);
                assert!((f64::from(cos[patch][index]) - angle.cos()).abs() < 1e-6);
                assert!((f64::from(sin[patch][index]) - angle.sin()).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn positions_windows_and_tables_equal_the_reference() {
        let Some(dir) = fixtures() else { return };
        for name in ["qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_bf16", "qwen3_vl", "qwen3_vl_bf16"] {
            let config = VlmConfig::load(&dir.join("checkpoints").join(name)).unwrap();
            let expected = fixture_json(&dir.join(format!("expected/{name}.json")));
            for (case, row) in expected["cases"].as_object().unwrap() {
                if row.get("position_ids").is_none() {
                    continue;
                }
                let ids: Vec<u32> = numbers(&row["input_ids"]);
                let grids: Vec<Grid> = row["image_grid_thw"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|g| numbers(g).try_into().unwrap())
                    .collect();
                let merge = config.vision.spatial_merge_size;
                let found = prompt_positions(&ids, config.image_token_id, &grids, merge).unwrap();
                for axis in 0..3 {
                    assert_eq!(found.ids[axis], numbers::<i64>(&row["position_ids"][axis]), "{name} {case}");
                }
                assert_eq!(Some(found.rope_delta), row["rope_delta"].as_i64(), "{name} {case}");
                if let Some(window_size) = config.vision.window_size {
                    let partition = window_partition(&grids, merge, window_size, config.vision.patch_size);
                    assert_eq!(partition.order, numbers::<usize>(&row["window_index"]), "{name} {case}");
                    assert_eq!(
                        partition.boundaries(),
                        numbers::<usize>(&row["cu_window_seqlens"]),
                        "{name} {case}"
                    );
                }
                if case == "single" {
                    let tensors = read_tensors(&dir.join(format!("expected/{name}.safetensors")));
                    let (cos, sin) = rotary_table(&config.text, &found.ids, &Device::Cpu).unwrap();
                    let half = config.text.head_dim / 2;
                    for (table, key) in [(cos, "single.text.rope_cos"), (sin, "single.text.rope_sin")] {
                        let want = tensors.tensor(key).unwrap().narrow(1, 0, half).unwrap();
                        let difference = (table - want)
                            .unwrap()
                            .abs()
                            .unwrap()
                            .max_all()
                            .unwrap()
                            .to_scalar::<f32>()
                            .unwrap();
                        assert!(difference < 1e-5, "{name} {key} {difference}");
                    }
                }
            }
        }
    }

    #[test]
    fn interpolated_positions_equal_what_the_reference_adds_to_the_patches() {
        let Some(dir) = fixtures() else { return };
        let config = VlmConfig::load(&dir.join("checkpoints/qwen3_vl")).unwrap();
        let weights = crate::model::weights::Weights::open(&dir.join("checkpoints/qwen3_vl")).unwrap();
        let (side, width) = (8, config.vision.hidden_size);
        let table = weights.values("model.visual.pos_embed.weight", &[side * side, width]).unwrap();
        let tensors = read_tensors(&dir.join("expected/qwen3_vl.safetensors"));
        let patches = tensors.floats("single.vision.patch_embed").unwrap();
        let wanted = tensors.floats("single.vision.hidden.0").unwrap();
        let taps = position_taps(&[[1, 6, 8]], side, 2);
        for (index, (patch, want)) in patches.iter().zip(&wanted).enumerate() {
            let (row, column) = (index / width, index % width);
            let range = 4 * row..4 * row + 4;
            let sum: f32 = taps.indices[range.clone()]
                .iter()
                .zip(&taps.weights[range])
                .map(|(&entry, &weight)| weight * table[entry as usize * width + column])
                .sum();
            assert!((patch + sum - want).abs() < 1e-5);
        }
    }
}
