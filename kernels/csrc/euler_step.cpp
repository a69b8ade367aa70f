// Euler's and Heun's steps on the CPU: one pass, split over PyTorch's threads, vectorised by the compiler.

#include "euler_step.h"

#include <torch/csrc/stable/ops.h>

namespace epg_fast {
namespace {

constexpr int64_t kGrain = 32768;

template <class... Estimates>
EPG_ALWAYS_INLINE void take_steps(float* out, const Step& step, int64_t begin, int64_t end, const float* x,
                                  const Estimates*... estimates) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    out[i] = take_step(step, x[i], estimates[i]...);
  }
}

EPG_CPU_CLONES void euler_steps(float* out, const Step step, int64_t begin, int64_t end, const float* x,
                                const float* denoised) {
  take_steps(out, step, begin, end, x, denoised);
}

EPG_CPU_CLONES void heun_steps(float* out, const Step step, int64_t begin, int64_t end, const float* x,
                               const float* denoised, const float* denoised_next) {
  take_steps(out, step, begin, end, x, denoised, denoised_next);
}

struct OnCpu {
  template <class... Estimates>
  static void run(const Tensor& out, const Step& step, const Tensor& x, const Estimates&... estimates) {
    float* const out_data = static_cast<float*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      if constexpr (sizeof...(estimates) == 1) {
        euler_steps(out_data, step, begin, end, data_of(x), data_of(estimates)...);
      } else {
        heun_steps(out_data, step, begin, end, data_of(x), data_of(estimates)...);
      }
    });
  }
};

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CPU, m) { epg_fast::StepOperators<epg_fast::OnCpu>::implement(m); }
