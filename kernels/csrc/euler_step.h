#pragma once

#include "common.h"

#include <cstdint>
#include <limits>
#include <optional>

namespace epg_fast {

struct EulerStep {
  float sigma;
  float dt;
  float lo;
  float hi;
};

// A missing bound is an infinity: the comparison never holds, and NaN passes through as in torch.clamp.
inline EulerStep make_euler_step(double sigma, double sigma_next, std::optional<double> lo, std::optional<double> hi) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  return {static_cast<float>(sigma), static_cast<float>(sigma_next - sigma), static_cast<float>(lo.value_or(-infinity)),
          static_cast<float>(hi.value_or(infinity))};
}

EPG_HOST_DEVICE float clamp(float value, const EulerStep& step) {
  value = value < step.lo ? step.lo : value;
  return value > step.hi ? step.hi : value;
}

// The intrinsics forbid a fused multiply-add on CUDA, as the compiler's flags do on the CPU: the reference rounds after
// each operation.
EPG_HOST_DEVICE float add_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

EPG_HOST_DEVICE float multiply_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

EPG_HOST_DEVICE float divide_rounded(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// d = (x - clamp(denoised)) / sigma
EPG_HOST_DEVICE float slope(float x, float denoised, float sigma, const EulerStep& step) {
  return divide_rounded(add_rounded(x, -clamp(denoised, step)), sigma);
}

EPG_HOST_DEVICE float euler_step(float x, float denoised, const EulerStep& step) {
  return add_rounded(x, multiply_rounded(step.dt, slope(x, denoised, step.sigma, step)));
}

inline void check_step_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  check_float32(op, name, tensor);
  check_contiguous(op, name, tensor);
  check_same_device(op, name, tensor, "x", x);
  check_same_shape(op, name, tensor, "x", x);
}

inline void check_euler_step(const Tensor& out, const Tensor& x, const Tensor& denoised, double sigma) {
  check_step_tensor("euler_step", "x", x, x);
  check_step_tensor("euler_step", "denoised", denoised, x);
  check_step_tensor("euler_step", "out", out, x);
  check_no_partial_overlap("euler_step", "out", out, "x", x, sizeof(float));
  check_no_partial_overlap("euler_step", "out", out, "denoised", denoised, sizeof(float));
  STD_TORCH_CHECK(sigma != 0.0, "euler_step: sigma must not be 0");
}

}  // namespace epg_fast
