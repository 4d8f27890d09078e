//! Behaviour tests: one line per module says what belongs there.
