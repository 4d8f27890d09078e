//! Requests to stop: the first SIGINT, SIGTERM or SIGUSR1 asks, and the run ends where everything is saved. A step, an attack or
//! a validation may take minutes until then: a second SIGINT or SIGTERM, whichever came first, ends the process with 130 at once.
//!
//! SIGUSR1 is a scheduler's warning of the SIGTERM to come and is not counted: the SIGTERM after it asks once more.

use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A write beyond the size that `ulimit -f` allows a file; of Linux and macOS.
#[cfg(unix)]
const SIGXFSZ: i32 = 25;

/// A flag that anyone may raise, and that recipes look at between items and steps.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Ties the flag to the signals of this process.
    pub fn on_signals() -> Result<Self> {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let stop = Self::default();
        let install = || -> std::io::Result<()> {
            let interrupted = Arc::new(AtomicBool::new(false));
            for signal in [SIGINT, SIGTERM] {
                // The order matters: when the first signal comes by here, it has not been noted yet.
                signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupted))?;
                signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
                signal_hook::flag::register(signal, Arc::clone(&stop.0))?;
            }
            #[cfg(unix)]
            {
                signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&stop.0))?;
                // A file as large as the limit allows is an error of its write, to be told: unheeded, the signal would end the
                // process without a word.
                signal_hook::flag::register(SIGXFSZ, Arc::default())?;
            }
            Ok(())
        };
        install().map_err(|error| anyhow::anyhow!("cannot listen to signals: {error}"))?;
        Ok(stop)
    }

    /// Raises the flag.
    pub fn request(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether someone asked to stop.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// [`Error::Stopped`] when someone asked to stop. Call it where everything is saved.
    pub fn check(&self) -> Result<()> {
        if self.requested() { Err(Error::Stopped) } else { Ok(()) }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::error::ExitStatus;

    #[test]
    fn each_signal_that_asks_to_stop_raises_the_flag() {
        // A second SIGINT or SIGTERM would end this process: that is tested on another one.
        for signal in
            [signal_hook::consts::SIGUSR1, signal_hook::consts::SIGUSR1, signal_hook::consts::SIGTERM]
        {
            let stop = Stop::on_signals().unwrap();
            assert!(stop.check().is_ok());
            signal_hook::low_level::raise(signal).unwrap();
            assert_eq!(stop.check().unwrap_err().status(), ExitStatus::Stopped, "signal {signal}");
        }
    }
}
