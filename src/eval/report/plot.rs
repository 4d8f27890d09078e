//! Curves as SVG that belongs to its page: ink and grid take the page's text colour, so it reads in light and dark.

use super::{Figure, Point, Series, Shape};
use crate::error::{Error, Result};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::{
    Cartesian2d, ChartBuilder, ChartContext, Circle, Color, DrawingArea, IntoDrawingArea, IntoFont,
    LineSeries, Polygon, RGBColor, SVGBackend,
};

/// Drawn large and shown small: the backend rounds to whole pixels.
const SIZE: (u32, u32) = (1200, 720);
const TEXT: i32 = 32;

/// Replaced by the page's text colour.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_HEX: &str = "#010203";

/// Colours of the curves: apart for colour-blind readers, legible on white and on near-black.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x2b, 0x7b, 0xba),
    RGBColor(0xd9, 0x5f, 0x1e),
    RGBColor(0x1f, 0x9e, 0x77),
    RGBColor(0xb3, 0x4a, 0x9c),
    RGBColor(0xb8, 0x8a, 0x00),
    RGBColor(0x6a, 0x6f, 0xc9),
    RGBColor(0xc4, 0x3c, 0x50),
    RGBColor(0x6b, 0x8e, 0x23),
];

type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// The colour of the `index`-th name, as in CSS.
pub(super) fn colour(index: usize) -> String {
    let RGBColor(r, g, b) = COLOURS[index % COLOURS.len()];
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// The figure as an `<svg>` element; `None` when there is no finite point. `names` fixes the colours.
pub(super) fn svg(figure: &Figure, names: &[&str]) -> Result<Option<String>> {
    let Some((x, y)) = ranges(figure) else { return Ok(None) };
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&area, figure, names, x, y).map_err(|error| anyhow::anyhow!("cannot draw a plot: {error}"))?;
    }
    let start =
        text.find("<svg").ok_or_else(|| Error::Other(anyhow::anyhow!("a plot without its element")))?;
    let fixed_size = format!("width=\"{}\" height=\"{}\" ", SIZE.0, SIZE.1);
    let role = format!("role=\"img\" aria-label=\"{}\" ", super::html::escape(&figure.title));
    Ok(Some(text[start..].replacen(&fixed_size, &role, 1).replace(INK_HEX, "currentColor")))
}

type DrawResult = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    figure: &Figure,
    names: &[&str],
    x: [f64; 2],
    y: [f64; 2],
) -> DrawResult {
    let mut chart = ChartBuilder::on(area)
        .margin(14)
        .margin_right(34)
        .x_label_area_size(100)
        .y_label_area_size(130)
        .build_cartesian_2d(x[0]..x[1], y[0]..y[1])?;
    let digits =
        |span: f64| if span >= 8.0 { 0 } else { (1.3 - span.log10()).ceil().clamp(0.0, 6.0) as usize };
    let (x_digits, y_digits) = (digits(x[1] - x[0]), digits(y[1] - y[0]));
    // Learning rates, which digits behind the point cannot tell apart.
    let is_tiny = y[0].abs().max(y[1].abs()) < 1e-3;
    chart
        .configure_mesh()
        .x_desc(&figure.x_label)
        .y_desc(&figure.y_label)
        .x_labels(8)
        .y_labels(6)
        .max_light_lines(1)
        .light_line_style(INK.mix(0.0))
        .bold_line_style(INK.mix(0.14))
        .axis_style(INK.mix(0.45))
        .label_style(("sans-serif", TEXT).into_font().color(&INK.mix(0.8)))
        .axis_desc_style(("sans-serif", TEXT).into_font().color(&INK))
        .x_label_formatter(&|value| format!("{value:.x_digits$}"))
        .y_label_formatter(&|value| {
            if is_tiny && *value != 0.0 { format!("{value:.1e}") } else { format!("{value:.y_digits$}") }
        })
        .draw()?;
    for series in &figure.series {
        let index = names.iter().position(|name| *name == series.name).unwrap_or(0);
        draw_series(&mut chart, figure.shape, series, COLOURS[index % COLOURS.len()])?;
    }
    area.present()?;
    Ok(())
}

fn draw_series(chart: &mut Chart<'_>, shape: Shape, series: &Series, colour: RGBColor) -> DrawResult {
    let points: Vec<Point> = finite(series).collect();
    let line: Vec<(f64, f64)> = points.iter().map(|point| (point.x, point.y)).collect();
    match shape {
        Shape::Line => {
            draw_band(chart, &points, colour)?;
            chart.draw_series(LineSeries::new(line.iter().copied(), colour.stroke_width(4)))?;
            chart.draw_series(line.iter().map(|at| Circle::new(*at, 7, colour.filled())))?;
        }
        Shape::Steps => {
            let steps = stairs(&line);
            chart.draw_series(LineSeries::new(steps, colour.stroke_width(4)))?;
        }
        Shape::Noisy => {
            let (raw, mean) = (colour.mix(0.25).stroke_width(2), colour.stroke_width(4));
            chart.draw_series(LineSeries::new(line.iter().copied(), raw))?;
            chart.draw_series(LineSeries::new(moving_mean(&line), mean))?;
        }
    }
    Ok(())
}

fn draw_band(chart: &mut Chart<'_>, points: &[Point], colour: RGBColor) -> DrawResult {
    let banded: Vec<(f64, [f64; 2])> =
        points.iter().filter_map(|point| Some((point.x, point.interval?))).collect();
    if banded.len() > 1 {
        let upper = banded.iter().map(|(x, [_, high])| (*x, *high));
        let lower = banded.iter().rev().map(|(x, [low, _])| (*x, *low));
        let outline: Vec<(f64, f64)> = upper.chain(lower).collect();
        chart.draw_series(std::iter::once(Polygon::new(outline, colour.mix(0.14))))?;
    }
    for (x, [low, high]) in banded {
        chart.draw_series(LineSeries::new([(x, low), (x, high)], colour.mix(0.7).stroke_width(2)))?;
    }
    Ok(())
}

/// The share at `x` holds for all smaller values down to the point before.
fn stairs(line: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut steps = Vec::with_capacity(2 * line.len());
    for (index, (x, y)) in line.iter().enumerate() {
        if index > 0 {
            steps.push((line[index - 1].0, *y));
        }
        steps.push((*x, *y));
    }
    steps
}

/// Mean over a centred window of a twentieth of the curve.
fn moving_mean(line: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = line.len() / 40;
    (0..line.len())
        .map(|index| {
            let window = &line[index.saturating_sub(reach)..(index + reach + 1).min(line.len())];
            (line[index].0, window.iter().map(|(_, y)| y).sum::<f64>() / window.len() as f64)
        })
        .collect()
}

fn finite(series: &Series) -> impl Iterator<Item = Point> {
    series.points.iter().copied().filter(|point| point.x.is_finite() && point.y.is_finite())
}

/// Ends of both axes, never of length zero.
fn ranges(figure: &Figure) -> Option<([f64; 2], [f64; 2])> {
    let mut x = [f64::INFINITY, f64::NEG_INFINITY];
    let mut y = x;
    for point in figure.series.iter().flat_map(finite) {
        let [low, high] = point.interval.unwrap_or([point.y, point.y]);
        x = [x[0].min(point.x), x[1].max(point.x)];
        y = [y[0].min(low.min(point.y)), y[1].max(high.max(point.y))];
    }
    if !x[0].is_finite() {
        return None;
    }
    let widened = |[low, high]: [f64; 2], share: f64| {
        let around = if low == 0.0 { 1.0 } else { low.abs() };
        let margin = if high > low { (high - low) * share } else { around * 0.05 };
        [low - margin, high + margin]
    };
    let x = if x[1] > x[0] { x } else { widened(x, 0.0) };
    Some((x, figure.y_range.unwrap_or_else(|| widened(y, 0.06))))
}
