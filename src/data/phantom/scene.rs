//! What there is to see: lesions by place, size and shape, on a field of 64 by 64 units.

use rand::Rng;
use rand::seq::SliceRandom;

use super::draw::{Plane, ellipse, soft_edge};
use crate::rng::Stream;

/// Centres of the quadrants, in the order of their names.
const CENTRES: [(f32, f32); 4] = [(20.5, 20.5), (43.5, 20.5), (20.5, 43.5), (43.5, 43.5)];

/// Radii of the grades small, medium, large.
const RADII: [f32; 3] = [3.6, 7.0, 11.5];

/// A lesion's outline, in the order of the diseases it stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Round,
    Long,
    Ring,
    Star,
}

const SHAPES: [Shape; 4] = [Shape::Round, Shape::Long, Shape::Ring, Shape::Star];

/// One lesion, in units.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Lesion {
    x: f32,
    y: f32,
    radius: f32,
    shape: Shape,
}

/// All lesions of a picture.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Scene {
    lesions: Vec<Lesion>,
}

impl Scene {
    /// Lesions of which value `value` of question type `kind_index` (1 place, 2 shape, 3 size, 4 number) is true.
    pub(super) fn showing(kind_index: usize, value: usize, stream: &mut Stream) -> Self {
        let any = |stream: &mut Stream| stream.random_range(0..4);
        let lesions = match kind_index {
            1 => {
                let shape = SHAPES[any(stream)];
                vec![Lesion::place(value, stream.random_range(6.0..9.5), shape, stream)]
            }
            2 => {
                let quadrant = any(stream);
                vec![Lesion::place(quadrant, stream.random_range(9.0..11.0), SHAPES[value], stream)]
            }
            3 if value == 0 => Vec::new(),
            3 => {
                let quadrant = any(stream);
                let radius = RADII[value - 1] * stream.random_range(0.92..1.08);
                vec![Lesion::place(quadrant, radius, Shape::Round, stream)]
            }
            _ => {
                let mut quadrants = [0, 1, 2, 3];
                quadrants.shuffle(stream);
                quadrants[..=value]
                    .iter()
                    .map(|&quadrant| {
                        Lesion::place(quadrant, stream.random_range(5.5..7.5), Shape::Round, stream)
                    })
                    .collect()
            }
        };
        Self { lesions }
    }

    /// How much of each pixel is lesion, from 0 to 1.
    pub(super) fn mask(&self, size: usize) -> Plane {
        let mut mask = Plane::new(size, 0.0);
        for lesion in &self.lesions {
            let reach = 1.4 * lesion.radius + 2.0;
            mask.each_within(lesion.x, lesion.y, reach, |x, y, value| *value = value.max(lesion.cover(x, y)));
        }
        mask
    }
}

impl Lesion {
    fn place(quadrant: usize, radius: f32, shape: Shape, stream: &mut Stream) -> Self {
        let (x, y) = CENTRES[quadrant];
        Self { x: x + stream.random_range(-2.5..2.5), y: y + stream.random_range(-2.5..2.5), radius, shape }
    }

    fn cover(&self, x: f32, y: f32) -> f32 {
        let (dx, dy, r) = (x - self.x, y - self.y, self.radius);
        match self.shape {
            Shape::Round => ellipse(dx, dy, r, r),
            Shape::Long => ellipse(dx, dy, 1.35 * r, 0.55 * r),
            Shape::Ring => (ellipse(dx, dy, 1.1 * r, 1.1 * r) - ellipse(dx, dy, 0.6 * r, 0.6 * r)).max(0.0),
            Shape::Star => {
                // Two crossed bars, thinner towards their ends.
                let bar = |across: f32, along: f32| {
                    let half = r * (0.36 - 0.16 * (along.abs() / (1.15 * r)).min(1.0));
                    soft_edge(half - across.abs()) * soft_edge(1.15 * r - along.abs())
                };
                bar(dx, dy).max(bar(dy, dx))
            }
        }
    }
}
