//! What the program and the benchmarks set up before anything else, and how much memory the process took.

/// mimalloc's `mi_option_purge_delay`: milliseconds until freed pages go back to the system; -1 is never. Given back,
/// they would be cleared and faulted in again at every step: measured, a tenth of a training step.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Sets up environment and allocator; the first statement of `main`.
#[expect(unsafe_code, reason = "environment and allocator are set up before any other thread exists")]
pub(crate) fn prepare() {
    // candle's own element-wise pool spins while it waits and takes the cores from our threads: measured, half the time
    // of a training step. Everything heavy is parallel in `nn` already.
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: this is the first statement of a process with one thread.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
    // SAFETY: an option of the allocator, set before any other thread allocates.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}
