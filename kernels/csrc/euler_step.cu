// Euler's and Heun's steps on CUDA: memory-bound, so 16-byte accesses where the pointers allow them and a scalar tail.

#include "euler_step.h"

#include "common.cuh"

namespace epg_fast {
namespace {

// No __restrict__: `out` may be any of the inputs.
template <class... Estimates>
__device__ __forceinline__ void take_steps(float* out, const Step step, int64_t vectors, int64_t size, const float* x,
                                           const Estimates*... estimates) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  // By value: of references the compiler would unroll the loop half as far.
  const auto take_four = [=](const float4 a, const auto... b) {
    return make_float4(take_step(step, a.x, b.x...), take_step(step, a.y, b.y...), take_step(step, a.z, b.z...),
                       take_step(step, a.w, b.w...));
  };
  for (int64_t i = first; i < vectors; i += stride) {
    reinterpret_cast<float4*>(out)[i] =
        take_four(reinterpret_cast<const float4*>(x)[i], reinterpret_cast<const float4*>(estimates)[i]...);
  }
  for (int64_t i = 4 * vectors + first; i < size; i += stride) {
    out[i] = take_step(step, x[i], estimates[i]...);
  }
}

__global__ void __launch_bounds__(ElementwiseGrid::kThreads)
    euler_step_kernel(float* out, const Step step, int64_t vectors, int64_t size, const float* x,
                      const float* denoised) {
  take_steps(out, step, vectors, size, x, denoised);
}

__global__ void __launch_bounds__(ElementwiseGrid::kThreads)
    heun_step_kernel(float* out, const Step step, int64_t vectors, int64_t size, const float* x, const float* denoised,
                     const float* denoised_next) {
  take_steps(out, step, vectors, size, x, denoised, denoised_next);
}

struct OnCuda {
  template <class... Estimates>
  static void run(const Tensor& out, const Step& step, const Tensor& x, const Estimates&... estimates) {
    const int64_t size = x.numel();
    if (size == 0) {
      return;
    }
    float* const out_data = static_cast<float*>(out.mutable_data_ptr());
    const ElementwiseGrid grid(size, {out_data, data_of(x), data_of(estimates)...});
    constexpr bool is_euler = sizeof...(estimates) == 1;
    const Launcher launch(is_euler ? "euler_step" : "heun_step", x.get_device_index());
    const auto kernel = [] {
      if constexpr (is_euler) {
        return euler_step_kernel;
      } else {
        return heun_step_kernel;
      }
    }();
    launch(grid.blocks, grid.kThreads, kernel, out_data, step, grid.vectors, size, data_of(x), data_of(estimates)...);
  }
};

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) { epg_fast::StepOperators<epg_fast::OnCuda>::implement(m); }
