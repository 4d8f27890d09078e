//! From predictions to numbers: accuracies with intervals, and the controls that belong beside them.
//!
//! Pure functions of what was predicted; nothing here knows a model, a tensor or an image.

pub mod accuracy;
pub mod controls;
pub mod report;
