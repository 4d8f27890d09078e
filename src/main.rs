//! The `safemed` program: parse, call, turn an error into an exit status.

fn main() {}
