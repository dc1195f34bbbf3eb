//! The table of kernels: what a launch has to know about each, and what the compiler may use for it.
//!
//! A row is written by hand, and held against the truth twice: the stand-in compares a launch with the parameters of the
//! kernel it calls, and `tests/cubins.rs` compares the row with the cubins that NVRTC makes for sm_87 and sm_90.

/// An entry of a .cu file.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Name of the entry.
    pub name: &'static str,
    /// Its file below `kernels/`.
    pub file: &'static str,
    /// Threads of a block, always this many.
    pub threads: u32,
    /// Most shared memory that a launch asks for, beside the static.
    pub dynamic_shared: u32,
    /// Registers a thread may use, on sm_87 and on sm_90. Spills are never allowed.
    pub registers: u32,
    /// Blocks that are meant to fit on an SM of sm_87 at a time; what follows from registers and shared memory must
    /// not be less.
    pub blocks: u32,
}

/// Registers of an SM, in every architecture from sm_80 on (CUDA C++ Programming Guide, "Compute Capabilities").
const REGISTERS: u32 = 65_536;
/// Shared memory of an SM of sm_87, 1 KiB a block of which the system keeps.
const SHARED_SM87: u32 = 164 * 1024;
/// Threads of an SM of sm_87.
const THREADS_SM87: u32 = 1536;
/// Blocks of an SM of sm_87.
const BLOCKS_SM87: u32 = 16;
/// A warp's registers are given out in pieces of this size.
const REGISTER_UNIT: u32 = 256;

impl Kernel {
    /// Blocks of this kernel that fit on an SM of sm_87, with that many registers a thread and that much static shared
    /// memory.
    pub fn occupancy_sm87(&self, registers: u32, static_shared: u32) -> u32 {
        let warps = self.threads.div_ceil(32);
        let a_warp = (registers.max(1) * 32).next_multiple_of(REGISTER_UNIT);
        let by_registers = REGISTERS / (a_warp * warps);
        let by_shared = SHARED_SM87 / (static_shared + self.dynamic_shared + 1024).next_multiple_of(128);
        by_registers.min(by_shared).min(THREADS_SM87 / self.threads).min(BLOCKS_SM87)
    }
}

macro_rules! kernels {
    ($($file:literal { $($name:ident $threads:literal threads, $shared:literal shared, $registers:literal registers, $blocks:literal blocks;)* })*) => {
        $($(
            #[doc = concat!("`", stringify!($name), "` of `", $file, "`.")]
            #[allow(non_upper_case_globals)]
            pub static $name: Kernel = Kernel {
                name: stringify!($name),
                file: $file,
                threads: $threads,
                dynamic_shared: $shared,
                registers: $registers,
                blocks: $blocks,
            };
        )*)*

        /// All kernels.
        pub static ALL: &[&Kernel] = &[$($(&$name),*),*];
    };
}

kernels! {
    "adamw.cu" {
        square_sum 256 threads, 0 shared, 40 registers, 6 blocks;
        adamw 256 threads, 0 shared, 40 registers, 6 blocks;
    }
    "adapter_gradient.cu" {
        adapter_gradient 256 threads, 0 shared, 80 registers, 3 blocks;
        adapter_gradient_sum 256 threads, 0 shared, 40 registers, 6 blocks;
    }
    // Two blocks of heads of 128 fill the shared memory of an SM: with 128 threads each, up to 255 registers cost no
    // block. The gradient of the queries takes them for the fragments of q and of dout beside its sums.
    "attention.cu" {
        attention_64 128 threads, 32768 shared, 128 registers, 4 blocks;
        attention_128 128 threads, 65536 shared, 168 registers, 2 blocks;
        attention_padded 128 threads, 65536 shared, 232 registers, 2 blocks;
    }
    "attention_any.cu" {
        attention_any_8 128 threads, 17408 shared, 128 registers, 4 blocks;
        attention_any_1 128 threads, 17408 shared, 128 registers, 4 blocks;
        attention_any_dq_8 128 threads, 17408 shared, 128 registers, 4 blocks;
        attention_any_dq_1 128 threads, 17408 shared, 128 registers, 4 blocks;
        attention_any_dkv_8 128 threads, 17408 shared, 128 registers, 4 blocks;
        attention_any_dkv_1 128 threads, 17408 shared, 128 registers, 4 blocks;
        attention_delta_4 128 threads, 0 shared, 40 registers, 12 blocks;
        attention_delta_1 128 threads, 0 shared, 40 registers, 12 blocks;
    }
    "attention_backward.cu" {
        attention_dkv_64 256 threads, 66560 shared, 128 registers, 2 blocks;
        attention_dkv_128 256 threads, 74240 shared, 128 registers, 2 blocks;
        attention_dkv_padded 256 threads, 74240 shared, 168 registers, 1 blocks;
        attention_dq_64 128 threads, 32768 shared, 168 registers, 3 blocks;
        attention_dq_128 128 threads, 65536 shared, 232 registers, 2 blocks;
        attention_dq_padded 128 threads, 65536 shared, 232 registers, 2 blocks;
    }
    "cached_attention.cu" {
        cached_attention_8 128 threads, 0 shared, 96 registers, 5 blocks;
        cached_attention_1 128 threads, 0 shared, 64 registers, 8 blocks;
        cached_attention_combine 128 threads, 0 shared, 40 registers, 12 blocks;
    }
    "cross_entropy.cu" {
        cross_entropy_loss 512 threads, 0 shared, 40 registers, 3 blocks;
        cross_entropy_gradient 512 threads, 0 shared, 40 registers, 3 blocks;
    }
    "dropout.cu" {
        dropout_4 256 threads, 0 shared, 40 registers, 6 blocks;
        dropout_1 256 threads, 0 shared, 40 registers, 6 blocks;
    }
    "elementwise.cu" {
        add_bf16 256 threads, 0 shared, 40 registers, 6 blocks;
        scale_f32 256 threads, 0 shared, 40 registers, 6 blocks;
        cast_to_bf16 256 threads, 0 shared, 40 registers, 6 blocks;
        cast_to_f32 256 threads, 0 shared, 40 registers, 6 blocks;
    }
    "gemm.cu" {
        gemm_nt_128x128 256 threads, 65536 shared, 128 registers, 2 blocks;
        gemm_nt_64x64 128 threads, 32768 shared, 104 registers, 4 blocks;
        gemm_nt_32x64 128 threads, 24576 shared, 80 registers, 6 blocks;
        gemm_nt_f32_128x128 256 threads, 65536 shared, 128 registers, 2 blocks;
        gemm_nt_f32_32x64 128 threads, 24576 shared, 80 registers, 6 blocks;
        gemm_nn_128x128 256 threads, 65536 shared, 128 registers, 2 blocks;
        gemm_nn_64x64 128 threads, 32768 shared, 104 registers, 4 blocks;
        gemm_nn_32x64 128 threads, 24576 shared, 80 registers, 6 blocks;
        gemm_nt_lora_128x128 256 threads, 69632 shared, 128 registers, 2 blocks;
        gemm_nt_lora_64x64 128 threads, 36864 shared, 120 registers, 4 blocks;
        gemm_nt_lora_32x64 128 threads, 28672 shared, 88 registers, 5 blocks;
        gemm_nn_lora_128x128 256 threads, 69632 shared, 128 registers, 2 blocks;
        gemm_nn_lora_64x64 128 threads, 36864 shared, 120 registers, 3 blocks;
        gemm_nn_lora_32x64 128 threads, 28672 shared, 88 registers, 5 blocks;
        gemm_nt_64x16 128 threads, 40960 shared, 64 registers, 4 blocks;
        gemm_nn_64x16 128 threads, 40960 shared, 64 registers, 4 blocks;
        gemm_nt_general 128 threads, 0 shared, 128 registers, 4 blocks;
        gemm_nt_f32_general 128 threads, 0 shared, 128 registers, 4 blocks;
        gemm_nn_general 128 threads, 0 shared, 128 registers, 4 blocks;
        gemm_nn_narrow_general 128 threads, 0 shared, 128 registers, 4 blocks;
    }
    "gemm_nf4.cu" {
        gemm_nf4_nt_128x128 256 threads, 57344 shared, 128 registers, 2 blocks;
        gemm_nf4_nt_64x64 128 threads, 28672 shared, 104 registers, 4 blocks;
        gemm_nf4_nt_32x64 128 threads, 20480 shared, 80 registers, 6 blocks;
        gemm_nf4_nn_128x128 256 threads, 57344 shared, 128 registers, 2 blocks;
        gemm_nf4_nn_64x64 128 threads, 28672 shared, 104 registers, 4 blocks;
        gemm_nf4_nn_32x64 128 threads, 20480 shared, 80 registers, 6 blocks;
        gemm_nf4_nt_lora_128x128 256 threads, 61440 shared, 128 registers, 2 blocks;
        gemm_nf4_nt_lora_64x64 128 threads, 32768 shared, 120 registers, 4 blocks;
        gemm_nf4_nt_lora_32x64 128 threads, 24576 shared, 88 registers, 5 blocks;
        gemm_nf4_nn_lora_128x128 256 threads, 61440 shared, 128 registers, 2 blocks;
        gemm_nf4_nn_lora_64x64 128 threads, 32768 shared, 120 registers, 4 blocks;
        gemm_nf4_nn_lora_32x64 128 threads, 24576 shared, 88 registers, 5 blocks;
    }
    "gemm_pack.cu" {
        gemm_pack 256 threads, 0 shared, 40 registers, 6 blocks;
        gemm_unpack 256 threads, 0 shared, 40 registers, 6 blocks;
    }
    "nf4.cu" {
        nf4_dequantize 256 threads, 0 shared, 40 registers, 6 blocks;
        nf4_quantize_f32 256 threads, 0 shared, 40 registers, 6 blocks;
        nf4_quantize_bf16 256 threads, 0 shared, 40 registers, 6 blocks;
        absmax_mean 32 threads, 0 shared, 64 registers, 16 blocks;
        absmax_nest 256 threads, 0 shared, 40 registers, 6 blocks;
    }
    "probe.cu" {
        probe_mma 256 threads, 0 shared, 64 registers, 4 blocks;
        probe_copy 256 threads, 0 shared, 40 registers, 6 blocks;
    }
    "rms_norm.cu" {
        rms_norm_8 256 threads, 0 shared, 64 registers, 4 blocks;
        rms_norm_1 256 threads, 0 shared, 64 registers, 4 blocks;
        rms_norm_residual_8 256 threads, 0 shared, 64 registers, 4 blocks;
        rms_norm_residual_1 256 threads, 0 shared, 64 registers, 4 blocks;
        rms_norm_backward_8 256 threads, 0 shared, 80 registers, 3 blocks;
        rms_norm_backward_1 256 threads, 0 shared, 64 registers, 4 blocks;
        rms_norm_backward_add_8 256 threads, 0 shared, 80 registers, 3 blocks;
        rms_norm_backward_add_1 256 threads, 0 shared, 64 registers, 4 blocks;
    }
    "rope.cu" {
        rope_8 256 threads, 0 shared, 40 registers, 6 blocks;
        rope_1 256 threads, 0 shared, 40 registers, 6 blocks;
    }
    "rows.cu" {
        gather_rows_8 256 threads, 0 shared, 40 registers, 6 blocks;
        gather_rows_1 256 threads, 0 shared, 40 registers, 6 blocks;
        scatter_rows_8 256 threads, 0 shared, 40 registers, 6 blocks;
        scatter_rows_1 256 threads, 0 shared, 40 registers, 6 blocks;
    }
    "small.cu" {
        small_nf4 128 threads, 0 shared, 128 registers, 4 blocks;
        small_dense 128 threads, 0 shared, 80 registers, 6 blocks;
        small_elements_nf4 128 threads, 0 shared, 48 registers, 10 blocks;
        small_elements_dense 128 threads, 0 shared, 40 registers, 12 blocks;
    }
    "swiglu.cu" {
        swiglu 256 threads, 0 shared, 40 registers, 6 blocks;
        swiglu_backward 256 threads, 0 shared, 40 registers, 6 blocks;
    }
}

/// The kernel of that name.
pub fn find(name: &str) -> Option<&'static Kernel> {
    ALL.iter().find(|kernel| kernel.name == name).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source;

    #[test]
    fn every_kernel_has_a_file_and_every_file_a_kernel() {
        for kernel in ALL {
            assert!(source::file(kernel.file).is_some(), "{}: no file {}", kernel.name, kernel.file);
            assert!(kernel.threads.is_multiple_of(32) && kernel.threads <= 1024, "{}", kernel.name);
        }
        for file in source::FILES {
            assert!(ALL.iter().any(|kernel| kernel.file == file.name), "{}: no kernel", file.name);
        }
    }

    /// 256 threads of 128 registers with 81 KiB: two blocks fill an SM of an Orin exactly.
    #[test]
    fn occupancy_is_that_of_the_programming_guide() {
        let gemm =
            Kernel { name: "", file: "", threads: 256, dynamic_shared: 81 * 1024, registers: 128, blocks: 2 };
        assert_eq!(gemm.occupancy_sm87(128, 0), 2);
        assert_eq!(gemm.occupancy_sm87(129, 0), 1);
        assert_eq!(gemm.occupancy_sm87(128, 1024), 1);
        let small = Kernel { dynamic_shared: 0, ..gemm };
        assert_eq!(small.occupancy_sm87(32, 0), 6);
        assert_eq!(small.occupancy_sm87(64, 0), 4);
    }
}
