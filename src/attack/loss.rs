//! Losses over the scores of a question's options, each with its derivative.
//!
//! A score is the log-likelihood of an option's completion in nats: all losses here depend on differences of scores
//! only, so the options need not be normalised. Higher is worse for the model.

/// What an attack maximises, given how likely the model finds each option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionLoss {
    /// Negative score of the right option: of one completion that is its negative log-likelihood.
    Likelihood,
    /// Negative log of the right option's share among the options.
    CrossEntropy,
    /// The best wrong score minus the right one (Carlini and Wagner 2017).
    Margin,
    /// The same divided by best minus third score, which no scaling of the scores changes (Croce and Hein 2020);
    /// needs three options and is the margin with two.
    Dlr,
    /// The score of the option at this place minus the right one; with four options or more divided by best minus
    /// mean of third and fourth score (Croce and Hein 2020, targeted DLR).
    Targeted(usize),
}

/// Keeps the quotient of a tie finite (AutoAttack's constant).
const TIE: f64 = 1e-12;

impl OptionLoss {
    /// The loss and its derivative by each of `scores`; `right` is the place of the right option.
    ///
    /// Losses that compare need at least two scores.
    pub fn of(self, scores: &[f64], right: usize) -> (f64, Vec<f64>) {
        let mut slope = vec![0.0; scores.len()];
        let value = match self {
            Self::Likelihood => {
                slope[right] = -1.0;
                -scores[right]
            }
            Self::CrossEntropy => {
                let share = softmax(scores);
                for (slope, share) in slope.iter_mut().zip(&share) {
                    *slope = *share;
                }
                slope[right] -= 1.0;
                -log_softmax(scores, right)
            }
            Self::Margin => difference(scores, right, best_wrong(scores, right), &mut slope),
            Self::Targeted(target) if scores.len() < 4 => difference(scores, right, target, &mut slope),
            Self::Dlr if scores.len() < 3 => difference(scores, right, best_wrong(scores, right), &mut slope),
            Self::Dlr => {
                let order = descending(scores);
                let width = scores[order[0]] - scores[order[2]] + TIE;
                let widen = [(order[0], 1.0), (order[2], -1.0)];
                quotient(scores, right, best_wrong(scores, right), width, &widen, &mut slope)
            }
            Self::Targeted(target) => {
                let order = descending(scores);
                let width = scores[order[0]] - 0.5 * (scores[order[2]] + scores[order[3]]) + TIE;
                let widen = [(order[0], 1.0), (order[2], -0.5), (order[3], -0.5)];
                quotient(scores, right, target, width, &widen, &mut slope)
            }
        };
        (value, slope)
    }
}

fn difference(scores: &[f64], right: usize, rival: usize, slope: &mut [f64]) -> f64 {
    slope[rival] += 1.0;
    slope[right] -= 1.0;
    scores[rival] - scores[right]
}

/// (rival - right) / width, where `width` changes by the given shares of scores.
fn quotient(
    scores: &[f64],
    right: usize,
    rival: usize,
    width: f64,
    widen: &[(usize, f64)],
    slope: &mut [f64],
) -> f64 {
    let value = (scores[rival] - scores[right]) / width;
    slope[rival] += 1.0 / width;
    slope[right] -= 1.0 / width;
    for &(place, share) in widen {
        slope[place] -= share * value / width;
    }
    value
}

/// The first of the best options that are not right.
fn best_wrong(scores: &[f64], right: usize) -> usize {
    let wrong = (0..scores.len()).filter(|&place| place != right);
    wrong.reduce(|best, place| if scores[place] > scores[best] { place } else { best }).unwrap_or(right)
}

/// Places by falling score, the first of equals first.
fn descending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}

/// Shares that sum to one.
pub fn softmax(scores: &[f64]) -> Vec<f64> {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut shares: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
    let sum: f64 = shares.iter().sum();
    for share in &mut shares {
        *share /= sum;
    }
    shares
}

/// Log of the share of the score at `place`.
pub fn log_softmax(scores: &[f64], place: usize) -> f64 {
    scores[place] - log_sum(scores)
}

/// Log of the sum of exponentials.
pub fn log_sum(scores: &[f64]) -> f64 {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + scores.iter().map(|score| (score - most).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCORES: [f64; 5] = [-3.1, -1.2, -2.7, -9.0, -0.4];

    fn losses(count: usize) -> Vec<OptionLoss> {
        use OptionLoss::{CrossEntropy, Dlr, Likelihood, Margin, Targeted};
        let mut losses = vec![Likelihood, CrossEntropy, Margin, Dlr];
        losses.extend((0..count).map(Targeted));
        losses
    }

    #[test]
    fn derivatives_equal_central_differences() {
        for count in 2..=5 {
            for right in 0..count {
                for loss in losses(count) {
                    if loss == OptionLoss::Targeted(right) {
                        continue;
                    }
                    let (_, slope) = loss.of(&SCORES[..count], right);
                    for place in 0..count {
                        let moved = |by: f64| {
                            let mut scores = SCORES[..count].to_vec();
                            scores[place] += by;
                            loss.of(&scores, right).0
                        };
                        let expected = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                        let found = slope[place];
                        assert!(
                            (found - expected).abs() < 1e-8,
                            "{loss:?} {count} {right} {place}: {found} {expected}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn values_are_those_of_the_formulas() {
        let value = |loss: OptionLoss, count: usize, right| loss.of(&SCORES[..count], right).0;
        assert_eq!(value(OptionLoss::Likelihood, 5, 2), 2.7);
        assert!((value(OptionLoss::Margin, 5, 4) - (-1.2 + 0.4)).abs() < 1e-12);
        assert!((value(OptionLoss::Margin, 5, 0) - (-0.4 + 3.1)).abs() < 1e-12);
        // best -0.4, third -2.7, fourth -3.1
        assert!((value(OptionLoss::Dlr, 5, 4) - (-0.8 / 2.3)).abs() < 1e-11);
        assert!((value(OptionLoss::Targeted(3), 5, 4) - (-8.6 / 2.5)).abs() < 1e-11);
        assert_eq!(value(OptionLoss::Dlr, 2, 1), value(OptionLoss::Margin, 2, 1));
        assert_eq!(value(OptionLoss::Targeted(0), 3, 1), -3.1 + 1.2);
        let total: f64 = SCORES.iter().map(|score| score.exp()).sum();
        assert!((value(OptionLoss::CrossEntropy, 5, 1) - (total.ln() + 1.2)).abs() < 1e-12);
    }

    #[test]
    fn what_compares_is_above_zero_exactly_where_a_wrong_option_leads_and_ignores_a_common_shift() {
        for right in 0..5 {
            for loss in [OptionLoss::Margin, OptionLoss::Dlr] {
                assert_eq!(loss.of(&SCORES, right).0 > 0.0, right != 4);
                let shifted = SCORES.map(|score| 100.0 + score);
                assert!((loss.of(&shifted, right).0 - loss.of(&SCORES, right).0).abs() < 1e-9);
            }
        }
        let scaled = SCORES.map(|score| 50.0 * score);
        assert!((OptionLoss::Dlr.of(&scaled, 4).0 - OptionLoss::Dlr.of(&SCORES, 4).0).abs() < 1e-9);
        // All options equally likely: finite all the same.
        assert!(OptionLoss::Dlr.of(&[-1.0; 4], 0).0.abs() < 1e-9);
    }
}
