// Global norm on the CPU: squares summed in float64 (no finite float32 overflows there, and a sum that is not finite says
// that a value was not), block by block, so that the result does not depend on the number of threads.

#include "global_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

namespace epg_fast {
namespace {

constexpr int64_t kBlock = 16384;

template <class T>
EPG_ALWAYS_INLINE double sum_of_squares(const T* values, int64_t size) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    const double value = to_float(values[i]);
    sum += value * value;
  }
  return sum;
}

EPG_CPU_CLONES double sum_of_squares_float32(const float* values, int64_t size) { return sum_of_squares(values, size); }
EPG_CPU_CLONES double sum_of_squares_bfloat16(const uint16_t* values, int64_t size) {
  return sum_of_squares(values, size);
}

void global_norm_cpu(Tensor norm, Tensor found_inf, TensorList tensors) {
  check_global_norm(norm, found_inf, tensors);
  const std::vector<int64_t> offsets = offsets_of(tensors);
  const int64_t size = offsets.back();
  std::vector<double> sums((size + kBlock - 1) / kBlock, 0.0);
  torch::stable::parallel_for(0, static_cast<int64_t>(sums.size()), 2, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const auto add = [&](size_t i, int64_t begin, int64_t end) {
        const void* const data = tensors[i].const_data_ptr();
        sums[block] += tensors[i].scalar_type() == ScalarType::Float
                           ? sum_of_squares_float32(static_cast<const float*>(data) + begin, end - begin)
                           : sum_of_squares_bfloat16(static_cast<const uint16_t*>(data) + begin, end - begin);
      };
      for_each_part(offsets, block * kBlock, std::min(size, (block + 1) * kBlock), add);
    }
  });
  double sum = 0.0;
  for (const double part : sums) {
    sum += part;
  }
  const float result = static_cast<float>(std::sqrt(sum));
  *static_cast<float*>(norm.mutable_data_ptr()) = result;
  *static_cast<float*>(found_inf.mutable_data_ptr()) = found_inf_of(result);
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CPU, m) { m.impl("global_norm_out", TORCH_BOX(&epg_fast::global_norm_cpu)); }
