//! The soft penalty on completions that come near the longest length (DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 13).

/// Where the penalty begins and where it is full, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overlong {
    /// Longest length that is not punished in full: L_max of the paper.
    pub max_length: usize,
    /// Tokens before `max_length` over which the penalty grows: L_cache; at most `max_length`, 0 for a step.
    pub cache: usize,
}

impl Overlong {
    /// The penalty, in [-1, 0], of a completion of `length` tokens, the one that ends it included.
    ///
    /// With L = `length`: 0 while L <= L_max - L_cache, then ((L_max - L_cache) - L) / L_cache, and -1 above L_max.
    pub fn reward(self, length: usize) -> f64 {
        let free = self.max_length.saturating_sub(self.cache);
        if length <= free {
            0.0
        } else if length <= self.max_length {
            -((length - free) as f64) / self.cache as f64
        } else {
            -1.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_free_then_falls_linearly_then_is_full() {
        let overlong = Overlong { max_length: 20, cache: 8 };
        for (length, expected) in [
            (0, 0.0),
            (11, 0.0),
            (12, 0.0),
            (13, -0.125),
            (16, -0.5),
            (19, -0.875),
            (20, -1.0),
            (21, -1.0),
            (1000, -1.0),
        ] {
            assert_eq!(overlong.reward(length), expected, "{length}");
        }
    }

    #[test]
    fn without_a_cache_it_is_a_step_and_a_cache_of_everything_punishes_every_token() {
        let step = Overlong { max_length: 5, cache: 0 };
        assert_eq!([4, 5, 6].map(|length| step.reward(length)), [0.0, 0.0, -1.0]);
        let whole = Overlong { max_length: 4, cache: 4 };
        assert_eq!([0, 1, 3, 4, 5].map(|length| whole.reward(length)), [0.0, -0.25, -0.75, -1.0, -1.0]);
    }
}
