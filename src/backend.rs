//! Where tensors live: `auto | cpu | cuda[:N] | metal` resolved to a device, or a clear refusal.

use crate::error::{Error, Result};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// The device a user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Backend {
    /// The best device present: CUDA, Metal, else CPU.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// One NVIDIA GPU, by ordinal.
    Cuda(usize),
    /// Apple's GPU.
    Metal,
}

impl FromStr for Backend {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            other => other
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("unknown device `{other}`: use auto, cpu, cuda, cuda:N or metal")),
        }
    }
}

impl TryFrom<String> for Backend {
    type Error = String;
    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<Backend> for String {
    fn from(backend: Backend) -> Self {
        backend.to_string()
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Metal => write!(f, "metal"),
        }
    }
}

/// Vector instructions that the processor's arithmetic is compiled for. Results are the same bytes on one of them, and agree
/// to rounding between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the compilation target guarantees: NEON on ARM.
    Baseline,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

impl Isa {
    /// As `SAFEMED_ISA` spells it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The best that this processor has.
    fn detected() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if wide {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Baseline
    }

    /// What the environment variable `SAFEMED_ISA` allows; none when it is not set.
    ///
    /// # Errors
    /// A usage error for another word.
    pub fn limit() -> Result<Option<Self>> {
        let Some(word) = std::env::var_os("SAFEMED_ISA").filter(|word| !word.is_empty()) else {
            return Ok(None);
        };
        [Self::Baseline, Self::Avx2, Self::Avx512].into_iter().find(|isa| word == isa.word()).map(Some).ok_or_else(
            || {
                Error::usage(format!(
                    "SAFEMED_ISA is `{}`\n   = help: take baseline, avx2 or avx512, or leave it unset for the best there is",
                    word.display()
                ))
            },
        )
    }
}

/// The instructions in use, found once: the best there are, or fewer where `SAFEMED_ISA` says so, which gives the numbers of a lesser
/// machine.
pub fn isa() -> Isa {
    static FOUND: OnceLock<Isa> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let found = Isa::detected();
        Isa::limit().ok().flatten().map_or(found, |limit| found.min(limit))
    })
}

impl Backend {
    /// The device itself.
    ///
    /// # Errors
    /// A usage error when this build or this machine does not have the device asked for.
    pub fn device(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Auto => {
                if candle_core::utils::cuda_is_available() {
                    Self::Cuda(0).device()
                } else if candle_core::utils::metal_is_available() {
                    Self::Metal.device()
                } else {
                    Ok(Device::Cpu)
                }
            }
            Self::Cuda(ordinal) => {
                if !candle_core::utils::cuda_is_available() {
                    return Err(Error::usage(
                        "device `cuda` was asked for, but this build has no CUDA support\n   = help: build with `--features cuda`, or use `--device cpu`",
                    ));
                }
                Device::new_cuda(ordinal).map_err(|error| {
                    Error::usage(format!(
                        "device `cuda:{ordinal}` cannot be opened: {error}\n   = help: check `nvidia-smi`, or use `--device cpu`"
                    ))
                })
            }
            Self::Metal => {
                if !candle_core::utils::metal_is_available() {
                    return Err(Error::usage(
                        "device `metal` was asked for, but this build has no Metal support\n   = help: build with `--features metal` on macOS, or use `--device cpu`",
                    ));
                }
                Device::new_metal(0)
                    .map_err(|error| Error::usage(format!("device `metal` cannot be opened: {error}")))
            }
        }
    }
}

/// Most memory that this process has held at once since it began or since [`restart_peak_memory`], in bytes of resident
/// pages; none where the system does not tell (it is read from Linux's `/proc`).
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(peak.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Lets [`peak_memory_bytes`] begin anew from what is held now, where the system can.
pub fn restart_peak_memory() {
    // Where there is no such file the peak goes on counting from the start of the process.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Runs `work` on a pool of `threads` threads (absent: one for each processor), itself one of them.
///
/// Inside the pool a parallel operation starts without waking another thread first, which matters for small models;
/// the stacks are large enough for the backward pass of deep graphs. The number of threads changes no result.
///
/// # Errors
/// When threads cannot be started, and whatever `work` returns.
pub fn with_threads<T: Send>(threads: Option<usize>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    const STACK_BYTES: usize = 256 << 20;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads.unwrap_or(0))
        .stack_size(STACK_BYTES)
        .build()
        .map_err(|error| Error::usage(format!("cannot start {threads:?} threads: {error}")))?;
    pool.install(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_word_round_trips_and_nonsense_is_refused() {
        for word in ["auto", "cpu", "cuda:0", "cuda:3", "metal"] {
            assert_eq!(word.parse::<Backend>().unwrap().to_string(), word);
        }
        assert_eq!("cuda".parse(), Ok(Backend::Cuda(0)));
        assert!("gpu".parse::<Backend>().is_err());
    }
}
