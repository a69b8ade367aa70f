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

inline void check_euler_step_tensor(const char* name, const Tensor& tensor, const Tensor& x) {
  check_float32("euler_step", name, tensor);
  check_contiguous("euler_step", name, tensor);
  check_same_device("euler_step", name, tensor, "x", x);
  check_same_shape("euler_step", name, tensor, "x", x);
}

inline void check_euler_step(const Tensor& out, const Tensor& x, const Tensor& denoised, double sigma) {
  check_euler_step_tensor("x", x, x);
  check_euler_step_tensor("denoised", denoised, x);
  check_euler_step_tensor("out", out, x);
  STD_TORCH_CHECK(sigma != 0.0, "euler_step: sigma must not be 0");
}

}  // namespace epg_fast
