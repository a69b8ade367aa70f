// Lists of tensors treated as one long array: element i of the array lies in the tensor whose range of offsets holds i.
#pragma once

#include "common.h"

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

namespace epg_fast {

using TensorList = std::vector<Tensor>;

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
