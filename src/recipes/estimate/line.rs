//! From figures of truncated models to those of the whole one: a straight line in the blocks of each kind.

use super::probe::Figures;
use crate::model::truncate::Depths;

/// Figures of a model with `extra` more blocks of one kind, of which the whole one has `rest` more.
#[derive(Debug, Clone, PartialEq)]
pub struct More {
    /// What was measured.
    pub figures: Figures,
    /// Blocks more than the shallowest model's; at least 1.
    pub extra: usize,
    /// Blocks that the whole model has more than the shallowest.
    pub rest: usize,
}

/// Every figure of the whole model: `base + Σ rest · (more - base) / extra`, where a block never costs less than nothing.
/// Figures that some measurement lacks are left out.
pub fn extrapolate(base: &Figures, more: &[More]) -> Figures {
    let whole = |name: &String, value: f64| {
        more.iter().try_fold(value, |sum, more| {
            let slope = (more.figures.get(name)? - value) / more.extra as f64;
            Some(sum + slope.max(0.0) * more.rest as f64)
        })
    };
    base.iter().filter_map(|(name, value)| Some((name.clone(), whole(name, *value)?))).collect()
}

/// The truncated models to measure beside the shallowest: kind and number of blocks of it. As many blocks more as tell
/// them from noise.
pub fn steps_up(base: Depths, whole: Depths) -> Vec<(usize, usize)> {
    let most = [4, 3, 2, 2];
    (0..most.len())
        .filter(|&kind| whole.0[kind] > base.0[kind])
        .map(|kind| (kind, (base.0[kind] + most[kind]).min(whole.0[kind])))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_cost_is_found_exactly_and_noise_never_counts_negative() {
        let cost = |depths: Depths| -> Figures {
            let [a, b, c, d] = depths.0.map(|count| count as f64);
            let figures = [("seconds", 3.0 + 2.0 * a + 0.5 * b + 0.25 * c), ("bytes", 100.0 + 7.0 * d)];
            figures.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
        };
        let (base, whole) = (Depths([3, 2, 2, 2]), Depths([36, 28, 4, 2]));
        let ups = steps_up(base, whole);
        assert_eq!(ups, [(0, 7), (1, 5), (2, 4)]);
        let mut more: Vec<More> = ups
            .iter()
            .map(|&(kind, count)| More {
                figures: cost(base.with(kind, count)),
                extra: count - base.0[kind],
                rest: whole.0[kind] - base.0[kind],
            })
            .collect();
        let found = extrapolate(&cost(base), &more);
        for (name, value) in cost(whole) {
            assert!((found[&name] - value).abs() < 1e-9 * value, "{name}: {} {value}", found[&name]);
        }
        // A block that seems to cost less than nothing costs nothing; a figure that one measurement lacks is not made up.
        more[1].figures.insert("seconds".to_owned(), 0.0);
        more[2].figures.remove("bytes");
        let found = extrapolate(&cost(base), &more);
        assert!(!found.contains_key("bytes"));
        let wanted = cost(whole)["seconds"] - 26.0 * 0.5;
        assert!((found["seconds"] - wanted).abs() < 1e-9);
    }
}
