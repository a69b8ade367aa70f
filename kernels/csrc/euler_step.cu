// Euler step on CUDA: memory-bound, so 16-byte accesses where the pointers allow them and a scalar tail.

#include "euler_step.h"

#include "common.cuh"

#include <torch/csrc/stable/library.h>

namespace epg_fast {
namespace {

// No __restrict__: `out` may be `x` or `denoised`.
__global__ void __launch_bounds__(ElementwiseGrid::kThreads)
    euler_step_kernel(float* out, const float* x, const float* denoised, const EulerStep step, int64_t vectors,
                      int64_t size) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < vectors; i += stride) {
    const float4 a = reinterpret_cast<const float4*>(x)[i];
    const float4 b = reinterpret_cast<const float4*>(denoised)[i];
    reinterpret_cast<float4*>(out)[i] = make_float4(euler_step(a.x, b.x, step), euler_step(a.y, b.y, step),
                                                    euler_step(a.z, b.z, step), euler_step(a.w, b.w, step));
  }
  for (int64_t i = 4 * vectors + first; i < size; i += stride) {
    out[i] = euler_step(x[i], denoised[i], step);
  }
}

void euler_step_out_cuda(Tensor out, Tensor x, Tensor denoised, double sigma, double sigma_next,
                         std::optional<double> lo, std::optional<double> hi) {
  check_euler_step(out, x, denoised, sigma);
  const int64_t size = x.numel();
  if (size == 0) {
    return;
  }

  float* const out_data = static_cast<float*>(out.mutable_data_ptr());
  const float* const x_data = static_cast<const float*>(x.const_data_ptr());
  const float* const denoised_data = static_cast<const float*>(denoised.const_data_ptr());
  const ElementwiseGrid grid(size, {out_data, x_data, denoised_data});
  const Launcher launch("euler_step", x.get_device_index());
  launch(grid.blocks, grid.kThreads, euler_step_kernel, out_data, x_data, denoised_data,
         make_euler_step(sigma, sigma_next, lo, hi), grid.vectors, size);
}

void euler_step_cuda(Tensor x, Tensor denoised, double sigma, double sigma_next, std::optional<double> lo,
                     std::optional<double> hi) {
  euler_step_out_cuda(x, x, denoised, sigma, sigma_next, lo, hi);
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) {
  m.impl("euler_step_out", TORCH_BOX(&epg_fast::euler_step_out_cuda));
  m.impl("euler_step_", TORCH_BOX(&epg_fast::euler_step_cuda));
}
