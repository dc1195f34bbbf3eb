//! NVRTC, the compiler as a library: CUDA C++ in, a cubin for one architecture out. It needs no GPU, so an x86 machine
//! makes the cubins of a Jetson.
//!
//! It is loaded from where the caller says, else from `FINETUNED_NVRTC` (a file), else by name from where the dynamic
//! loader looks, else from the usual places of a CUDA toolkit. The nine functions are bound here and not taken from
//! cudarc, whose loader takes the first libnvrtc.so it finds and cannot be told which.

use crate::error::Error;
use crate::source::{HEADERS, OPTIONS, Source};
use libloading::Library;
use std::ffi::{CStr, CString, OsString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// Names the dynamic loader is asked for: JetPack 6, JetPack 7, and what a development package adds.
const NAMES: [&str; 4] = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so", "libnvrtc.so.11.2"];

/// Where toolkits lie that the dynamic loader does not know.
const DIRECTORIES: [&str; 3] = [
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/aarch64-linux/lib",
    "/usr/local/cuda/targets/x86_64-linux/lib",
];

/// The environment variable that names the library.
pub const VARIABLE: &str = "FINETUNED_NVRTC";

type Program = *mut c_void;
type Code = c_int;

/// NVRTC's `NVRTC_SUCCESS`.
const SUCCESS: Code = 0;

struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Code,
    error: unsafe extern "C" fn(Code) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Code,
    destroy: unsafe extern "C" fn(*mut Program) -> Code,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Code,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Code,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Code,
}

/// The compiler.
pub struct Compiler {
    functions: Functions,
    version: (u32, u32),
    path: PathBuf,
    _library: Library,
}

impl Compiler {
    /// Loads the compiler; `path` comes before everything else.
    ///
    /// # Errors
    /// [`Error::NoCompiler`] when there is none.
    pub fn load(path: Option<&Path>) -> Result<Compiler, Error> {
        let asked = path.map(|path| path.as_os_str().to_owned()).or_else(|| std::env::var_os(VARIABLE));
        let candidates: Vec<OsString> = match asked {
            Some(path) => vec![path], // what was asked for, or nothing
            None => {
                let in_directories = DIRECTORIES
                    .iter()
                    .flat_map(|directory| NAMES.map(|name| format!("{directory}/{name}").into()));
                NAMES.iter().map(|&name| name.into()).chain(in_directories).collect()
            }
        };
        let mut cause = String::new();
        for candidate in &candidates {
            // SAFETY: NVRTC's initialisers have no conditions.
            match unsafe { Library::new(candidate) } {
                Ok(library) => return Self::bind(library, candidate.into()),
                // The first failure is that of the file which was asked for, or of the likeliest name.
                Err(error) if cause.is_empty() => cause = words(&error),
                Err(_) => {}
            }
        }
        let tried =
            candidates.iter().take(NAMES.len()).map(|name| name.to_string_lossy().into_owned()).collect();
        Err(Error::NoCompiler { tried, cause })
    }

    fn bind(library: Library, path: PathBuf) -> Result<Compiler, Error> {
        let name = path.display().to_string();
        let missing = |error: libloading::Error| Error::NoCompiler {
            tried: vec![name.clone()],
            cause: error.to_string(),
        };
        macro_rules! symbol {
            // SAFETY: the types are those of nvrtc.h, the same in all versions from 11.1 on.
            ($name:literal) => {
                *unsafe { library.get($name) }.map_err(missing)?
            };
        }
        let functions = Functions {
            version: symbol!("nvrtcVersion"),
            error: symbol!("nvrtcGetErrorString"),
            create: symbol!("nvrtcCreateProgram"),
            destroy: symbol!("nvrtcDestroyProgram"),
            compile: symbol!("nvrtcCompileProgram"),
            log_size: symbol!("nvrtcGetProgramLogSize"),
            log: symbol!("nvrtcGetProgramLog"),
            cubin_size: symbol!("nvrtcGetCUBINSize"),
            cubin: symbol!("nvrtcGetCUBIN"),
        };
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two integers to write to.
        let code = unsafe { (functions.version)(&mut major, &mut minor) };
        if code != SUCCESS {
            return Err(Error::NoCompiler {
                tried: vec![name],
                cause: format!("nvrtcVersion failed with {code}"),
            });
        }
        Ok(Compiler { functions, version: (major as u32, minor as u32), path, _library: library })
    }

    /// Its version, such as `(12, 6)`.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// The file or the name that it was loaded by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Compiles a file of kernels for an architecture.
    ///
    /// # Errors
    /// [`Error::Compile`] with the compiler's log.
    pub fn compile(&self, source: &'static Source, sm: u32) -> Result<Vec<u8>, Error> {
        let failed = |code: Code, log: String| {
            // SAFETY: a static text for every code, known or not.
            let name = unsafe { CStr::from_ptr((self.functions.error)(code)) };
            Error::Compile { file: source.name, sm, name: name.to_string_lossy().into_owned(), log }
        };
        let program =
            OpenProgram::new(&self.functions, source).map_err(|code| failed(code, String::new()))?;
        let arch = format!("--gpu-architecture=sm_{sm}");
        let options: Vec<CString> = OPTIONS.iter().copied().chain([arch.as_str()]).map(text).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: an open program and texts that outlive the call.
        let code =
            unsafe { (self.functions.compile)(program.handle, pointers.len() as c_int, pointers.as_ptr()) };
        if code != SUCCESS {
            return Err(failed(code, program.log()));
        }
        program.cubin().map_err(|code| failed(code, String::new()))
    }
}

/// What the dynamic loader said, which libloading keeps as the source of its error.
fn words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), |source| source.to_string())
}

/// A text with its terminating zero. Ours have no zero inside (a test looks).
fn text(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

/// A program that is destroyed when dropped.
struct OpenProgram<'a> {
    functions: &'a Functions,
    handle: Program,
}

impl<'a> OpenProgram<'a> {
    fn new(functions: &'a Functions, source: &Source) -> Result<Self, Code> {
        let (body, name) = (text(source.text), text(source.name));
        let bodies: Vec<CString> = HEADERS.iter().map(|header| text(header.text)).collect();
        let names: Vec<CString> = HEADERS.iter().map(|header| text(header.name)).collect();
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (bodies, names) = (pointers(&bodies), pointers(&names));
        let mut handle = std::ptr::null_mut();
        // SAFETY: all texts outlive the call, which copies them; both lists have that many entries.
        let code = unsafe {
            (functions.create)(
                &mut handle,
                body.as_ptr(),
                name.as_ptr(),
                bodies.len() as c_int,
                bodies.as_ptr(),
                names.as_ptr(),
            )
        };
        if code == SUCCESS { Ok(Self { functions, handle }) } else { Err(code) }
    }

    fn log(&self) -> String {
        let bytes = self.bytes(self.functions.log_size, self.functions.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).trim_end_matches(['\0', '\n']).to_string()
    }

    fn cubin(&self) -> Result<Vec<u8>, Code> {
        self.bytes(self.functions.cubin_size, self.functions.cubin)
    }

    fn bytes(
        &self,
        size: unsafe extern "C" fn(Program, *mut usize) -> Code,
        read: unsafe extern "C" fn(Program, *mut c_char) -> Code,
    ) -> Result<Vec<u8>, Code> {
        let mut len = 0;
        // SAFETY: an open program and a number to write to.
        let code = unsafe { size(self.handle, &mut len) };
        if code != SUCCESS {
            return Err(code);
        }
        let mut bytes = vec![0u8; len];
        // SAFETY: room for as many bytes as were announced.
        let code = unsafe { read(self.handle, bytes.as_mut_ptr().cast()) };
        if code == SUCCESS { Ok(bytes) } else { Err(code) }
    }
}

impl Drop for OpenProgram<'_> {
    fn drop(&mut self) {
        // SAFETY: created, and destroyed once.
        unsafe { (self.functions.destroy)(&mut self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::FILES;

    #[test]
    fn a_compiler_that_is_not_there_is_named() {
        let error = Compiler::load(Some(Path::new("/nowhere/libnvrtc.so"))).err().unwrap().to_string();
        assert!(error.starts_with("NVRTC was not found (tried /nowhere/libnvrtc.so): "), "{error}");
    }

    #[test]
    fn no_text_has_a_zero_inside() {
        for source in HEADERS.iter().chain(FILES) {
            assert!(!source.text.contains('\0'), "{}", source.name);
        }
    }
}
