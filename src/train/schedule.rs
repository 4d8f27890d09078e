//! The learning rate as a pure function of the step: constant, linear or cosine, after a linear warm-up.
//!
//! Nothing here has state, so a resumed run needs only its step number.

use serde::{Deserialize, Serialize};

/// What the learning rate does after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Stays at its peak.
    Constant,
    /// Falls on a line.
    #[default]
    Linear,
    /// Falls on half a cosine wave.
    Cosine,
}

/// Warm-up, then decay towards a floor.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// What follows the warm-up.
    pub kind: ScheduleKind,
    /// Optimiser steps over which the rate rises from zero to its peak.
    pub warmup_steps: u64,
    /// Where the decay ends, as a fraction of the peak, in [0, 1]. Without meaning for `constant`.
    pub final_fraction: f64,
}

impl Schedule {
    /// The fraction of the peak learning rate for the step that follows `steps_done` of `total_steps` steps.
    ///
    /// The first step of a run with a warm-up has rate zero, as in Hugging Face's `get_scheduler`, whose numbers
    /// these are. Beyond `total_steps`, where no run goes, the formulas are continued: the line stays at its
    /// floor, the cosine rises again.
    pub fn factor(&self, steps_done: u64, total_steps: u64) -> f64 {
        if steps_done < self.warmup_steps {
            return steps_done as f64 / self.warmup_steps as f64;
        }
        let decay_steps = total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = (steps_done - self.warmup_steps) as f64 / decay_steps;
        let falling = match self.kind {
            ScheduleKind::Constant => return 1.0,
            ScheduleKind::Linear => (1.0 - progress).max(0.0),
            ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.final_fraction + (1.0 - self.final_fraction) * falling
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::test_support::{assert_close, numbers, reference};

    const KINDS: [ScheduleKind; 3] = [ScheduleKind::Constant, ScheduleKind::Linear, ScheduleKind::Cosine];

    #[test]
    fn warm_up_rises_on_a_line_to_the_peak_and_the_floor_is_reached_at_the_end() {
        for kind in KINDS {
            let schedule = Schedule { kind, warmup_steps: 4, final_fraction: 0.1 };
            for step in 0..=4 {
                assert_eq!(schedule.factor(step, 20), step as f64 / 4.0, "{kind:?}");
            }
            let end = if kind == ScheduleKind::Constant { 1.0 } else { 0.1 };
            assert!((schedule.factor(20, 20) - end).abs() < 1e-15, "{kind:?}");
        }
    }

    #[test]
    fn decays_pass_half_way_at_half_time_and_never_rise() {
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine] {
            let schedule = Schedule { kind, warmup_steps: 0, final_fraction: 0.2 };
            assert!((schedule.factor(50, 100) - 0.6).abs() < 1e-15);
            assert!((0..100).all(|step| schedule.factor(step, 100) > schedule.factor(step + 1, 100)));
        }
        let quarter =
            Schedule { kind: ScheduleKind::Cosine, warmup_steps: 0, final_fraction: 0.0 }.factor(25, 100);
        assert!((quarter - (0.5 + 0.125f64.sqrt())).abs() < 1e-15, "{quarter}");
    }

    #[test]
    fn a_run_shorter_than_its_warm_up_is_all_warm_up() {
        for kind in KINDS {
            let schedule = Schedule { kind, warmup_steps: 10, final_fraction: 0.0 };
            assert_eq!(schedule.factor(3, 5), 0.3);
            assert_eq!(schedule.factor(10, 5), 1.0);
        }
    }

    #[test]
    fn curves_equal_the_reference() {
        let Some(reference) = reference("fixtures/optim.json") else { return };
        for (name, curve) in reference["schedules"].as_object().unwrap() {
            let parts: Vec<&str> = name.split('.').collect();
            let kind = match parts[0] {
                "cosine" => ScheduleKind::Cosine,
                "linear" => ScheduleKind::Linear,
                _ => ScheduleKind::Constant,
            };
            let warmup_steps = parts[1].trim_start_matches("warmup").parse().unwrap();
            let total = parts[2].trim_start_matches("total").parse().unwrap();
            let schedule = Schedule { kind, warmup_steps, final_fraction: 0.0 };
            let want = numbers(curve);
            let got: Vec<f64> = (0..want.len()).map(|step| schedule.factor(step as u64, total)).collect();
            assert_close(&got, &want, 1e-12, name);
        }
    }
}
