// Euler's and Heun's steps on CUDA: memory-bound, so 16-byte accesses where the pointers allow them and a scalar tail.

#include "euler_step.h"

#include "launch.cuh"

#include <algorithm>

namespace epg_fast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

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

__global__ void __launch_bounds__(kThreads)
    euler_step_kernel(float* out, const Step step, int64_t vectors, int64_t size, const float* x,
                      const float* denoised) {
  take_steps(out, step, vectors, size, x, denoised);
}

__global__ void __launch_bounds__(kThreads)
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
    // The first 4 * vectors elements in 16-byte accesses, the rest one by one, both in grid-stride loops.
    const bool wide = aligned(out_data, 16) && aligned(data_of(x), 16) && (aligned(data_of(estimates), 16) && ...);
    const int64_t vectors = wide ? size / 4 : 0, items = wide ? (size + 3) / 4 : size;
    const int64_t blocks = std::min(kMaxBlocks, (items + kThreads - 1) / kThreads);
    constexpr bool is_euler = sizeof...(estimates) == 1;
    const Launcher launch(is_euler ? "euler_step" : "heun_step", x.get_device_index());
    const auto kernel = [] {
      if constexpr (is_euler) {
        return euler_step_kernel;
      } else {
        return heun_step_kernel;
      }
    }();
    launch(blocks, kThreads, kernel, out_data, step, vectors, size, data_of(x), data_of(estimates)...);
  }
};

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) { epg_fast::StepOperators<epg_fast::OnCuda>::implement(m); }
