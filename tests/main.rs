//! Behaviour tests: one line per module says what belongs there.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

/// Low-rank adapters from training to export.
mod adapters;
/// Adversaries of training: gradients against differences, and that their runs are repeatable.
mod adversaries;
/// Floors (imports go down only); every module documented.
mod architecture;
/// Attacks of every method: budgets, records, curves, smoothed models.
mod attacks;
/// How a checkpoint is stored, loaded and exported.
mod checkpoints;
/// Help, statuses, what goes to which stream.
mod cli;
/// `eval`, `predict`, `data`, `export`, `merge`: their files, and what they refuse.
mod commands;
/// A bad file and the exact message.
mod config_errors;
/// Estimates of memory and time, and what then happens.
mod estimates;
/// Training that goes wrong: numbers, disks, kills, signals, damaged checkpoints; what is said, and that nothing is lost.
mod failures;
/// Files of strangers, damaged at random and by hand: one clear error, no panic, little memory, little time.
mod hostile;
/// Checkpoints by hub id, against a hub on this machine.
mod hub;
/// The network itself: gradients against differences, independence of neighbours, generation with and without a cache.
mod network;
/// What moves in training and how: rates of parts, dropout, averages, references.
mod parameters;
/// What completions are worth in training: further rewards, and commands that give them.
mod rewards;
/// The program, run in a directory of its own.
mod support;
/// A tiny checkpoint and drawn questions, for any test.
mod tiny;
/// Training, attacking and certifying a tiny model: what is learnt, what is logged, and that no kill, thread or batch
/// changes a byte.
mod training;
/// Examinations while a model trains: the same as `attack` and `eval` find, and the best checkpoint stays.
mod validation;
