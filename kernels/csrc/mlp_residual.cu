// The MLP's products with GELU, for Hopper; its last one, onto the residual, is that of linear_residual_norm.cu.
//
// gelu(x @ weight^T + bias): bias and GELU in the epilogue of the matrix product, which also stores z, the value before
// GELU, where there will be a backward pass. And (dy @ weight) * gelu'(z), the gradient through GELU and the linear layer
// after it, with the sums of its columns over the rows of each tile.

#include "gemm_sm90.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace epg_fast {
namespace {

constexpr ScalarType kBfloat16 = ScalarType::BFloat16;

using TileShape = sm90::Wide;

using Element = cutlass::bfloat16_t;

using Biased = sm90::Compute<cutlass::plus, sm90::PerColumn<TileShape, Element>, sm90::Accumulator>;

using BiasedAndStored = sm90::Stored<TileShape, void, Element, Element, Biased>;

template <class Input>
using GeluOf = sm90::Gemm<Element, TileShape, void, Element, sm90::Compute<sm90::Gelu, Input>>;

// The kernels' names, by which bench.resources lists them.
struct linear_gelu_kernel : GeluOf<Biased> {};
struct linear_gelu_saving_kernel : GeluOf<BiasedAndStored> {};

void linear_gelu_cuda(Tensor y, std::optional<Tensor> z, Tensor x, Tensor weight, Tensor bias) {
  constexpr const char* op = "linear_gelu";
  const sm90::Problem problem = sm90::problem_of(op, "x", x, weight, bias);
  sm90::check_arguments(op, problem,
                        {{"x", x, kBfloat16}, {"weight", weight, kBfloat16}, {"bias", bias, kBfloat16},
                         {"y", y, kBfloat16}});
  sm90::check_rows_of_result(op, "y", y, problem);
  if (z.has_value()) {
    sm90::check_arguments(op, problem, {{"x", x, kBfloat16}, {"z", *z, kBfloat16}});
    sm90::check_rows_of_result(op, "z", *z, problem);
  }
  const auto stride = sm90::rows_of(problem.n);
  const Biased::Arguments biased{{static_cast<const Element*>(bias.const_data_ptr())}, {}, {}};
  Element* const y_data = static_cast<Element*>(y.mutable_data_ptr());
  const int32_t device = x.get_device_index();
  if (z.has_value()) {
    linear_gelu_saving_kernel::EpilogueArguments epilogue{
        {{biased, {static_cast<Element*>(z->mutable_data_ptr()), stride}}, {}}, nullptr, {}, y_data, stride};
    sm90::launch<linear_gelu_saving_kernel>(
        op, problem, sm90::operands_of<linear_gelu_saving_kernel, Element>(x, weight, problem), epilogue,
        device);
  } else {
    linear_gelu_kernel::EpilogueArguments epilogue{{biased, {}}, nullptr, {}, y_data, stride};
    sm90::launch<linear_gelu_kernel>(op, problem, sm90::operands_of<linear_gelu_kernel, Element>(x, weight, problem),
                                     epilogue, device);
  }
}

constexpr const char* kGradient = "linear_dgelu";

// Sums over a tile's rows, in a fixed order; rows beyond the edge are zeros.
using TileSums = sm90::fusion::Sm90RowReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, TileShape, float, float,
                                                sm90::kRound, cute::Stride<cute::_0, cute::_1, cute::_0>, 4,
                                                /*EnableNullptr=*/true, /*FinalReduction=*/false,
                                                /*VisitCheckOOB=*/false>;
using Gradient = sm90::fusion::Sm90EVT<
    TileSums, sm90::Compute<sm90::GeluGradient, sm90::fusion::Sm90SrcFetch<Element>, sm90::Accumulator>>;

// The kernel's name, by which bench.resources lists it.
struct linear_dgelu_kernel : sm90::Gemm<Element, TileShape, Element, Element, Gradient, sm90::RowMajor> {};

void linear_dgelu_cuda(Tensor dz, std::optional<Tensor> sums, Tensor dy, Tensor weight, Tensor z) {
  STD_TORCH_CHECK(dy.dim() >= 2 && weight.dim() == 2 && dy.size(dy.dim() - 1) == weight.size(0), kGradient,
                  ": wanted dy [..., K] and weight [K, N]");
  const sm90::Problem problem{sm90::rows(dy), weight.size(1), weight.size(0)};
  sm90::check_arguments(kGradient, problem,
                        {{"dy", dy, kBfloat16}, {"weight", weight, kBfloat16}, {"z", z, kBfloat16},
                         {"dz", dz, kBfloat16}});
  sm90::check_rows_of_result(kGradient, "z", z, problem);
  sm90::check_rows_of_result(kGradient, "dz", dz, problem);
  if (sums.has_value()) {
    constexpr int64_t tile_m = cute::size<0>(TileShape{}), tile_n = cute::size<1>(TileShape{});
    const int64_t tiles = (problem.m + tile_m - 1) / tile_m, columns = (problem.n + tile_n - 1) / tile_n * tile_n;
    sm90::check_arguments(kGradient, problem, {{"dy", dy, kBfloat16}, {"sums", *sums, ScalarType::Float}});
    STD_TORCH_CHECK(sums->dim() == 2 && sums->size(0) == tiles && sums->size(1) == columns, kGradient,
                    ": sums must be [", tiles, ", ", columns, "], one row for ", tile_m,
                    " of dz, padded to a multiple of ", tile_n);
  }
  const auto stride = sm90::rows_of(problem.n);
  linear_dgelu_kernel::EpilogueArguments epilogue{
      {{{}, {}, {}}, {sums.has_value() ? sums->mutable_data_ptr() : nullptr}},
      static_cast<const Element*>(z.const_data_ptr()),
      stride,
      static_cast<Element*>(dz.mutable_data_ptr()),
      stride};
  sm90::launch<linear_dgelu_kernel>(
      kGradient, problem, sm90::operands_with_rows_of_b<linear_dgelu_kernel, Element>(dy, weight, problem), epilogue,
      dy.get_device_index());
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_FRAGMENT(epg_fast, m) {
  m.def("linear_gelu_out(Tensor(a!) y, Tensor(b!)? z, Tensor x, Tensor weight, Tensor bias) -> ()");
  m.def("linear_dgelu_out(Tensor(a!) dz, Tensor(b!)? sums, Tensor dy, Tensor weight, Tensor z) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) {
  m.impl("linear_gelu_out", TORCH_BOX(&epg_fast::linear_gelu_cuda));
  m.impl("linear_dgelu_out", TORCH_BOX(&epg_fast::linear_dgelu_cuda));
}
