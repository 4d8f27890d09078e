//! Where tensors live: `auto | cpu | cuda[:N] | metal` resolved to a device, or a clear refusal.

use crate::error::{Error, Result};
use crate::files::guarded;
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
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
    /// What `auto` stands for on this machine, found once: the first GPU that opens, else the processor, with a warning where
    /// this build has a GPU's kernels. Any other as it is.
    #[must_use]
    pub fn resolved(self) -> Self {
        static BEST: OnceLock<Backend> = OnceLock::new();
        match self {
            Self::Auto => *BEST.get_or_init(|| {
                [Self::Cuda(0), Self::Metal]
                    .into_iter()
                    .filter(|gpu| gpu.is_built_in())
                    .find(|gpu| match gpu.open() {
                        Ok(_) => true,
                        Err((problem, _)) => {
                            tracing::warn!(
                                "device `{gpu}` cannot be opened: {problem}; `auto` takes the processor"
                            );
                            false
                        }
                    })
                    .unwrap_or(Self::Cpu)
            }),
            named => named,
        }
    }

    /// Whether this build has its kernels.
    fn is_built_in(self) -> bool {
        match self {
            Self::Auto | Self::Cpu => true,
            Self::Cuda(_) => candle_core::utils::cuda_is_available(),
            Self::Metal => candle_core::utils::metal_is_available(),
        }
    }

    /// The device itself.
    ///
    /// # Errors
    /// A usage error when this build or this machine does not have the device asked for.
    pub fn device(self) -> Result<Device> {
        let backend = self.resolved();
        if backend.is_built_in() {
            return backend.open().map_err(|(problem, help)| {
                Error::usage(format!(
                    "device `{backend}` cannot be opened: {problem}\n   = help: {help}, or use `--device cpu`"
                ))
            });
        }
        let (device, support, build) = match backend {
            Self::Metal => ("metal", "Metal", "`--features metal` on macOS"),
            _ => ("cuda", "CUDA", "`--features cuda`, as `scripts/build_cuda.sh` does"),
        };
        Err(Error::usage(format!(
            "device `{device}` was asked for, but this build has no {support} support\n   = help: build with {build}, or use `--device cpu`"
        )))
    }

    /// The device, or what is wrong and what helps.
    fn open(self) -> std::result::Result<Device, (String, &'static str)> {
        let opening = || match self {
            Self::Auto | Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) => tried(Device::new_cuda(ordinal)?),
            Self::Metal => tried(Device::new_metal(0)?),
        };
        let opened = OPENED.with_borrow(|all| all.iter().find(|(gpu, _)| *gpu == self).cloned());
        if let Some((_, device)) = opened {
            return Ok(device);
        }
        // Where libraries are loaded at run time, candle's crates panic when one is absent.
        let device = guarded(opening).unwrap_or_else(|| Err(candle_core::Error::Msg(ABSENT.to_owned())));
        let device = device.map_err(|error| problem_of(&error.to_string()))?;
        OPENED.with_borrow_mut(|all| all.push((self, device.clone())));
        Ok(device)
    }
}

thread_local! {
    /// GPUs that this thread has opened. To candle two openings are two devices, whose tensors do not mix; and each thread has
    /// a queue of its own on a GPU, which no other thread waits for, so none is lent to another thread.
    static OPENED: RefCell<Vec<(Backend, Device)>> = const { RefCell::new(Vec::new()) };
}

/// The device, if it computes: whether kernels suit a GPU and its driver shows when the first of them is loaded.
fn tried(device: Device) -> candle_core::Result<Device> {
    let one = (Tensor::zeros(1, DType::F32, &device)? + 1.0)?;
    match one.to_vec1::<f32>()?[..] {
        [1.0] => Ok(device),
        ref other => candle_core::bail!("0 + 1 is {other:?} on it"),
    }
}

/// The error that stands for a panic while a device was opened.
const ABSENT: &str = "a library of its driver is absent";

/// What an error of a GPU's driver means for its user, and what helps.
fn problem_of(error: &str) -> (String, &'static str) {
    const NO_DRIVER: &str = "install the NVIDIA driver, and keep stubs of libcuda off LD_LIBRARY_PATH";
    const OTHER_KERNELS: &str = "build with CUDA_COMPUTE_CAP set to this GPU's (80 where `nvidia-smi --query-gpu=compute_cap` says 8.0)";
    const NEWER: &str = "update the driver, or build with the CUDA version that `nvidia-smi` names";
    let known = [
        ("STUB_LIBRARY", "there is no NVIDIA driver, only a stub of libcuda", NO_DRIVER),
        ("NO_DEVICE", "the NVIDIA driver finds no GPU", "check `nvidia-smi` and CUDA_VISIBLE_DEVICES"),
        ("INVALID_DEVICE", "there is no GPU of this number", "see `nvidia-smi` for those there are"),
        ("NO_BINARY_FOR_GPU", "this build's kernels are for another GPU", OTHER_KERNELS),
        ("INVALID_PTX", "this build's kernels are for another GPU", OTHER_KERNELS),
        ("UNSUPPORTED_PTX_VERSION", "this build's kernels are newer than the NVIDIA driver", NEWER),
    ];
    match known.into_iter().find(|(sign, ..)| error.contains(sign)) {
        Some((_, problem, help)) => (problem.to_owned(), help),
        None => (error.to_owned(), "look into its driver with `nvidia-smi` or the system's own report"),
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
        .map_err(|error| unstarted(threads, &error))?;
    pool.install(|| {
        let result = work();
        // Closed here: the thread itself ends at some time that nobody waits for, when the driver may be gone.
        OPENED.take();
        result
    })
}

/// The error of threads that cannot be started.
fn unstarted(threads: Option<usize>, error: &dyn fmt::Display) -> Error {
    let threads = match threads {
        None => "one thread for each processor".to_owned(),
        Some(1) => "a thread".to_owned(),
        Some(count) => format!("{count} threads"),
    };
    Error::usage(format!(
        "cannot start {threads}: {error}\n   = help: take fewer with `--threads`, or raise this process's limits of threads and memory (`ulimit -u`, `ulimit -v`)"
    ))
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

    #[test]
    fn auto_is_a_device_that_opens_and_a_named_one_is_opened_or_refused() {
        assert!(!matches!(Backend::Auto.resolved(), Backend::Auto));
        assert!(Backend::Auto.device().unwrap().same_device(&Backend::Auto.device().unwrap()));
        for named in [Backend::Cpu, Backend::Cuda(99), Backend::Metal] {
            assert_eq!(named.resolved(), named);
        }
        let error = Backend::Cuda(99).device().unwrap_err();
        assert_eq!(error.status(), crate::error::ExitStatus::Usage);
        assert!(error.to_string().contains("--device cpu"), "{error}");
    }

    #[test]
    fn threads_that_cannot_be_started_are_counted_in_words() {
        for (threads, words) in [
            (None, "cannot start one thread for each processor: no room\n"),
            (Some(1), "cannot start a thread: no room\n"),
            (Some(5), "cannot start 5 threads: no room\n"),
        ] {
            let text = unstarted(threads, &"no room").to_string();
            assert!(text.starts_with(words) && text.contains("`--threads`"), "{text}");
        }
    }

    #[test]
    fn errors_of_the_driver_are_put_in_words_and_unknown_ones_kept() {
        let words = |code: &str| problem_of(&format!("DriverError({code}, \"...\")")).0;
        assert!(words("CUDA_ERROR_STUB_LIBRARY").contains("no NVIDIA driver"));
        assert!(words("CUDA_ERROR_NO_DEVICE").contains("no GPU"));
        assert!(words("CUDA_ERROR_INVALID_PTX").contains("another GPU"));
        assert!(words("CUDA_ERROR_OUT_OF_MEMORY").contains("OUT_OF_MEMORY"));
    }
}
