// What every operation of the extension uses on the host: checks of arguments with messages that name them, and loops
// compiled for the processor they run on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#if defined(__CUDACC__)
#define EPG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EPG_HOST_DEVICE inline
#endif

// The function exists once per instruction set and the loader takes the widest that the processor has; its loops must be
// inlined into it. Not under a sanitizer, whose run-time is not ready when the loader chooses.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define EPG_CPU_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EPG_CPU_CLONES
#endif
#define EPG_ALWAYS_INLINE inline __attribute__((always_inline))

namespace epg_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_float32(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32");
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                              const Tensor& other) {
  STD_TORCH_CHECK(tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(), op,
                  ": ", name, " must be on the same device as ", other_name);
}

inline void check_same_shape(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                             const Tensor& other) {
  STD_TORCH_CHECK(tensor.dim() == other.dim(), op, ": ", name, " has ", tensor.dim(), " dimensions, ", other_name,
                  " has ", other.dim());
  for (int64_t i = 0; i < other.dim(); ++i) {
    STD_TORCH_CHECK(tensor.size(i) == other.size(i), op, ": ", name, " has size ", tensor.size(i), " in dimension ", i,
                    ", ", other_name, " has ", other.size(i));
  }
}

// Element-wise operations may write over one of their inputs, element for element, but not over a shifted part of it.
inline void check_no_partial_overlap(const char* op, const char* name, const Tensor& written, const char* other_name,
                                     const Tensor& other, int64_t itemsize) {
  const uintptr_t a = reinterpret_cast<uintptr_t>(written.const_data_ptr());
  const uintptr_t b = reinterpret_cast<uintptr_t>(other.const_data_ptr());
  const bool apart = a + written.numel() * itemsize <= b || b + other.numel() * itemsize <= a;
  STD_TORCH_CHECK(apart || a == b, op, ": ", name, " is written and must not overlap part of ", other_name);
}

}  // namespace epg_fast
