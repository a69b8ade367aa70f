// What every operation of the extension uses on the host: checks of arguments with messages that name them, and loops
// compiled for the processor they run on.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <ostream>

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

inline bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// An argument, or a place in a list of tensors, counted as in Python.
struct Name {
  Name(const char* name) : name(name) {}
  Name(const char* list, size_t place) : name(list), place(static_cast<int64_t>(place)) {}

  const char* name;
  int64_t place = -1;
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.name;
  return name.place < 0 ? out : out << "[" << name.place << "]";
}

inline void check_contiguous(const char* op, const Name& name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_same_device(const char* op, const Name& name, const Tensor& tensor, const char* other_name,
                              const Tensor& other) {
  STD_TORCH_CHECK(tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(), op,
                  ": ", name, " must be on the same device as ", other_name);
}

// float32, or bfloat16 if that will do, contiguous and on the device of another tensor.
inline void check_tensor(const char* op, const Name& name, const Tensor& tensor, const char* other_name,
                         const Tensor& other, bool bfloat16_too = false) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || (bfloat16_too && dtype == ScalarType::BFloat16), op, ": ", name,
                  " must be float32", bfloat16_too ? " or bfloat16" : "");
  check_contiguous(op, name, tensor);
  check_same_device(op, name, tensor, other_name, other);
}

inline void check_same_shape(const char* op, const Name& name, const Tensor& tensor, const char* other_name,
                             const Tensor& other) {
  STD_TORCH_CHECK(tensor.dim() == other.dim(), op, ": ", name, " has ", tensor.dim(), " dimensions, ", other_name,
                  " has ", other.dim(), " there");
  for (int64_t i = 0; i < other.dim(); ++i) {
    STD_TORCH_CHECK(tensor.size(i) == other.size(i), op, ": ", name, " has size ", tensor.size(i), " in dimension ", i,
                    ", ", other_name, " has ", other.size(i), " there");
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
