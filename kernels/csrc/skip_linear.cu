// x @ weight[:, :D]^T + skip @ weight[:, D:]^T + bias for Hopper, as one matrix product whose K loop walks through x
// and then through skip: the concatenation is never stored, and the sum is rounded once.

#include "gemm_sm90.cuh"

#include <torch/csrc/stable/library.h>

namespace epg_fast {
namespace {

constexpr const char* kOp = "skip_linear";

// A mainloop of CUTLASS, run for two pairs of operands that are added up in the same accumulators. The tile in which a
// pair ends is filled with zeros. To the kernel around it, K is the sum of both pairs' tiles.
template <class Base>
struct TwoProducts : Base {
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  static constexpr int kTile = cute::size<2>(typename Base::TileShape{});

  static int tiles(int k) { return (k + kTile - 1) / kTile; }

  struct Arguments {
    typename Base::Arguments first, second;
    int first_k, second_k;
  };

  // As Params of Base it is those of the first pair, which is all that the multiplying warps look at.
  struct Params : Base::Params {
    typename Base::Params second;
    int first_k, second_k;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape problem, const Arguments& arguments, void* workspace) {
    return {Base::to_underlying_arguments(with_k(problem, arguments.first_k), arguments.first, workspace),
            Base::to_underlying_arguments(with_k(problem, arguments.second_k), arguments.second, workspace),
            arguments.first_k, arguments.second_k};
  }

  template <class ProblemShape>
  static bool can_implement(const ProblemShape& problem, const Arguments& arguments) {
    return Base::can_implement(with_k(problem, arguments.first_k), arguments.first) &&
           Base::can_implement(with_k(problem, arguments.second_k), arguments.second);
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    Base::prefetch_tma_descriptors(params);
    Base::prefetch_tma_descriptors(params.second);
  }

  template <class ProblemShape>
  CUTLASS_DEVICE auto load_init(const ProblemShape& problem, const Params& params) const {
    return cute::tuple_cat(Base::load_init(with_k(problem, params.first_k), params),
                           Base::load_init(with_k(problem, params.second_k), params.second));
  }

  // All K tiles of one tile of the result: the scheduler does not split K.
  template <class Inputs, class KTiles, class Coordinates>
  CUTLASS_DEVICE void load(const Params& params, MainloopPipeline pipeline, PipelineState state, const Inputs& inputs,
                           const Coordinates& coordinates, KTiles, int k_tiles, int thread, uint32_t block,
                           TensorStorage& storage) {
    const int first_tiles = (params.first_k + kTile - 1) / kTile;
    const auto first = cute::make_tuple(cute::get<0>(inputs), cute::get<1>(inputs));
    const auto second = cute::make_tuple(cute::get<2>(inputs), cute::get<3>(inputs));
    Base::load(params, pipeline, state, first, coordinates, k_tiles_of(first), first_tiles, thread, block, storage);
    state.advance(first_tiles);
    Base::load(params.second, pipeline, state, second, coordinates, k_tiles_of(second), k_tiles - first_tiles, thread,
               block, storage);
  }

 private:
  template <class ProblemShape>
  CUTLASS_HOST_DEVICE static auto with_k(ProblemShape problem, int k) {
    cute::get<2>(problem) = k;
    return problem;
  }

  template <class Inputs>
  CUTLASS_DEVICE static auto k_tiles_of(const Inputs& inputs) {
    return cute::make_coord_iterator(cute::shape<3>(cute::get<0>(inputs)));
  }
};

using Element = cutlass::bfloat16_t;
using Types = sm90::GemmTypes<Element, sm90::Wide, void, Element,
                              sm90::Compute<cutlass::plus, sm90::PerColumn<sm90::Wide, Element>, sm90::Accumulator>>;

// The kernel's name, by which bench.resources lists it.
struct skip_linear_kernel
    : cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, TwoProducts<Types::CollectiveMainloop>,
                                           Types::CollectiveEpilogue> {};

void launch_kernel(Tensor& z, const Tensor& x, const Tensor& skip, const Tensor& weight, const Tensor& bias,
                   sm90::Problem problem) {
  const int64_t first_k = x.size(2), second_k = skip.size(2);
  const auto stride = sm90::rows_of(problem.n);
  const auto weight_stride = sm90::rows_of(problem.k);
  const Element* const weight_data = static_cast<const Element*>(weight.const_data_ptr());
  skip_linear_kernel::MainloopArguments operands{
      {static_cast<const Element*>(x.const_data_ptr()), sm90::rows_of(first_k), weight_data, weight_stride},
      {static_cast<const Element*>(skip.const_data_ptr()), sm90::rows_of(second_k), weight_data + first_k,
       weight_stride},
      static_cast<int>(first_k),
      static_cast<int>(second_k)};
  skip_linear_kernel::EpilogueArguments epilogue{
      {{static_cast<const Element*>(bias.const_data_ptr())}, {}, {}},
      nullptr,
      {},
      static_cast<Element*>(z.mutable_data_ptr()),
      stride};
  using Mainloop = skip_linear_kernel::CollectiveMainloop;
  problem.k = Mainloop::kTile * (Mainloop::tiles(operands.first_k) + Mainloop::tiles(operands.second_k));
  sm90::launch<skip_linear_kernel>(kOp, problem, operands, epilogue, x.get_device_index());
}

void skip_linear_cuda(Tensor z, Tensor x, Tensor skip, Tensor weight, Tensor bias) {
  STD_TORCH_CHECK(x.dim() == 3 && skip.dim() == 3 && weight.dim() == 2 && bias.dim() == 1 &&
                      x.size(0) == skip.size(0) && x.size(1) == skip.size(1) &&
                      x.size(2) + skip.size(2) == weight.size(1) && bias.size(0) == weight.size(0),
                  kOp, ": wanted x [B, L, D], skip [B, L, E], weight [N, D + E] and bias [N]");
  const sm90::Problem problem{sm90::rows(x), weight.size(0), weight.size(1)};
  constexpr ScalarType bf16 = ScalarType::BFloat16;
  sm90::check_arguments(kOp, problem,
                        {{"x", x, bf16}, {"skip", skip, bf16}, {"weight", weight, bf16}, {"bias", bias, bf16},
                         {"z", z, bf16}});
  sm90::check_rows_of_result(kOp, "z", z, problem);
  // Skip's half of the weight starts at column D.
  STD_TORCH_CHECK(x.size(2) > 0 && skip.size(2) > 0 && x.size(2) % 8 == 0 && skip.size(2) % 8 == 0, kOp,
                  ": the widths of x and skip must be multiples of 8");
  launch_kernel(z, x, skip, weight, bias, problem);
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_FRAGMENT(epg_fast, m) {
  m.def("skip_linear_out(Tensor(a!) z, Tensor x, Tensor skip, Tensor weight, Tensor bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) { m.impl("skip_linear_out", TORCH_BOX(&epg_fast::skip_linear_cuda)); }
