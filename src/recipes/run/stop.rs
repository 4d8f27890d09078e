//! Requests to stop: the first SIGINT, SIGTERM or SIGUSR1 asks, a second SIGINT ends the process with 130 at once.

use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that anyone may raise, and that recipes look at between items and steps.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Ties the flag to the signals of this process.
    pub fn on_signals() -> Result<Self> {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let stop = Self::default();
        let install = || -> std::io::Result<()> {
            // The order matters: when the first SIGINT comes by here, it has not been noted yet.
            let interrupted = Arc::new(AtomicBool::new(false));
            signal_hook::flag::register_conditional_shutdown(SIGINT, 130, Arc::clone(&interrupted))?;
            signal_hook::flag::register(SIGINT, interrupted)?;
            signal_hook::flag::register(SIGINT, Arc::clone(&stop.0))?;
            signal_hook::flag::register(SIGTERM, Arc::clone(&stop.0))?;
            #[cfg(unix)]
            signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&stop.0))?;
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
        for signal in
            [signal_hook::consts::SIGTERM, signal_hook::consts::SIGUSR1, signal_hook::consts::SIGINT]
        {
            let stop = Stop::on_signals().unwrap();
            assert!(stop.check().is_ok());
            signal_hook::low_level::raise(signal).unwrap();
            assert_eq!(stop.check().unwrap_err().status(), ExitStatus::Stopped, "signal {signal}");
        }
    }
}
