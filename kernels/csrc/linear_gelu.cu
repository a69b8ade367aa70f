// gelu(x @ weight^T + bias) for Hopper: bias and GELU in the epilogue of the matrix product, which also stores z, the
// value before GELU, where there will be a backward pass.

#include "gemm_sm90.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace epg_fast {
namespace {

namespace collective = cutlass::epilogue::collective::detail;

using TileShape = sm90::Wide;

using Element = cutlass::bfloat16_t;

using Biased = sm90::Compute<cutlass::plus, sm90::PerColumn<TileShape, Element>, sm90::Accumulator>;

using StoreTile = collective::EpilogueDescriptor<TileShape, cutlass::epilogue::collective::EpilogueTileAuto, void,
                                                 Element, sm90::EpilogueSchedule>;
using Store = collective::AuxStoreDescriptor<StoreTile, sm90::RowMajor, Element>;
using StoreNode = sm90::fusion::Sm90AuxStore<Store::Stages, StoreTile::EpilogueTile, Element, sm90::kRound,
                                             Store::Stride, Store::SmemLayoutAtom, Store::CopyOpR2S>;
using BiasedAndStored = sm90::fusion::Sm90EVT<StoreNode, Biased>;

template <class Input>
using GeluOf = sm90::Gemm<Element, TileShape, void, Element, sm90::Compute<sm90::Gelu, Input>>;

// The kernels' names, by which bench.resources lists them.
struct linear_gelu_kernel : GeluOf<Biased> {};
struct linear_gelu_saving_kernel : GeluOf<BiasedAndStored> {};

void linear_gelu_cuda(Tensor y, std::optional<Tensor> z, Tensor x, Tensor weight, Tensor bias) {
  const sm90::Problem problem = sm90::check_linear("linear_gelu", "x", x, weight, bias);
  constexpr ScalarType dtype = ScalarType::BFloat16;
  STD_TORCH_CHECK(x.scalar_type() == dtype && bias.scalar_type() == dtype && y.scalar_type() == dtype &&
                      (!z.has_value() || z->scalar_type() == dtype),
                  "linear_gelu: x, bias, y and z must be bfloat16");
  sm90::check_rows_of_result("linear_gelu", "y", y, x, problem);
  if (z.has_value()) {
    sm90::check_rows_of_result("linear_gelu", "z", *z, x, problem);
  }
  const auto stride = sm90::rows_of(problem.n);
  const Biased::Arguments biased{{static_cast<const Element*>(bias.const_data_ptr())}, {}, {}};
  Element* const y_data = static_cast<Element*>(y.mutable_data_ptr());
  const int32_t device = x.get_device_index();
  if (z.has_value()) {
    linear_gelu_saving_kernel::EpilogueArguments epilogue{
        {{biased, {static_cast<Element*>(z->mutable_data_ptr()), stride}}, {}}, nullptr, {}, y_data, stride};
    sm90::launch<linear_gelu_saving_kernel>(
        "linear_gelu", problem, sm90::operands_of<linear_gelu_saving_kernel, Element>(x, weight, problem), epilogue,
        device);
  } else {
    linear_gelu_kernel::EpilogueArguments epilogue{{biased, {}}, nullptr, {}, y_data, stride};
    sm90::launch<linear_gelu_kernel>("linear_gelu", problem,
                                     sm90::operands_of<linear_gelu_kernel, Element>(x, weight, problem), epilogue,
                                     device);
  }
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_FRAGMENT(epg_fast, m) {
  m.def("linear_gelu_out(Tensor(a!) y, Tensor(b!)? z, Tensor x, Tensor weight, Tensor bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) { m.impl("linear_gelu_out", TORCH_BOX(&epg_fast::linear_gelu_cuda)); }
