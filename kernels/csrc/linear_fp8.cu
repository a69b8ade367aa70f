// act((x @ weight^T) * x_scale * weight_scale + bias) for Hopper: x and weight in float8_e4m3fn with a scale per row;
// scales, bias and GELU in the epilogue of the matrix product.

#include "gemm_sm90.cuh"

#include <torch/csrc/stable/library.h>

namespace epg_fast {
namespace {

constexpr const char* kOp = "linear_fp8";

// Half of the registers' accumulators are float32 sums outside the tensor cores, which keep fewer bits of a sum of FP8
// products: hence a tile half as wide as for 16 bits.
using TileShape = cute::Shape<cute::_128, cute::_128, cute::_128>;

using Result = cutlass::bfloat16_t;

using Epilogue = sm90::Compute<
    sm90::OptionalGelu,
    sm90::Compute<cutlass::homogeneous_multiply_add, sm90::PerColumn<TileShape, float>,
                  sm90::Compute<cutlass::multiplies, sm90::PerRow<TileShape, float>, sm90::Accumulator>,
                  sm90::PerColumn<TileShape, Result>>>;

// The kernel's name, by which bench.resources lists it.
struct linear_fp8_kernel : sm90::Gemm<cutlass::float_e4m3_t, TileShape, void, Result, Epilogue> {};

void check_scale(const char* name, const Tensor& scale, const Tensor& x, int64_t size) {
  check_tensor(kOp, name, scale, "x", x);
  STD_TORCH_CHECK(scale.numel() == size, kOp, ": ", name, " must have ", size, " values");
}

void linear_fp8_cuda(Tensor y, Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor bias, bool gelu) {
  const sm90::Problem problem = sm90::problem_of(kOp, "x", x, weight, bias);
  constexpr ScalarType fp8 = ScalarType::Float8_e4m3fn, bf16 = ScalarType::BFloat16;
  sm90::check_arguments(kOp, problem, {{"x", x, fp8}, {"weight", weight, fp8}, {"bias", bias, bf16}, {"y", y, bf16}});
  check_scale("x_scale", x_scale, x, problem.m);
  check_scale("weight_scale", weight_scale, x, problem.n);
  sm90::check_rows_of_result(kOp, "y", y, problem);
  const auto stride = sm90::rows_of(problem.n);
  linear_fp8_kernel::EpilogueArguments epilogue{{{{static_cast<const float*>(weight_scale.const_data_ptr())},
                                                  {{static_cast<const float*>(x_scale.const_data_ptr())}, {}, {}},
                                                  {static_cast<const Result*>(bias.const_data_ptr())},
                                                  {}},
                                                 {gelu}},
                                                nullptr,
                                                {},
                                                static_cast<Result*>(y.mutable_data_ptr()),
                                                stride};
  sm90::launch<linear_fp8_kernel>(
      kOp, problem, sm90::operands_of<linear_fp8_kernel, cutlass::float_e4m3_t>(x, weight, problem), epilogue,
      x.get_device_index());
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_FRAGMENT(epg_fast, m) {
  m.def(
      "linear_fp8_out(Tensor(a!) y, Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor bias, "
      "bool gelu) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) { m.impl("linear_fp8_out", TORCH_BOX(&epg_fast::linear_fp8_cuda)); }
