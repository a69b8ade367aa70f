// Euler step on the CPU: one pass, split over PyTorch's threads, vectorised by the compiler.

#include "euler_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace epg_fast {
namespace {

constexpr int64_t kGrain = 32768;

// `out` may be `x` or `denoised`: element i is read before it is written, and no other element depends on it.
EPG_CPU_CLONES void euler_step_range(float* out, const float* x, const float* denoised, const EulerStep step,
                                     int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    out[i] = euler_step(x[i], denoised[i], step);
  }
}

void euler_step_out_cpu(Tensor out, Tensor x, Tensor denoised, double sigma, double sigma_next,
                        std::optional<double> lo, std::optional<double> hi) {
  check_euler_step(out, x, denoised, sigma);
  float* const out_data = static_cast<float*>(out.mutable_data_ptr());
  const float* const x_data = static_cast<const float*>(x.const_data_ptr());
  const float* const denoised_data = static_cast<const float*>(denoised.const_data_ptr());
  const EulerStep step = make_euler_step(sigma, sigma_next, lo, hi);
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    euler_step_range(out_data, x_data, denoised_data, step, begin, end);
  });
}

void euler_step_cpu(Tensor x, Tensor denoised, double sigma, double sigma_next, std::optional<double> lo,
                    std::optional<double> hi) {
  euler_step_out_cpu(x, x, denoised, sigma, sigma_next, lo, hi);
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CPU, m) {
  m.impl("euler_step_out", TORCH_BOX(&epg_fast::euler_step_out_cpu));
  m.impl("euler_step_", TORCH_BOX(&epg_fast::euler_step_cpu));
}
