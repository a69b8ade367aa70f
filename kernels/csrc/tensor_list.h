// Lists of tensors treated as one long array: element i of the array lies in the tensor whose range of offsets holds i.
#pragma once

#include "common.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

namespace epg_fast {

using TensorList = std::vector<Tensor>;

// The message names the list and the place in it, as Python counts.
inline void check_list_memory(const char* op, const char* name, size_t i, const Tensor& tensor,
                              const Tensor& device_of) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, "[", i, "] must be contiguous");
  STD_TORCH_CHECK(
      tensor.is_cuda() == device_of.is_cuda() && tensor.get_device_index() == device_of.get_device_index(), op, ": ",
      name, "[", i, "] must be on the same device as the other tensors");
}

inline void check_list_tensor(const char* op, const char* name, size_t i, const Tensor& tensor, const Tensor& device_of,
                              bool bfloat16_too) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || (bfloat16_too && dtype == ScalarType::BFloat16), op, ": ", name, "[", i,
                  "] must be float32", bfloat16_too ? " or bfloat16" : "");
  check_list_memory(op, name, i, tensor, device_of);
}

inline void check_list_shape(const char* op, const char* name, size_t i, const Tensor& tensor, const char* other_name,
                             const Tensor& other) {
  STD_TORCH_CHECK(tensor.dim() == other.dim(), op, ": ", name, "[", i, "] has ", tensor.dim(), " dimensions, ",
                  other_name, " has ", other.dim(), " there");
  for (int64_t d = 0; d < other.dim(); ++d) {
    STD_TORCH_CHECK(tensor.size(d) == other.size(d), op, ": ", name, "[", i, "] has size ", tensor.size(d),
                    " in dimension ", d, ", ", other_name, " has ", other.size(d), " there");
  }
}

// offsets[i]: elements in the tensors before tensor i; the last entry is the total.
inline std::vector<int64_t> offsets_of(const TensorList& tensors) {
  std::vector<int64_t> offsets{0};
  offsets.reserve(tensors.size() + 1);
  for (const Tensor& tensor : tensors) {
    offsets.push_back(offsets.back() + tensor.numel());
  }
  return offsets;
}

// Calls visit(tensor, begin, end) for the parts of tensors that make up elements [begin, end) of the long array.
template <class Visit>
void for_each_part(const std::vector<int64_t>& offsets, int64_t begin, int64_t end, const Visit& visit) {
  size_t tensor = std::upper_bound(offsets.begin(), offsets.end(), begin) - offsets.begin() - 1;
  for (; begin < end; ++tensor) {
    const int64_t stop = std::min(end, offsets[tensor + 1]);
    if (begin < stop) {
      visit(tensor, begin - offsets[tensor], stop - offsets[tensor]);
      begin = stop;
    }
  }
}

// bfloat16 is the upper half of float32.
EPG_HOST_DEVICE float to_float(float value) { return value; }
inline float to_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// Rounds to nearest, ties to even; a NaN becomes the quiet one, as in PyTorch.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

inline uint16_t to_float16(float value) { return torch::headeronly::detail::fp16_ieee_from_fp32_value(value); }

}  // namespace epg_fast
