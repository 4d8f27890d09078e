//! Numbers about counts: intervals and priors. No domain words.

pub mod interval;
pub mod prior;
