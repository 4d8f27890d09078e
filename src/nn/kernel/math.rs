//! Pointwise functions and reductions that the compiler can vectorise, compiled for each instruction set.
//!
//! No fused multiply-add here: these functions give the same bytes on every instruction set.

/// Defines a function compiled once for each instruction set and chosen at run time.
macro_rules! for_each_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<const $flag:ident: $flag_type:ty>)? ($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<const $flag: $flag_type>)? ($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body $(<const $flag: $flag_type>)? ($($arg: $type),*) $(-> $result)? $body
            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "calls a function compiled for instructions that were found at run time")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
                fn wide $(<const $flag: $flag_type>)? ($($arg: $type),*) $(-> $result)? { body $(::<$flag>)? ($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn narrow $(<const $flag: $flag_type>)? ($($arg: $type),*) $(-> $result)? { body $(::<$flag>)? ($($arg),*) }
                match $crate::nn::kernel::isa() {
                    // SAFETY: `isa` found these instructions on this processor.
                    $crate::nn::kernel::Isa::Avx512 => return unsafe { wide $(::<$flag>)? ($($arg),*) },
                    // SAFETY: as above.
                    $crate::nn::kernel::Isa::Avx2 => return unsafe { narrow $(::<$flag>)? ($($arg),*) },
                    $crate::nn::kernel::Isa::Baseline => {}
                }
            }
            body $(::<$flag>)? ($($arg),*)
        }
    };
}
pub(crate) use for_each_isa;

/// Lanes of a reduction: partial sums whose number never changes, so neither does the order of summation.
const LANES: usize = 32;

/// The exponential, 1e-7 relative, by range reduction to `|r| <= ln(2)/2` and a polynomial (Cephes' coefficients).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // Adding 1.5·2²³ rounds to the nearest integer and leaves it in the low bits; shifted, it is a power of two.
    let shifted = x * std::f32::consts::LOG2_E + 12_582_912.0;
    let n = shifted - 12_582_912.0;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4_f32;
    let p = p * r + 1.398_2e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    (p * r * r + r + 1.0) * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The hyperbolic tangent, 2e-7 absolute.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// The error function, 3e-7 absolute [Abramowitz & Stegun 7.1.26].
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let a = x.abs();
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p = 1.061_405_4_f32;
    let p = p * t - 1.453_152_1;
    let p = p * t + 1.421_413_8;
    let p = p * t - 0.284_496_72;
    let p = p * t + 0.254_829_6;
    (1.0 - p * t * exp(-a * a)).copysign(x)
}

/// Inner product over fixed lanes.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    for (i, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] += x * y;
    }
    fold(lanes)
}

/// Sum over fixed lanes.
#[inline(always)]
pub(crate) fn sum(a: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for i in 0..LANES {
            lanes[i] += x[i];
        }
    }
    for (i, x) in rest.iter().enumerate() {
        lanes[i] += x;
    }
    fold(lanes)
}

/// Sum of `f(a, b)` over fixed lanes.
#[inline(always)]
pub(crate) fn sum_by(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
    for (x, y) in a_chunks.zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += f(x[i], y[i]);
        }
    }
    for (i, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] += f(*x, *y);
    }
    fold(lanes)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Largest element, over fixed lanes.
#[inline(always)]
pub(crate) fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
        }
    }
    let whole = lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    rest.iter().copied().fold(whole, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(ours: impl Fn(f32) -> f32, theirs: impl Fn(f64) -> f64, range: f32, is_relative: bool) -> f64 {
        (-20_000..=20_000)
            .map(|i| i as f32 / 20_000.0 * range)
            .map(|x| {
                let (a, b) = (f64::from(ours(x)), theirs(f64::from(x)));
                (a - b).abs() / if is_relative { b.abs() } else { 1.0 }
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn pointwise_functions_reach_single_precision() {
        assert!(worst(exp, f64::exp, 80.0, true) < 3e-7);
        assert!(worst(tanh, f64::tanh, 12.0, false) < 3e-7);
        assert!(worst(sigmoid, |x| 1.0 / (1.0 + (-x).exp()), 40.0, false) < 3e-7);
        assert!(worst(erf, statrs::function::erf::erf, 6.0, false) < 5e-7);
    }

    #[test]
    fn the_exponential_saturates_instead_of_wrapping() {
        assert!(exp(-1000.0) < 2e-38 && exp(-1000.0) >= 0.0);
        assert!(exp(1000.0) > 1e38);
    }

    #[test]
    fn reductions_equal_their_definitions() {
        for len in [0, 1, 31, 32, 33, 100] {
            let a: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin()).collect();
            let b: Vec<f32> = (0..len).map(|i| (i as f32 * 0.11).cos()).collect();
            let expected: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            assert!((f64::from(dot(&a, &b)) - expected).abs() < 1e-5);
            let expected: f64 = a.iter().map(|x| f64::from(*x)).sum();
            assert!((f64::from(sum(&a)) - expected).abs() < 1e-5);
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
