//! What a cubin says about itself. A cubin is an ELF file; per kernel it has a section `.text.NAME` with the code,
//! `.nv.shared.NAME` with the static shared memory, and in `.nv.info` a list of attributes, of which two matter here:
//! the number of registers and the size of the stack frame. A kernel that spills has a frame.
//!
//! The layout of the attributes is not documented by NVIDIA; it is what NVRTC 11.8 to 13 write, and a test holds it
//! against `ptxas -v` where that is at hand.

use crate::error::Error;

/// ELF's machine number for CUDA.
const EM_CUDA: u16 = 190;
const SYMBOL_TABLE: u32 = 2;
/// Format of an attribute whose value is as long as its third and fourth byte say.
const SIZED: u8 = 4;
const FRAME_SIZE: u8 = 0x11;
const REGISTERS: u8 = 0x2f;

/// What a kernel takes of an SM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The kernel.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory of a block, in bytes; on sm_90 with the KiB that the system keeps.
    pub shared: u32,
    /// Stack frame of a thread in local memory, in bytes: spilled registers, and arrays that are indexed at run time.
    pub stack: u32,
    /// Bytes of code.
    pub code: u32,
}

struct Section<'a> {
    name: &'a str,
    kind: u32,
    size: u64,
    link: usize,
    data: &'a [u8],
}

/// Little-endian numbers and texts at offsets that may lie outside.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn range(&self, at: u64, len: u64) -> Option<&'a [u8]> {
        let end = at.checked_add(len)?;
        self.0.get(usize::try_from(at).ok()?..usize::try_from(end).ok()?)
    }

    fn u16(&self, at: u64) -> Option<u16> {
        Some(u16::from_le_bytes(self.range(at, 2)?.try_into().ok()?))
    }

    fn u32(&self, at: u64) -> Option<u32> {
        Some(u32::from_le_bytes(self.range(at, 4)?.try_into().ok()?))
    }

    fn u64(&self, at: u64) -> Option<u64> {
        Some(u64::from_le_bytes(self.range(at, 8)?.try_into().ok()?))
    }

    fn text(&self, at: u64) -> Option<&'a str> {
        let from = self.0.get(usize::try_from(at).ok()?..)?;
        let end = from.iter().position(|&byte| byte == 0)?;
        std::str::from_utf8(&from[..end]).ok()
    }
}

/// Kernels of a cubin, by name. `what` names the file in errors.
///
/// # Errors
/// [`Error::Cubin`] for anything that is not a whole cubin.
pub fn usage(what: &str, cubin: &[u8]) -> Result<Vec<Usage>, Error> {
    let bad = |problem: &str| Error::Cubin { what: what.to_string(), problem: problem.to_string() };
    let file = Bytes(cubin);
    if file.range(0, 6) != Some(b"\x7fELF\x02\x01") {
        return Err(bad("it does not begin as a 64-bit ELF file"));
    }
    if file.u16(18) != Some(EM_CUDA) {
        return Err(bad("it is for another machine than CUDA"));
    }
    let sections = sections(&file).ok_or_else(|| bad("its sections reach beyond its end"))?;
    let mut kernels: Vec<Usage> = sections
        .iter()
        .filter_map(|section| Some((section.name.strip_prefix(".text.")?, section.size)))
        .map(|(kernel, code)| Usage {
            kernel: kernel.to_string(),
            registers: 0,
            shared: 0,
            stack: 0,
            code: code as u32,
        })
        .collect();
    for section in &sections {
        if let Some(name) = section.name.strip_prefix(".nv.shared.")
            && let Some(kernel) = kernels.iter_mut().find(|kernel| kernel.kernel == name)
        {
            kernel.shared = section.size as u32;
        }
    }
    let info = sections.iter().find(|section| section.name == ".nv.info");
    let attributes =
        info.map_or(Some(Vec::new()), attributes).ok_or_else(|| bad("its attributes are cut off"))?;
    for (attribute, symbol, value) in attributes {
        let name = symbol_name(&sections, symbol).ok_or_else(|| bad("an attribute names no symbol"))?;
        let Some(kernel) = kernels.iter_mut().find(|kernel| kernel.kernel == name) else { continue };
        match attribute {
            REGISTERS => kernel.registers = value,
            _ => kernel.stack = value,
        }
    }
    if let Some(kernel) = kernels.iter().find(|kernel| kernel.registers == 0) {
        return Err(bad(&format!("it does not say how many registers {} has", kernel.kernel)));
    }
    kernels.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    Ok(kernels)
}

fn sections<'a>(file: &Bytes<'a>) -> Option<Vec<Section<'a>>> {
    const NO_BITS: u32 = 8;
    let (table, size, count, names) =
        (file.u64(40)?, u64::from(file.u16(58)?), u64::from(file.u16(60)?), u64::from(file.u16(62)?));
    let header = |i: u64| table.checked_add(i.checked_mul(size)?);
    let names = file.u64(header(names)? + 24)?;
    (0..count)
        .map(|i| {
            let at = header(i)?;
            let (kind, offset, size) = (file.u32(at + 4)?, file.u64(at + 24)?, file.u64(at + 32)?);
            let data = if kind == NO_BITS { &[] } else { file.range(offset, size)? };
            let name = file.text(names.checked_add(u64::from(file.u32(at)?))?)?;
            Some(Section { name, kind, size, link: file.u32(at + 40)? as usize, data })
        })
        .collect()
}

/// The attributes that matter, as (attribute, symbol, value).
fn attributes(info: &Section<'_>) -> Option<Vec<(u8, u32, u32)>> {
    let bytes = Bytes(info.data);
    let (mut at, mut found) = (0, Vec::new());
    while at < info.data.len() as u64 {
        let head = bytes.range(at, 4)?;
        let len = if head[0] == SIZED { u64::from(bytes.u16(at + 2)?) } else { 0 };
        if head[0] == SIZED && len >= 8 && [REGISTERS, FRAME_SIZE].contains(&head[1]) {
            found.push((head[1], bytes.u32(at + 4)?, bytes.u32(at + 8)?));
        }
        at = at.checked_add(4 + len)?;
    }
    Some(found)
}

fn symbol_name<'a>(sections: &[Section<'a>], symbol: u32) -> Option<&'a str> {
    const ENTRY: u64 = 24;
    let table = sections.iter().find(|section| section.kind == SYMBOL_TABLE)?;
    let name = Bytes(table.data).u32(u64::from(symbol) * ENTRY)?;
    Bytes(sections.get(table.link)?.data).text(name.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_cubin_is_refused() {
        for bytes in
            [&b""[..], b"\x7fELF", b"not an ELF file at all, but long enough to hold a header of it........"]
        {
            assert!(matches!(usage("x", bytes), Err(Error::Cubin { .. })));
        }
        // This test itself is an ELF file for another machine.
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let error = usage("x", &own).unwrap_err().to_string();
        assert_eq!(error, "x: not a cubin: it is for another machine than CUDA");
    }
}
