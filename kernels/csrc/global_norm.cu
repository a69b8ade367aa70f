// Global norm on CUDA: each block sums the squares of its chunks, one more block sums the blocks' sums. No atomics, so
// that the result is the same every time; float64 sums, as on the CPU.

#include "global_norm.h"

#include "tensor_list.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>

namespace epg_fast {
namespace {

__device__ __forceinline__ double square(double value) { return value * value; }

template <class T>
__device__ double sum_of_squares(const T* values, int64_t size) {
  double sum = 0.0;
  const bool vectorised = reinterpret_cast<uintptr_t>(values) % (4 * sizeof(T)) == 0;
  const int64_t vectors = vectorised ? size / 4 : 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    float four[4];
    load4(values + 4 * i, four);
    sum += square(four[0]) + square(four[1]) + square(four[2]) + square(four[3]);
  }
  for (int64_t i = 4 * vectors + threadIdx.x; i < size; i += kThreads) {
    sum += square(static_cast<float>(values[i]));
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    global_norm_kernel(const __grid_constant__ TensorTable<1> table, double* sums) {
  double sum = 0.0;
  for (int32_t chunk = blockIdx.x; chunk < table.chunks(); chunk += gridDim.x) {
    const int row = row_of(table, chunk);
    const int64_t begin = (chunk - table.chunks_before[row]) * kChunk;
    const int64_t size = min(kChunk, table.sizes[row] - begin);
    const void* const values = table.pointers[0][row];
    sum += table.bfloat16[row] ? sum_of_squares(static_cast<const __nv_bfloat16*>(values) + begin, size)
                               : sum_of_squares(static_cast<const float*>(values) + begin, size);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    global_norm_final_kernel(const double* sums, int64_t count, float* norm, float* found_inf) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += sums[i];
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    const float result = static_cast<float>(sqrt(sum));
    *norm = result;
    *found_inf = found_inf_of(result);
  }
}

void global_norm_cuda(Tensor norm, Tensor found_inf, TensorList tensors) {
  check_global_norm(norm, found_inf, tensors);
  const int32_t device = norm.get_device_index();
  const Launcher launch("global_norm", device);
  const int64_t tables = static_cast<int64_t>(tensors.size()) / TensorTable<1>::kCapacity + 1;
  const int64_t blocks = grid_for(std::numeric_limits<int32_t>::max(), device);
  const Tensor sums = torch::stable::new_empty(norm, {tables * blocks}, ScalarType::Double);
  double* const sums_data = static_cast<double*>(sums.mutable_data_ptr());
  int64_t count = 0;
  const auto describe = [&](size_t i, void* (&pointers)[1]) {
    pointers[0] = const_cast<void*>(tensors[i].const_data_ptr());
    return tensors[i].scalar_type() == ScalarType::BFloat16;
  };
  for_each_table<1>(tensors, describe, [&](const TensorTable<1>& table) {
    const int grid = grid_for(table.chunks(), device);
    launch(grid, kThreads, global_norm_kernel, table, sums_data + count);
    count += grid;
  });
  launch(1, kThreads, global_norm_final_kernel, sums_data, count, static_cast<float*>(norm.mutable_data_ptr()),
         static_cast<float*>(found_inf.mutable_data_ptr()));
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) { m.impl("global_norm_out", TORCH_BOX(&epg_fast::global_norm_cuda)); }
