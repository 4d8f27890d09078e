//! One safetensors file, mapped: its header checked, its numbers read in place, its pages given back when done.

use crate::error::{Error, Result};
use crate::files;
use crate::nn::linear::Values;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One safetensors file, mapped; its header is checked, its numbers are not read until asked for.
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    header: Metadata,
    /// Where the numbers begin.
    data_start: usize,
}

impl std::fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TensorFile").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Numbers of a tensor, row-major: those of a file where they lie, or others.
///
/// When it is dropped, the file's pages leave this process's memory; reading them again brings them back.
#[derive(Debug)]
pub struct Numbers<'a> {
    kind: Kind<'a>,
    pages: Option<Pages<'a>>,
}

#[derive(Debug)]
enum Kind<'a> {
    Single(Cow<'a, [f32]>),
    Half(Cow<'a, [bf16]>),
}

#[derive(Debug)]
struct Pages<'a> {
    file: &'a TensorFile,
    range: Range<usize>,
}

impl Pages<'_> {
    /// Gives back the pages of `range`, in bytes of the file; at the ends a neighbour may have to read them again.
    #[cfg_attr(not(unix), expect(unused_variables, clippy::unused_self, reason = "advice is given on Unix"))]
    fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            use memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the mapping is private, read-only and never written: a page that is dropped and read again holds
            // the same bytes.
            #[expect(unsafe_code, reason = "advice that would lose writes to an anonymous mapping")]
            let advised = unsafe { self.file.map.unchecked_advise_range(DontNeed, range.start, range.len()) };
            // Advice that is not taken costs memory, nothing else.
            drop(advised);
        }
    }
}

impl Drop for Pages<'_> {
    fn drop(&mut self) {
        self.release(self.range.clone());
    }
}

impl From<Vec<f32>> for Numbers<'_> {
    fn from(values: Vec<f32>) -> Self {
        Self { kind: Kind::Single(Cow::Owned(values)), pages: None }
    }
}

impl From<Vec<bf16>> for Numbers<'_> {
    fn from(values: Vec<bf16>) -> Self {
        Self { kind: Kind::Half(Cow::Owned(values)), pages: None }
    }
}

impl TryFrom<&Tensor> for Numbers<'_> {
    type Error = candle_core::Error;

    /// The tensor's values in float32.
    fn try_from(tensor: &Tensor) -> candle_core::Result<Self> {
        let flat = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?;
        Ok(flat.to_vec1::<f32>()?.into())
    }
}

impl Numbers<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match &self.kind {
            Kind::Single(values) => values.len(),
            Kind::Half(values) => values.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives back the pages of the file that hold these of the numbers; they can still be read.
    pub fn release(&self, range: Range<usize>) {
        if let Some(pages) = &self.pages {
            let size = pages.range.len() / self.len().max(1);
            let start = pages.range.start;
            pages.release(start + range.start * size..start + range.end * size);
        }
    }

    /// As the network's layers take them.
    pub fn values(&self) -> Values<'_> {
        match &self.kind {
            Kind::Single(values) => Values::Single(values),
            Kind::Half(values) => Values::Half(values),
        }
    }

    /// As a file of type `dtype` (float32, float16 or bfloat16) holds them, rounded to the nearest where it is
    /// narrower.
    pub fn to_bytes(&self, dtype: Dtype) -> Vec<u8> {
        fn encode<const N: usize>(values: Values<'_>, encode: impl Fn(f32) -> [u8; N] + Sync) -> Vec<u8> {
            match values {
                Values::Single(values) => values.iter().flat_map(|&value| encode(value)).collect(),
                Values::Half(values) => values.iter().flat_map(|value| encode(value.to_f32())).collect(),
            }
        }
        match dtype {
            Dtype::F16 => encode(self.values(), |value| f16::from_f32(value).to_le_bytes()),
            Dtype::BF16 => encode(self.values(), |value| bf16::from_f32(value).to_le_bytes()),
            _ => encode(self.values(), f32::to_le_bytes),
        }
    }

    /// In float32.
    pub fn into_floats(self) -> Vec<f32> {
        match self.kind {
            Kind::Single(values) => values.into_owned(),
            Kind::Half(values) => values.iter().map(|value| value.to_f32()).collect(),
        }
    }

    /// Rounded to bfloat16, to the nearest and to even.
    #[must_use]
    pub fn rounded(self) -> Self {
        match &self.kind {
            Kind::Single(values) => values.iter().copied().map(bf16::from_f32).collect::<Vec<_>>().into(),
            Kind::Half(_) => self,
        }
    }

    /// In float32, which loses nothing.
    #[must_use]
    pub fn widened(self) -> Self {
        match &self.kind {
            Kind::Single(_) => self,
            Kind::Half(_) => self.into_floats().into(),
        }
    }

    /// A float32 tensor of this shape on the CPU.
    ///
    /// # Errors
    /// When the shape is another one's.
    pub fn into_tensor(self, shape: &[usize]) -> candle_core::Result<Tensor> {
        Tensor::from_vec(self.into_floats(), shape, &Device::Cpu)
    }

    /// Whether one of the numbers in `range` is not finite.
    pub fn has_bad(&self, range: Range<usize>) -> bool {
        // A number is not finite when its bits without the sign exceed those of the largest one: the difference is
        // negative, and its sign stays. No exit and no comparison, so that it is a loop of plain vector instructions.
        match &self.kind {
            Kind::Single(values) => {
                let largest = f32::MAX.to_bits();
                let bits = |value: &f32| largest.wrapping_sub(value.to_bits() << 1 >> 1);
                values[range].iter().fold(0, |all, value| all | bits(value)) >> 31 == 1
            }
            Kind::Half(values) => {
                let largest = bf16::MAX.to_bits();
                let bits = |value: &bf16| largest.wrapping_sub(value.to_bits() << 1 >> 1);
                values[range].iter().fold(0, |all, value| all | bits(value)) >> 15 == 1
            }
        }
    }

    /// Place and value of the first number that is not finite. The file's pages are given back on the way.
    pub fn not_finite(&self) -> Option<(usize, f32)> {
        const CHUNK: usize = 1 << 18;
        let range = |chunk: usize| chunk * CHUNK..((chunk + 1) * CHUNK).min(self.len());
        let chunk = (0..self.len().div_ceil(CHUNK)).into_par_iter().find_first(|&chunk| {
            let is_bad = self.has_bad(range(chunk));
            self.release(range(chunk));
            is_bad
        })?;
        let value = |at: usize| match &self.kind {
            Kind::Single(values) => values[at],
            Kind::Half(values) => values[at].to_f32(),
        };
        range(chunk).map(|at| (at, value(at))).find(|(_, value)| !value.is_finite())
    }

    /// Refuses numbers of which one is not finite.
    ///
    /// # Errors
    /// A non-finite error that names the weight, the place and the file.
    pub fn check_finite(&self, name: &str) -> Result<()> {
        let Some((place, value)) = self.not_finite() else { return Ok(()) };
        let file = self.pages.as_ref().map(|pages| format!("\n  --> {}", pages.file.path.display()));
        Err(Error::NonFinite(format!(
            "weight `{name}` holds {value} at position {place}{}\n   = help: the checkpoint is damaged or comes from a run that diverged",
            file.unwrap_or_default()
        )))
    }
}

/// One tensor of a file that is or will be.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// As the file spells it.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Sides.
    pub shape: Vec<usize>,
}

impl Entry {
    /// Length in bytes.
    pub fn size(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Writes a safetensors file, one tensor in memory at a time: `numbers(i)` gives the bytes of `entries[i]`. The file is
/// whole or not there.
///
/// # Errors
/// An I/O error; what `numbers` refuses; an unexpected error when it gives bytes of another length.
pub fn write_tensors<'a>(
    path: &Path,
    entries: &[Entry],
    metadata: &BTreeMap<String, String>,
    numbers: &mut dyn FnMut(usize) -> Result<Cow<'a, [u8]>>,
) -> Result<()> {
    let header = header_of(entries, metadata);
    write_atomically(path, |out| {
        let failed = |error| Error::io("cannot write the weights", path, error);
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        out.write_all(header.as_bytes()).map_err(failed)?;
        for (index, entry) in entries.iter().enumerate() {
            let bytes = numbers(index)?;
            if bytes.len() != entry.size() {
                return Err(Error::Other(anyhow::anyhow!("tensor `{}` has another length", entry.name)));
            }
            out.write_all(&bytes).map_err(failed)?;
        }
        Ok(())
    })
}

/// The JSON header, padded so that the numbers start at a multiple of 8.
fn header_of(entries: &[Entry], metadata: &BTreeMap<String, String>) -> String {
    let mut header = Map::new();
    header.insert("__metadata__".to_string(), json!(metadata));
    let mut start = 0usize;
    for entry in entries {
        let end = start + entry.size();
        header.insert(
            entry.name.clone(),
            json!({"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}),
        );
        start = end;
    }
    let mut text = Value::Object(header).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    text
}

/// Writes a file through a temporary name beside it, flushed to disk, then renamed into place.
///
/// # Errors
/// Whatever `write` returns, and I/O errors of the steps around it.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let failed = |error| Error::io("cannot write the file", path, error);
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".tmp-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let result = (|| {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&temporary).map_err(failed)?);
        write(&mut out)?;
        let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(failed)?;
        std::fs::rename(&temporary, path).map_err(failed)
    })();
    if result.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&temporary);
        return result;
    }
    // The rename itself is durable once the directory is; not every file system lets one open a directory.
    if let Some(dir) = path.parent().and_then(|parent| File::open(parent).ok()) {
        let _ = dir.sync_all();
    }
    result
}

impl TensorFile {
    /// Maps `path` and checks its header: every tensor lies inside the file, none overlaps another, and each one's
    /// length is that of its shape.
    ///
    /// # Errors
    /// A data error when the file is truncated or damaged; an I/O error when it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        files::check_plain(path, "cannot open the weights")?;
        let file = File::open(path).map_err(|error| Error::io("cannot open the weights", path, error))?;
        // SAFETY: a mapping is sound as long as nobody truncates the file meanwhile; checkpoints are written to a
        // temporary name and renamed, so a mapped file is never changed by this program.
        #[expect(unsafe_code, reason = "mapping a file is unsafe in every binding")]
        let map = unsafe { Mmap::map(&file) }
            .map_err(|error| Error::io("cannot map the weights into memory", path, error))?;
        let (length, header) = SafeTensors::read_metadata(&map).map_err(|error| {
            Error::data(format!(
                "not a sound safetensors file: {error}\n  --> {}\n   = help: {}",
                path.display(),
                if map.starts_with(b"version https://git-lfs") {
                    "this is a Git LFS pointer: fetch the file itself with `git lfs pull`"
                } else {
                    "it may be truncated: fetch or copy it again"
                }
            ))
        })?;
        let file = Self { path: path.to_path_buf(), map, header, data_start: 8 + length };
        file.check_shapes()?;
        Ok(file)
    }

    /// Refuses empty tensors whose other sides have no product: they fit the file, but no arithmetic of shapes.
    fn check_shapes(&self) -> Result<()> {
        let is_absurd = |shape: &[usize]| {
            let sides = shape.iter().filter(|&&side| side > 0);
            sides.copied().try_fold(1, usize::checked_mul).is_none_or(|count| count > isize::MAX as usize)
        };
        match self.entries().iter().find(|entry| is_absurd(&entry.shape)) {
            None => Ok(()),
            Some(Entry { name, shape, .. }) => Err(Error::data(format!(
                "not a sound safetensors file: tensor `{name}` has the absurd shape {shape:?}\n  --> {}",
                self.path.display()
            ))),
        }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file holds, in the order in which it lies there.
    pub fn entries(&self) -> Vec<Entry> {
        let entry = |name: String| {
            let info = self.header.info(&name)?;
            Some(Entry { dtype: info.dtype, shape: info.shape.clone(), name })
        };
        self.header.offset_keys().into_iter().filter_map(entry).collect()
    }

    /// Names as written in the file, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.header.offset_keys();
        names.sort_unstable();
        names
    }

    /// Shape of `name`, when the file has it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.header.info(name).map(|info| info.shape.as_slice())
    }

    /// The free-form text pairs of the header.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Element type and shape of `name`.
    ///
    /// # Errors
    /// A data error when the tensor is missing.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.header
            .info(name)
            .ok_or_else(|| Error::data(format!("tensor `{name}` is missing\n  --> {}", self.path.display())))
    }

    fn range(&self, info: &TensorInfo) -> Range<usize> {
        // `read_metadata` has checked that every range lies inside the file.
        let (start, end) = info.data_offsets;
        self.data_start + start..self.data_start + end
    }

    /// The bytes of `name` as they lie in the file, whatever they mean.
    ///
    /// # Errors
    /// A data error when the tensor is missing.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        Ok(&self.map[self.range(self.info(name)?)])
    }

    /// The numbers of `name`: float32 and bfloat16 as they are, float16 widened to float32.
    ///
    /// # Errors
    /// A data error when the tensor is missing or holds other numbers.
    pub fn numbers(&self, name: &str) -> Result<Numbers<'_>> {
        let info = self.info(name)?;
        let range = self.range(info);
        let bytes = &self.map[range.clone()];
        let kind = match info.dtype {
            // Numbers lie where they can be read in place unless the header has an odd length.
            Dtype::F32 => Kind::Single(match bytemuck::try_cast_slice(bytes) {
                Ok(values) if cfg!(target_endian = "little") => Cow::Borrowed(values),
                _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            }),
            Dtype::BF16 => Kind::Half(match bytemuck::try_cast_slice(bytes) {
                Ok(values) if cfg!(target_endian = "little") => Cow::Borrowed(values),
                _ => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect(),
            }),
            Dtype::F16 => Kind::Single(
                bytes
                    .par_chunks_exact(2)
                    .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
                    .collect::<Vec<_>>()
                    .into(),
            ),
            other => {
                return Err(Error::data(format!(
                    "tensor `{name}` holds {other:?} numbers; float32, bfloat16 and float16 are supported\n  --> {}\n   = help: quantised checkpoints cannot be used; take the unquantised one",
                    self.path.display()
                )));
            }
        };
        Ok(Numbers { kind, pages: Some(Pages { file: self, range }) })
    }

    /// The numbers of `name` as float32, row-major, from float32, float16 or bfloat16.
    ///
    /// # Errors
    /// As [`Self::numbers`].
    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.numbers(name)?.into_floats())
    }

    /// The bytes of `name`, which must be of type uint8.
    ///
    /// # Errors
    /// A data error when the tensor is missing or holds other numbers.
    pub fn bytes_u8(&self, name: &str) -> Result<&[u8]> {
        let info = self.info(name)?;
        if info.dtype != Dtype::U8 {
            return Err(Error::data(format!(
                "tensor `{name}` holds {:?} numbers instead of bytes\n  --> {}",
                info.dtype,
                self.path.display()
            )));
        }
        self.bytes(name)
    }

    /// `name` as a float32 tensor on the CPU, in the file's shape.
    ///
    /// # Errors
    /// As [`Self::numbers`].
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let shape = self.info(name)?.shape.clone();
        Ok(self.numbers(name)?.into_tensor(&shape)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_that_is_not_finite_is_found_in_both_types() {
        let sound = [0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, -1e-45, 1.0];
        let half_sound = [bf16::MAX, bf16::MIN, bf16::from_f32(-0.0), bf16::from_bits(0x8001), bf16::ONE];
        assert_eq!(Numbers::from(sound.to_vec()).not_finite(), None);
        assert_eq!(Numbers::from(half_sound.to_vec()).not_finite(), None);
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7f80_0001)] {
            let mut numbers = sound.repeat(50_000);
            numbers[300_000] = bad;
            let (at, value) = Numbers::from(numbers).not_finite().unwrap();
            assert_eq!((at, value.to_bits()), (300_000, bad.to_bits()));
        }
        for bad in [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY, bf16::from_bits(0xff81)] {
            let mut numbers = half_sound.repeat(60_000);
            numbers[290_001] = bad;
            let numbers = Numbers::from(numbers);
            assert_eq!(numbers.not_finite().unwrap().0, 290_001);
            assert!(numbers.has_bad(290_000..290_002) && !numbers.has_bad(0..290_001));
        }
    }
}
