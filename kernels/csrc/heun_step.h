#pragma once

#include "euler_step.h"

namespace epg_fast {

struct HeunStep {
  EulerStep euler;
  float sigma_next;
};

inline HeunStep make_heun_step(double sigma, double sigma_next, std::optional<double> lo, std::optional<double> hi) {
  return {make_euler_step(sigma, sigma_next, lo, hi), static_cast<float>(sigma_next)};
}

// The first slope and the Euler step are computed again, from x and denoised, instead of being read from memory.
EPG_HOST_DEVICE float heun_step(float x, float denoised, float denoised_next, const HeunStep& step) {
  const EulerStep& euler = step.euler;
  const float first = slope(x, denoised, euler.sigma, euler);
  const float ahead = add_rounded(x, multiply_rounded(euler.dt, first));
  const float second = slope(ahead, denoised_next, step.sigma_next, euler);
  const float change = multiply_rounded(multiply_rounded(euler.dt, add_rounded(first, second)), 0.5f);
  return add_rounded(x, change);
}

inline void check_heun_step(const Tensor& out, const Tensor& x, const Tensor& denoised, const Tensor& denoised_next,
                            double sigma, double sigma_next) {
  check_step_tensor("heun_step", "x", x, x);
  check_step_tensor("heun_step", "denoised", denoised, x);
  check_step_tensor("heun_step", "denoised_next", denoised_next, x);
  check_step_tensor("heun_step", "out", out, x);
  check_no_partial_overlap("heun_step", "out", out, "x", x, sizeof(float));
  check_no_partial_overlap("heun_step", "out", out, "denoised", denoised, sizeof(float));
  check_no_partial_overlap("heun_step", "out", out, "denoised_next", denoised_next, sizeof(float));
  STD_TORCH_CHECK(sigma != 0.0, "heun_step: sigma must not be 0");
  STD_TORCH_CHECK(sigma_next != 0.0, "heun_step: sigma_next must not be 0");
}

}  // namespace epg_fast
