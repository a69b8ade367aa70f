// Euler's step and Heun's second half, element by element, and their operators on a device.
#pragma once

#include "common.h"

#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <utility>

namespace epg_fast {

struct Step {
  float sigma;
  float sigma_next;
  float dt;
  float lo;
  float hi;
};

// The intrinsics forbid a fused multiply-add on CUDA, as the compiler's flags do on the CPU: the reference rounds after
// each operation.
#ifdef __CUDA_ARCH__
EPG_HOST_DEVICE float add_rounded(float a, float b) { return __fadd_rn(a, b); }
EPG_HOST_DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
EPG_HOST_DEVICE float divide_rounded(float a, float b) { return __fdiv_rn(a, b); }
#else
EPG_HOST_DEVICE float add_rounded(float a, float b) { return a + b; }
EPG_HOST_DEVICE float multiply_rounded(float a, float b) { return a * b; }
EPG_HOST_DEVICE float divide_rounded(float a, float b) { return a / b; }
#endif

// d = (x - clamp(denoised)) / sigma
EPG_HOST_DEVICE float slope(const Step& step, float x, float denoised, float sigma) {
  denoised = denoised < step.lo ? step.lo : denoised;
  denoised = denoised > step.hi ? step.hi : denoised;
  return divide_rounded(add_rounded(x, -denoised), sigma);
}

EPG_HOST_DEVICE float take_step(const Step& step, float x, float denoised) {
  return add_rounded(x, multiply_rounded(step.dt, slope(step, x, denoised, step.sigma)));
}

// The first slope and the Euler step are computed again, from x and denoised, instead of being read from memory.
EPG_HOST_DEVICE float take_step(const Step& step, float x, float denoised, float denoised_next) {
  const float first = slope(step, x, denoised, step.sigma);
  const float ahead = add_rounded(x, multiply_rounded(step.dt, first));
  const float second = slope(step, ahead, denoised_next, step.sigma_next);
  return add_rounded(x, multiply_rounded(multiply_rounded(step.dt, add_rounded(first, second)), 0.5f));
}

inline const float* data_of(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

inline void check_step(const char* op, const Tensor& out, std::initializer_list<std::pair<const char*, Tensor>> read,
                       double sigma) {
  const Tensor& x = read.begin()->second;
  const auto check = [&](const char* name, const Tensor& tensor) {
    check_tensor(op, name, tensor, "x", x);
    check_same_shape(op, name, tensor, "x", x);
  };
  check("out", out);
  for (const auto& [name, tensor] : read) {
    check(name, tensor);
    check_no_partial_overlap(op, "out", out, name, tensor, sizeof(float));
  }
  STD_TORCH_CHECK(sigma != 0.0, op, ": sigma must not be 0");
}

// Device::run(out, step, x, denoised) computes an Euler step, with denoised_next behind it Heun's. `out` may be any of
// the inputs: element i is read before it is written, and no other element depends on it.
template <class Device>
struct StepOperators {
  using Bound = std::optional<double>;

  // A missing bound is an infinity: the comparison never holds, and NaN passes through as in torch.clamp.
  static Step step_of(double sigma, double sigma_next, Bound lo, Bound hi) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    return {static_cast<float>(sigma), static_cast<float>(sigma_next), static_cast<float>(sigma_next - sigma),
            static_cast<float>(lo.value_or(-infinity)), static_cast<float>(hi.value_or(infinity))};
  }

  static void euler_out(Tensor out, Tensor x, Tensor denoised, double sigma, double sigma_next, Bound lo, Bound hi) {
    check_step("euler_step", out, {{"x", x}, {"denoised", denoised}}, sigma);
    Device::run(out, step_of(sigma, sigma_next, lo, hi), x, denoised);
  }

  static void euler(Tensor x, Tensor denoised, double sigma, double sigma_next, Bound lo, Bound hi) {
    euler_out(x, x, denoised, sigma, sigma_next, lo, hi);
  }

  static void heun_out(Tensor out, Tensor x, Tensor denoised, Tensor denoised_next, double sigma, double sigma_next,
                       Bound lo, Bound hi) {
    check_step("heun_step", out, {{"x", x}, {"denoised", denoised}, {"denoised_next", denoised_next}}, sigma);
    STD_TORCH_CHECK(sigma_next != 0.0, "heun_step: sigma_next must not be 0");
    Device::run(out, step_of(sigma, sigma_next, lo, hi), x, denoised, denoised_next);
  }

  static void heun(Tensor x, Tensor denoised, Tensor denoised_next, double sigma, double sigma_next, Bound lo,
                   Bound hi) {
    heun_out(x, x, denoised, denoised_next, sigma, sigma_next, lo, hi);
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("euler_step_out", TORCH_BOX(&StepOperators::euler_out));
    m.impl("euler_step_", TORCH_BOX(&StepOperators::euler));
    m.impl("heun_step_out", TORCH_BOX(&StepOperators::heun_out));
    m.impl("heun_step_", TORCH_BOX(&StepOperators::heun));
  }
};

}  // namespace epg_fast
