#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <optional>

#if defined(__CUDACC__)
#define EPG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EPG_HOST_DEVICE inline
#endif

namespace epg_fast {

using torch::stable::Tensor;

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
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "euler_step: ", name, " must be float32");
  STD_TORCH_CHECK(tensor.is_contiguous(), "euler_step: ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.is_cuda() == x.is_cuda() && tensor.get_device_index() == x.get_device_index(),
                  "euler_step: ", name, " must be on the same device as x");
  STD_TORCH_CHECK(tensor.dim() == x.dim(), "euler_step: ", name, " has ", tensor.dim(), " dimensions, x has ", x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) {
    STD_TORCH_CHECK(tensor.size(i) == x.size(i), "euler_step: ", name, " has size ", tensor.size(i), " in dimension ", i,
                    ", x has ", x.size(i));
  }
}

inline void check_euler_step(const Tensor& out, const Tensor& x, const Tensor& denoised, double sigma) {
  check_euler_step_tensor("x", x, x);
  check_euler_step_tensor("denoised", denoised, x);
  check_euler_step_tensor("out", out, x);
  STD_TORCH_CHECK(sigma != 0.0, "euler_step: sigma must not be 0");
}

}  // namespace epg_fast
