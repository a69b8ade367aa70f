// Heun's second half on CUDA: memory-bound, so 16-byte accesses where the pointers allow them and a scalar tail.

#include "heun_step.h"

#include "common.cuh"

#include <torch/csrc/stable/library.h>

namespace epg_fast {
namespace {

// No __restrict__: `out` may be any of the inputs.
__global__ void __launch_bounds__(ElementwiseGrid::kThreads)
    heun_step_kernel(float* out, const float* x, const float* denoised, const float* denoised_next, const HeunStep step,
                     int64_t vectors, int64_t size) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < vectors; i += stride) {
    const float4 a = reinterpret_cast<const float4*>(x)[i];
    const float4 b = reinterpret_cast<const float4*>(denoised)[i];
    const float4 c = reinterpret_cast<const float4*>(denoised_next)[i];
    reinterpret_cast<float4*>(out)[i] = make_float4(heun_step(a.x, b.x, c.x, step), heun_step(a.y, b.y, c.y, step),
                                                    heun_step(a.z, b.z, c.z, step), heun_step(a.w, b.w, c.w, step));
  }
  for (int64_t i = 4 * vectors + first; i < size; i += stride) {
    out[i] = heun_step(x[i], denoised[i], denoised_next[i], step);
  }
}

void heun_step_out_cuda(Tensor out, Tensor x, Tensor denoised, Tensor denoised_next, double sigma, double sigma_next,
                        std::optional<double> lo, std::optional<double> hi) {
  check_heun_step(out, x, denoised, denoised_next, sigma, sigma_next);
  const int64_t size = x.numel();
  if (size == 0) {
    return;
  }

  float* const out_data = static_cast<float*>(out.mutable_data_ptr());
  const float* const x_data = static_cast<const float*>(x.const_data_ptr());
  const float* const denoised_data = static_cast<const float*>(denoised.const_data_ptr());
  const float* const denoised_next_data = static_cast<const float*>(denoised_next.const_data_ptr());
  const ElementwiseGrid grid(size, {out_data, x_data, denoised_data, denoised_next_data});
  const Launcher launch("heun_step", x.get_device_index());
  launch(grid.blocks, grid.kThreads, heun_step_kernel, out_data, x_data, denoised_data, denoised_next_data,
         make_heun_step(sigma, sigma_next, lo, hi), grid.vectors, size);
}

void heun_step_cuda(Tensor x, Tensor denoised, Tensor denoised_next, double sigma, double sigma_next,
                    std::optional<double> lo, std::optional<double> hi) {
  heun_step_out_cuda(x, x, denoised, denoised_next, sigma, sigma_next, lo, hi);
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) {
  m.impl("heun_step_out", TORCH_BOX(&epg_fast::heun_step_out_cuda));
  m.impl("heun_step_", TORCH_BOX(&epg_fast::heun_step_cuda));
}
