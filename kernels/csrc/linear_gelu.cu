// gelu(x @ weight^T + bias) for Hopper: bias and GELU in the epilogue of the matrix product, which also stores z, the
// value before GELU, where there will be a backward pass.

#include "gemm_sm90.cuh"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace epg_fast {
namespace {

namespace collective = cutlass::epilogue::collective::detail;

using TileShape = sm90::Wide;

template <class Element>
using Biased = sm90::Compute<cutlass::plus, sm90::PerColumn<TileShape, Element>, sm90::Accumulator>;

template <class Element>
struct StoreTypes {
  using Tile = collective::EpilogueDescriptor<TileShape, cutlass::epilogue::collective::EpilogueTileAuto, void, Element,
                                              sm90::EpilogueSchedule>;
  using Store = collective::AuxStoreDescriptor<Tile, sm90::RowMajor, Element>;
  using Node = sm90::fusion::Sm90AuxStore<Store::Stages, typename Tile::EpilogueTile, Element, sm90::kRound,
                                          typename Store::Stride, typename Store::SmemLayoutAtom,
                                          typename Store::CopyOpR2S>;
};

template <class Element>
using BiasedAndStored = sm90::fusion::Sm90EVT<typename StoreTypes<Element>::Node, Biased<Element>>;

template <class Element, class Input>
using GeluOf = sm90::Gemm<Element, TileShape, void, Element, sm90::Compute<sm90::Gelu, Input>>;

// The kernels' names, by which bench.resources lists them.
struct linear_gelu_bf16_kernel : GeluOf<cutlass::bfloat16_t, Biased<cutlass::bfloat16_t>> {};
struct linear_gelu_fp16_kernel : GeluOf<cutlass::half_t, Biased<cutlass::half_t>> {};
struct linear_gelu_bf16_saving_kernel : GeluOf<cutlass::bfloat16_t, BiasedAndStored<cutlass::bfloat16_t>> {};
struct linear_gelu_fp16_saving_kernel : GeluOf<cutlass::half_t, BiasedAndStored<cutlass::half_t>> {};

template <class Element, class Kernel, class SavingKernel>
void launch_linear_gelu(Tensor& y, std::optional<Tensor>& z, const Tensor& x, const Tensor& weight, const Tensor& bias,
                        const sm90::Problem& problem) {
  const auto stride = sm90::rows_of(problem.n);
  const auto biased = [&] {
    return typename Biased<Element>::Arguments{{static_cast<const Element*>(bias.const_data_ptr())}, {}, {}};
  };
  Element* const y_data = static_cast<Element*>(y.mutable_data_ptr());
  const int32_t device = x.get_device_index();
  if (z.has_value()) {
    typename SavingKernel::EpilogueArguments epilogue{
        {{biased(), {static_cast<Element*>(z->mutable_data_ptr()), stride}}, {}}, nullptr, {}, y_data, stride};
    sm90::launch<SavingKernel>("linear_gelu", problem, sm90::operands_of<SavingKernel, Element>(x, weight, problem),
                               epilogue, device);
  } else {
    typename Kernel::EpilogueArguments epilogue{{biased(), {}}, nullptr, {}, y_data, stride};
    sm90::launch<Kernel>("linear_gelu", problem, sm90::operands_of<Kernel, Element>(x, weight, problem), epilogue,
                         device);
  }
}

void linear_gelu_cuda(Tensor y, std::optional<Tensor> z, Tensor x, Tensor weight, Tensor bias) {
  const sm90::Problem problem = sm90::check_linear("linear_gelu", "x", x, weight, bias);
  STD_TORCH_CHECK(bias.scalar_type() == x.scalar_type() && y.scalar_type() == x.scalar_type() &&
                      (!z.has_value() || z->scalar_type() == x.scalar_type()),
                  "linear_gelu: bias, y and z must have x's dtype");
  sm90::check_rows_of_result("linear_gelu", "y", y, x, problem);
  if (z.has_value()) {
    sm90::check_rows_of_result("linear_gelu", "z", *z, x, problem);
  }
  if (x.scalar_type() == ScalarType::BFloat16) {
    launch_linear_gelu<cutlass::bfloat16_t, linear_gelu_bf16_kernel, linear_gelu_bf16_saving_kernel>(y, z, x, weight,
                                                                                                     bias, problem);
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "linear_gelu: x must be bfloat16 or float16");
    launch_linear_gelu<cutlass::half_t, linear_gelu_fp16_kernel, linear_gelu_fp16_saving_kernel>(y, z, x, weight, bias,
                                                                                                 problem);
  }
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_FRAGMENT(epg_fast, m) {
  m.def("linear_gelu_out(Tensor(a!) y, Tensor(b!)? z, Tensor x, Tensor weight, Tensor bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) { m.impl("linear_gelu_out", TORCH_BOX(&epg_fast::linear_gelu_cuda)); }
