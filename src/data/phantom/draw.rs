//! Planes of grey values on a field of 64 by 64 units, whatever the number of pixels.

use crate::rng::{self, Stream};

/// Width and height of the field in units.
pub(super) const UNITS: f32 = 64.0;

/// One grey value per pixel.
#[derive(Debug, Clone)]
pub(super) struct Plane {
    pub(super) size: usize,
    pub(super) values: Vec<f32>,
}

impl Plane {
    pub(super) fn new(size: usize, value: f32) -> Self {
        Self { size, values: vec![value; size * size] }
    }

    /// The plane of a function of the place, in units; pixel centres.
    pub(super) fn of(size: usize, mut value: impl FnMut(f32, f32) -> f32) -> Self {
        let step = UNITS / size as f32;
        let mut values = Vec::with_capacity(size * size);
        for row in 0..size {
            for column in 0..size {
                values.push(value((column as f32 + 0.5) * step, (row as f32 + 0.5) * step));
            }
        }
        Self { size, values }
    }

    /// Visits the pixels within the square of half side `reach` around a place.
    pub(super) fn each_within(
        &mut self,
        x: f32,
        y: f32,
        reach: f32,
        mut visit: impl FnMut(f32, f32, &mut f32),
    ) {
        let step = UNITS / self.size as f32;
        let range = |centre: f32| {
            let low = ((centre - reach) / step).floor().max(0.0) as usize;
            let high = (((centre + reach) / step).ceil().max(0.0) as usize).min(self.size);
            low..high
        };
        for row in range(y) {
            for column in range(x) {
                let place = ((column as f32 + 0.5) * step, (row as f32 + 0.5) * step);
                visit(place.0, place.1, &mut self.values[row * self.size + column]);
            }
        }
    }

    /// Draws a soft line through `points` (at most half a `width` apart) by the deepest of round dabs.
    pub(super) fn stroke(&mut self, points: impl Iterator<Item = (f32, f32)>, width: f32, depth: f32) {
        for (px, py) in points {
            self.each_within(px, py, 2.0 * width, |x, y, value| {
                let distance = ((x - px).powi(2) + (y - py).powi(2)) / (width * width);
                *value = value.max(depth * (-distance).exp());
            });
        }
    }
}

/// From 0 far outside to 1 far inside, over two units around `distance` = 0 (positive inside).
pub(super) fn soft_edge(distance: f32) -> f32 {
    let t = (0.5 + 0.5 * distance).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// How much of a place is inside an ellipse around the origin.
pub(super) fn ellipse(dx: f32, dy: f32, a: f32, b: f32) -> f32 {
    soft_edge(inside(dx, dy, a, b))
}

/// About how far inside an ellipse a place lies; negative outside.
pub(super) fn inside(dx: f32, dy: f32, a: f32, b: f32) -> f32 {
    (1.0 - ((dx / a).powi(2) + (dy / b).powi(2)).sqrt()) * a.min(b)
}

/// A bump of height 1 and the given width around 0.
pub(super) fn bump(distance: f32, width: f32) -> f32 {
    (-(distance / width).powi(2)).exp()
}

/// Smooth random hills: standard normal heights on a lattice, blended between.
#[derive(Debug)]
pub(super) struct Hills {
    columns: usize,
    rows: usize,
    heights: Vec<f32>,
}

impl Hills {
    pub(super) fn new(columns: usize, rows: usize, stream: &mut Stream) -> Self {
        let mut heights = vec![0.0; columns * rows];
        rng::fill_standard_normal(stream, &mut heights);
        Self { columns, rows, heights }
    }

    /// The height at `u`, `v` in [0, 1]; beyond, that of the border.
    pub(super) fn at(&self, u: f32, v: f32) -> f32 {
        let lattice = |t: f32, count: usize| {
            let t = t.clamp(0.0, 1.0) * (count - 1) as f32;
            let low = (t as usize).min(count - 2);
            let f = t - low as f32;
            (low, f * f * (3.0 - 2.0 * f))
        };
        let ((column, fx), (row, fy)) = (lattice(u, self.columns), lattice(v, self.rows));
        let at = |column, row| self.heights[row * self.columns + column];
        let upper = at(column, row) * (1.0 - fx) + at(column + 1, row) * fx;
        let lower = at(column, row + 1) * (1.0 - fx) + at(column + 1, row + 1) * fx;
        upper * (1.0 - fy) + lower * fy
    }

    /// The height at a place of the field, in units.
    pub(super) fn over(&self, x: f32, y: f32) -> f32 {
        self.at(x / UNITS, y / UNITS)
    }
}
