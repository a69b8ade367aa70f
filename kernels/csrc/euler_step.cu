// Euler step on CUDA: memory-bound, so 16-byte accesses where the pointers allow them and a scalar tail.

#include "euler_step.h"

#include "common.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace epg_fast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

// The intrinsics forbid a fused multiply-add: the reference rounds after each operation.
__device__ __forceinline__ float euler(float x, float denoised, const EulerStep& step) {
  const float d = __fdiv_rn(x - clamp(denoised, step), step.sigma);
  return __fadd_rn(x, __fmul_rn(d, step.dt));
}

// No __restrict__: `out` may be `x`.
__global__ void __launch_bounds__(kThreads)
    euler_step_kernel(float* out, const float* x, const float* denoised, const EulerStep step, int64_t vectors,
                      int64_t size) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t i = first; i < vectors; i += stride) {
    const float4 a = reinterpret_cast<const float4*>(x)[i];
    const float4 b = reinterpret_cast<const float4*>(denoised)[i];
    reinterpret_cast<float4*>(out)[i] =
        make_float4(euler(a.x, b.x, step), euler(a.y, b.y, step), euler(a.z, b.z, step), euler(a.w, b.w, step));
  }
  for (int64_t i = 4 * vectors + first; i < size; i += stride) {
    out[i] = euler(x[i], denoised[i], step);
  }
}

void euler_step_cuda(Tensor out, Tensor x, Tensor denoised, double sigma, double sigma_next, std::optional<double> lo,
                     std::optional<double> hi) {
  check_euler_step(out, x, denoised, sigma);
  const int64_t size = x.numel();
  if (size == 0) {
    return;
  }
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream("euler_step", device);

  float* const out_data = static_cast<float*>(out.mutable_data_ptr());
  const float* const x_data = static_cast<const float*>(x.const_data_ptr());
  const float* const denoised_data = static_cast<const float*>(denoised.const_data_ptr());
  const bool vectorised = aligned(out_data, 16) && aligned(x_data, 16) && aligned(denoised_data, 16);
  const int64_t vectors = vectorised ? size / 4 : 0;
  const int64_t items = vectorised ? (size + 3) / 4 : size;
  const int64_t blocks = std::min(kMaxBlocks, (items + kThreads - 1) / kThreads);
  euler_step_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      out_data, x_data, denoised_data, make_euler_step(sigma, sigma_next, lo, hi), vectors, size);
  check_launch("euler_step");
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) { m.impl("euler_step_out", TORCH_BOX(&epg_fast::euler_step_cuda)); }
