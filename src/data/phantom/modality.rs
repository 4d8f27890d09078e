//! How each modality looks: anatomy in a few strokes, the texture that its physics leaves, and lesions the way they
//! would show in it (bright, but dark in ultrasound, brown in dermoscopy, stained in microscopy).

use rand::Rng;
use std::f32::consts::{PI, TAU};

use super::draw::{Hills, Plane, UNITS, bump, ellipse, inside, soft_edge};
use super::scene::Scene;
use crate::rng::{self, Stream};

/// Middle of the field.
const C: f32 = UNITS / 2.0;

/// Red, green and blue planes; one plane when grey.
enum Painting {
    Grey(Plane),
    Colour([Plane; 3]),
}

/// Draws a scene in a modality (the order of `MODALITIES`): 8-bit RGB, row by row.
pub(super) fn render(
    modality: usize,
    scene: &Scene,
    size: usize,
    contrast: f32,
    stream: &mut Stream,
) -> Vec<u8> {
    let mut lesion = scene.mask(size);
    for value in &mut lesion.values {
        *value *= contrast;
    }
    let painting = match modality {
        0 => Painting::Grey(ct(&lesion, stream)),
        1 => Painting::Grey(mri(&lesion, stream)),
        2 => Painting::Grey(xray(&lesion, stream)),
        3 => Painting::Grey(ultrasound(&lesion, stream)),
        4 => Painting::Colour(dermoscopy(&lesion, stream)),
        5 => Painting::Colour(fundus(&lesion, stream)),
        6 => Painting::Grey(oct(&lesion, stream)),
        _ => Painting::Colour(microscopy(&lesion, stream)),
    };
    expose(painting, stream)
}

/// Gain, sensor noise and rounding to 8 bits.
fn expose(painting: Painting, stream: &mut Stream) -> Vec<u8> {
    let gain = stream.random_range(0.93..1.05f32);
    let mut noisy = |plane: &Plane| -> Vec<u8> {
        let mut noise = vec![0.0; plane.values.len()];
        rng::fill_standard_normal(stream, &mut noise);
        let level =
            |value: f32, noise: f32| (255.0 * (value * gain + 0.015 * noise).clamp(0.0, 1.0)).round() as u8;
        plane.values.iter().zip(noise).map(|(&value, noise)| level(value, noise)).collect()
    };
    match painting {
        Painting::Grey(plane) => noisy(&plane).into_iter().flat_map(|level| [level; 3]).collect(),
        Painting::Colour([red, green, blue]) => {
            let (red, green, blue) = (noisy(&red), noisy(&green), noisy(&blue));
            red.into_iter().zip(green).zip(blue).flat_map(|((red, green), blue)| [red, green, blue]).collect()
        }
    }
}

/// The plane of a function of the place and of how much lesion is there.
fn paint(lesion: &Plane, mut value: impl FnMut(f32, f32, f32) -> f32) -> Plane {
    let mut masks = lesion.values.iter();
    Plane::of(lesion.size, |x, y| value(x, y, masks.next().copied().unwrap_or(0.0)))
}

/// Three planes from a function that gives a colour.
fn paint_colour(lesion: &Plane, mut colour: impl FnMut(usize, f32, f32, f32) -> [f32; 3]) -> [Plane; 3] {
    let empty = || Plane::new(lesion.size, 0.0);
    let mut planes = [empty(), empty(), empty()];
    let mut index = 0;
    paint(lesion, |x, y, mask| {
        let values = colour(index, x, y, mask);
        for (plane, value) in planes.iter_mut().zip(values) {
            plane.values[index] = value;
        }
        index += 1;
        0.0
    });
    planes
}

fn jitter(stream: &mut Stream, by: f32) -> (f32, f32) {
    (stream.random_range(-by..by), stream.random_range(-by..by))
}

/// A slice through the trunk: skin, fat, ribs in the wall, liver, spine, and the table below.
fn ct(lesion: &Plane, stream: &mut Stream) -> Plane {
    let (jx, jy) = jitter(stream, 1.5);
    let hills = Hills::new(10, 10, stream);
    let turn = stream.random_range(0.0..TAU);
    paint(lesion, |x, y, mask| {
        let (dx, dy) = (x - C - jx, y - C + 1.5 - jy);
        let (a, b) = (29.8, 27.0);
        let depth = inside(dx, dy, a, b);
        let body = soft_edge(depth);
        let wall = soft_edge(depth - 3.0);
        let skin = bump(depth - 0.4, 0.8);
        let angle = (dy / b).atan2(dx / a);
        let ribs = bump(depth - 3.6, 0.9) * soft_edge(2.5 * (7.0 * angle + turn).sin());
        let liver = ellipse(dx + 12.0, dy + 2.0, 14.0, 17.0);
        let spine = ellipse(dx, dy - 17.5, 4.6, 4.0) - 0.8 * ellipse(dx, dy - 19.0, 1.6, 1.4);
        let process = ellipse(dx, dy - 22.5, 1.2, 2.6);
        let vessel = ellipse(dx - 2.5, dy - 10.0, 2.4, 2.4);
        let table = bump(y - 61.8 + 0.004 * (x - C).powi(2), 0.9) * 0.45;
        let tissue = 0.22 * body + (0.12 + 0.10 * liver + 0.02 * hills.over(x, y)) * wall;
        0.03 + table * (1.0 - body)
            + tissue
            + 0.22 * skin
            + 0.45 * ribs
            + 0.1 * vessel
            + 0.6 * spine.max(process)
            + 0.35 * mask
    })
}

/// A slice through the head: scalp, dark skull, folded cortex, white matter, ventricles.
fn mri(lesion: &Plane, stream: &mut Stream) -> Plane {
    let (jx, jy) = jitter(stream, 1.2);
    let (coarse, fine) = (Hills::new(7, 7, stream), Hills::new(15, 15, stream));
    paint(lesion, |x, y, mask| {
        let (dx, dy) = (x - C - jx, y - C - jy);
        let (a, b) = (28.0, 30.8);
        let depth = inside(dx, dy, a, b);
        let brain = soft_edge(depth - 4.6);
        let scalp = bump(depth - 1.0, 1.1);
        let angle = (dy / b).atan2(dx / a);
        // Grooves run inwards from the surface and wander a little.
        let folds = (17.0 * angle + 1.6 * coarse.over(x, y)).cos() + 0.5 * fine.over(x, y);
        let cortex = bump(depth - 6.0, 3.2);
        let white = soft_edge(0.8 * (depth - 9.0) + 1.4 * folds);
        let fissure = bump(dx, 0.7) * soft_edge(dy.abs() - 9.0);
        let ventricle = |side: f32| {
            let (ex, ey) = (dx - side * (2.6 + 0.12 * dy.abs()), dy);
            ellipse(ex, ey, 1.7, 7.5)
        };
        let ventricles = ventricle(-1.0).max(ventricle(1.0));
        let matter = 0.30 + 0.16 * white - 0.12 * cortex * folds.clamp(-1.0, 1.0).max(0.0);
        0.03 + 0.62 * scalp + brain * (matter - 0.16 * fissure - 0.28 * ventricles) + 0.4 * mask
    })
}

/// A chest from the front: dark lungs, ribs, spine, heart, collar bones, diaphragm.
fn xray(lesion: &Plane, stream: &mut Stream) -> Plane {
    let (jx, jy) = jitter(stream, 1.5);
    let hills = Hills::new(8, 8, stream);
    let start = stream.random_range(0.0..7.0f32);
    paint(lesion, |x, y, mask| {
        let (dx, dy) = (x - C - jx, y - C - jy);
        let dome = 22.0 - 0.05 * (dx.abs() - 13.0).powi(2);
        let cut = soft_edge(0.7 * (dome - dy));
        let lung =
            |side: f32| ellipse(dx - side * 13.5, dy + 1.0, 11.0, 27.0 - 0.3 * (dx - side * 13.5).abs());
        let lungs = lung(-1.0).max(lung(1.0)) * cut;
        let heart = ellipse(dx - 3.0, dy - 11.0, 9.0, 10.0);
        // Ribs fall off to the sides from the spine.
        let along = dy + 0.32 * dx.abs() + start;
        let ribs = bump((along.rem_euclid(7.0) - 3.5).abs(), 1.0) * soft_edge(27.0 - dx.abs());
        let spine = bump(dx, 3.4) * (0.8 + 0.2 * (0.9 * y).sin());
        let collar =
            bump(dy + 25.5 - 0.18 * dx.abs(), 1.2) * soft_edge(25.0 - dx.abs()) * soft_edge(dx.abs() - 3.0);
        let flank = soft_edge(0.6 * (30.0 - dx.abs() - 0.1 * (-dy).max(0.0)));
        let chest = 0.54 - 0.40 * lungs * (1.0 - 0.75 * heart)
            + 0.07 * ribs * (0.35 + lungs)
            + 0.12 * spine
            + 0.12 * collar;
        (0.08 + flank * (chest - 0.08)) + 0.02 * hills.over(x, y) + 0.42 * mask
    })
}

/// A fan of echoes: grain along arcs, layers near the probe, fading with depth. Lesions give few echoes.
fn ultrasound(lesion: &Plane, stream: &mut Stream) -> Plane {
    let hills = Hills::new(7, 7, stream);
    let grain = Hills::new(34, 62, stream);
    let second = Hills::new(52, 90, stream);
    let jx = stream.random_range(-1.0..1.0f32);
    let apex = -19.0;
    paint(lesion, |x, y, mask| {
        let (dx, dy) = (x - C - jx, y - apex);
        let (radius, angle) = (dx.hypot(dy), dx.atan2(dy));
        let half = 0.66;
        let fan = soft_edge(1.2 * (radius - 21.0))
            * soft_edge(1.2 * (80.0 - radius))
            * soft_edge(40.0 * (half - angle.abs()));
        let (u, v) = (0.5 + 0.5 * angle / half, (radius - 21.0) / 59.0);
        let speckle = 1.0 + 0.24 * grain.at(u, v) + 0.14 * second.at(u, v);
        let layers = 0.3 * bump(v - 0.015, 0.02) + 0.14 * bump(v - 0.1, 0.02) + 0.1 * bump(v - 0.16, 0.015);
        let tissue = 0.50 - 0.10 * v + 0.05 * hills.over(x, y) + layers;
        let echo = (tissue - 0.32 * mask).max(0.03) * speckle.clamp(0.15, 2.2);
        0.02 + fan * echo
    })
}

/// Skin under a lens: mottled, a few hairs, darker corners. Lesions are brown with a network in them.
fn dermoscopy(lesion: &Plane, stream: &mut Stream) -> [Plane; 3] {
    let hills = [Hills::new(6, 6, stream), Hills::new(18, 18, stream)];
    let tone = stream.random_range(-0.04..0.04f32);
    let mut hairs = Plane::new(lesion.size, 0.0);
    for _ in 0..stream.random_range(2..5) {
        let (x, y) = (stream.random_range(4.0..60.0f32), stream.random_range(4.0..60.0f32));
        let angle = stream.random_range(0.0..PI);
        let bend = stream.random_range(-0.02..0.02f32);
        let length = stream.random_range(14.0..34.0f32);
        let points = (0..120).map(|step| {
            let t = (step as f32 / 119.0 - 0.5) * 2.0 * length;
            let side = bend * t * t;
            (x + t * angle.cos() - side * angle.sin(), y + t * angle.sin() + side * angle.cos())
        });
        hairs.stroke(points, 0.55, 0.42);
    }
    paint_colour(lesion, |index, x, y, mask| {
        let mottle = 0.025 * hills[0].over(x, y) + 0.012 * hills[1].over(x, y) + tone;
        let corner = soft_edge(0.35 * ((x - C).hypot(y - C) - 33.0));
        let net = 1.0 + 0.12 * (1.1 * x).sin() * (1.1 * y + 0.4 * x).sin();
        let dark = hairs.values[index] + 0.5 * corner;
        let stain = mask * net;
        [
            0.87 + mottle - 0.33 * stain - dark,
            0.68 + 1.2 * mottle - 0.38 * stain - dark,
            0.60 + 1.2 * mottle - 0.35 * stain - dark,
        ]
    })
}

/// The back of the eye: an orange disc, vessels spreading from the optic nerve, the dark macula. Lesions are pale.
fn fundus(lesion: &Plane, stream: &mut Stream) -> [Plane; 3] {
    let (jx, jy) = jitter(stream, 1.0);
    let hills = Hills::new(9, 9, stream);
    let side = if stream.random_bool(0.5) { 1.0 } else { -1.0 };
    let nerve = (C + jx + side * 17.5, C + jy);
    let mut vessels = Plane::new(lesion.size, 0.0);
    // (towards the middle or outwards, up or down, how wide the arc is, width, depth)
    for (inward, up, reach, width, depth) in [
        (1.0, 1.0, 19.0, 0.95, 1.0),
        (1.0, -1.0, 19.0, 0.95, 1.0),
        (1.0, 1.0, 12.0, 0.6, 0.7),
        (1.0, -1.0, 12.0, 0.6, 0.7),
        (-1.0, 1.0, 22.0, 0.7, 0.9),
        (-1.0, -1.0, 22.0, 0.7, 0.9),
    ] {
        let wave = stream.random_range(0.0..TAU);
        let bend = reach * stream.random_range(0.9..1.1f32);
        let points = (0..160).map(|step| {
            let t = step as f32 / 159.0;
            let along = if inward > 0.0 { 40.0 * t * t } else { 7.0 * t };
            let rise = bend * (1.6 * t).min(1.0).powf(0.7) * (1.0 + 0.05 * (9.0 * t + wave).sin());
            (nerve.0 - side * inward * along, nerve.1 - up * rise)
        });
        vessels.stroke(points, width, depth);
    }
    paint_colour(lesion, |index, x, y, mask| {
        let (dx, dy) = (x - C - jx, y - C - jy);
        let disc = soft_edge(inside(dx, dy, 30.5, 30.5));
        let (nx, ny) = (x - nerve.0, y - nerve.1);
        let head = ellipse(nx, ny, 4.2, 4.8);
        let glow = bump(nx.hypot(ny), 16.0);
        let macula = bump((dx + side * 5.0).hypot(dy - 1.0), 5.5);
        let rim = bump(dx.hypot(dy), 34.0);
        let vessel = vessels.values[index] * (1.0 - 0.6 * head);
        let shade = (0.72 + 0.28 * rim) * (1.0 + 0.05 * hills.over(x, y)) - 0.16 * macula;
        let colour = |base: f32, nerve: f32, vessel_depth: f32, pale: f32| {
            disc * (base * (shade + 0.16 * glow) + nerve * head - vessel_depth * vessel + pale * mask)
        };
        [colour(0.78, 0.22, 0.22, 0.20), colour(0.38, 0.42, 0.18, 0.40), colour(0.15, 0.32, 0.07, 0.36)]
    })
}

/// A section of the retina: the pit, alternating layers, the bright line below, grain of coherent light.
fn oct(lesion: &Plane, stream: &mut Stream) -> Plane {
    let tilt = stream.random_range(-0.05..0.05f32);
    let pit = C + stream.random_range(-4.0..4.0f32);
    let lift = stream.random_range(-2.0..2.0f32);
    let wave = stream.random_range(0.0..TAU);
    let grain = Hills::new(90, 64, stream);
    let hills = Hills::new(14, 14, stream);
    paint(lesion, |x, y, mask| {
        let dip = bump(x - pit, 9.0);
        let ground = 51.0 + lift + tilt * (x - C) + 0.8 * (0.09 * x + wave).sin() + 0.006 * (x - C).powi(2);
        let surface = ground - 41.0 + 11.0 * dip;
        // Where between the surface (0) and the ground line (1).
        let t = (y - surface) / (ground - surface);
        let within = soft_edge(y - surface) * soft_edge(ground + 1.0 - y);
        let layers = 0.30 * bump(t - 0.07, 0.07) * (1.0 - 0.7 * dip)
            + 0.16 * bump(t - 0.33, 0.08)
            + 0.14 * bump(t - 0.56, 0.06)
            + 0.22 * bump(t - 0.84, 0.035);
        let line = 0.55 * bump(y - ground, 1.3);
        let below = soft_edge(y - ground - 1.5);
        let choroid = below * (0.30 + 0.09 * hills.over(x, y)) * (-(y - ground).max(0.0) / 12.0).exp();
        let light = 0.05 + within * (0.10 + layers) + line + choroid;
        light * (1.0 + 0.3 * grain.over(x, y)).max(0.2) + 0.02 * grain.over(y, x) + 0.38 * mask
    })
}

/// A blood smear: pale red cells with lighter middles. Lesions are stained violet.
fn microscopy(lesion: &Plane, stream: &mut Stream) -> [Plane; 3] {
    let hills = Hills::new(8, 8, stream);
    let mut cells = Plane::new(lesion.size, 0.0);
    let mut centres: Vec<(f32, f32)> = Vec::new();
    for _ in 0..60 {
        let (x, y) = (stream.random_range(0.0..UNITS), stream.random_range(0.0..UNITS));
        let radius = stream.random_range(3.6..4.6f32);
        if centres.len() >= 22 || centres.iter().any(|(ox, oy)| (x - ox).hypot(y - oy) < 8.2) {
            continue;
        }
        centres.push((x, y));
        let squash = stream.random_range(0.85..1.15f32);
        cells.each_within(x, y, radius + 2.0, |px, py, value| {
            let (dx, dy) = ((px - x) * squash, (py - y) / squash);
            let cell = ellipse(dx, dy, radius, radius) - 0.65 * bump(dx.hypot(dy), 0.48 * radius);
            *value = value.max(cell.max(0.0));
        });
    }
    paint_colour(lesion, |index, x, y, mask| {
        let cell = cells.values[index] * (1.0 - mask.min(1.0));
        let mottle = 0.012 * hills.over(x, y);
        let grain = 1.0 + 0.1 * (1.7 * x).sin() * (1.9 * y).sin();
        let stain = mask * grain;
        [
            0.95 + mottle - 0.08 * cell - 0.44 * stain,
            0.90 + mottle - 0.25 * cell - 0.56 * stain,
            0.91 + mottle - 0.19 * cell - 0.32 * stain,
        ]
    })
}
