// x + gate * (h @ weight^T + bias) for Hopper: bias, gate and residual in the epilogue of the matrix product, which also
// stores the branch that the gate scales where there will be a backward pass. CUTLASS has no node that reads one row of a
// matrix per sample, so there is one here.

// For Narrow, which CUTLASS otherwise multiplies in slices of 16 columns. It doubles the time that its headers take.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#include "gemm_sm90.cuh"

#include <torch/csrc/stable/library.h>

#include <cutlass/fast_math.h>

#include <algorithm>
#include <optional>

namespace epg_fast {
namespace {

// Row m / rows_per_sample of `data` [samples, N] for row m of D, read from the caches: a tile touches few rows of it.
// Its type is known at run time only: Element or float32. Ones for a null pointer.
template <class Element>
struct PerSample {
  struct SharedStorage {};

  struct Arguments {
    const void* data = nullptr;
    int64_t stride = 0;
    int rows_per_sample = 1;
    bool is_float32 = false;
  };

  struct Params {
    const void* data;
    int64_t stride;
    cutlass::FastDivmod rows_per_sample;
    bool is_float32;
  };

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& arguments, void*) {
    return {arguments.data, arguments.stride, cutlass::FastDivmod(arguments.rows_per_sample), arguments.is_float32};
  }

  template <class ProblemShape>
  static bool can_implement(const ProblemShape&, const Arguments& arguments) {
    return arguments.rows_per_sample > 0;
  }

  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }

  template <class ProblemShape>
  static cutlass::Status initialize_workspace(const ProblemShape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE PerSample() {}
  CUTLASS_HOST_DEVICE PerSample(const Params& params, const SharedStorage&) : params(&params) {}

  const Params* params;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const sm90::fusion::detail::ProducerLoadArgs<Args...>&) {
    return sm90::fusion::detail::EmptyProducerLoadCallbacks{};
  }

  // coordinates: of this thread's values relative to its first, (value, m, n, tile in m, tile in n).
  template <class Coordinates>
  struct Callbacks : sm90::fusion::detail::EmptyConsumerStoreCallbacks {
    static constexpr int kValues = decltype(cute::size(cute::take<0, 3>(cute::shape(Coordinates{}))))::value;

    CUTLASS_DEVICE Callbacks(Coordinates coordinates, int m, int n, int rows, int columns, const Params* params)
        : coordinates(coordinates), m(m), n(n), rows(rows), columns(columns), params(params) {}

    Coordinates coordinates;
    int m, n;
    int rows, columns;
    const Params* params;
    cutlass::Array<float, kValues> values;

    // Before the wait for C, so that both are under way together.
    CUTLASS_DEVICE void begin_loop(int tile_m, int tile_n) {
      if (params->data == nullptr) {
        values.fill(1.0f);
      } else if (params->is_float32) {
        load(static_cast<const float*>(params->data), tile_m, tile_n);
      } else {
        load(static_cast<const Element*>(params->data), tile_m, tile_n);
      }
    }

    // Two columns at a time, as the accumulators lie. Rows beyond the edge read the last row's values, columns none.
    template <class Gate>
    CUTLASS_DEVICE void load(const Gate* data, int tile_m, int tile_n) {
      const auto tile = coordinates(cute::_, cute::_, cute::_, tile_m, tile_n);
#pragma unroll
      for (int i = 0; i < kValues; i += 2) {
        const int row = min(m + static_cast<int>(cute::get<0>(tile(i))), rows - 1);
        const int column = n + static_cast<int>(cute::get<1>(tile(i)));
        cutlass::AlignedArray<Gate, 2> pair;
        pair.fill(Gate(0));
        if (column < columns) {
          const int64_t offset = params->rows_per_sample.div(row) * params->stride + column;
          pair = *reinterpret_cast<const cutlass::AlignedArray<Gate, 2>*>(data + offset);
        }
        values[i] = static_cast<float>(pair[0]);
        values[i + 1] = static_cast<float>(pair[1]);
      }
    }

    template <class Value, int N>
    CUTLASS_DEVICE cutlass::Array<float, N> visit(const cutlass::Array<Value, N>&, int v, int, int) {
      cutlass::Array<float, N> fragment;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        fragment[i] = values[v * N + i];
      }
      return fragment;
    }
  };

  template <bool ReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const sm90::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    const auto first = args.tCcD(cute::_, cute::_, cute::_, cute::_0{}, cute::_0{});
    static_assert(cute::is_static<decltype(first.layout())>::value && kPairs<decltype(first)>,
                  "a thread's values must come in pairs of neighbouring columns");
    const int rows = cute::get<0>(args.problem_shape_mnkl);
    const int columns = cute::get<1>(args.problem_shape_mnkl);
    const int m = rows - cute::get<0>(args.residue_tCcD);
    const int n = columns - cute::get<1>(args.residue_tCcD);
    return Callbacks<decltype(args.tCcD)>(args.tCcD, m, n, rows, columns, params);
  }

  // Whether values 2 i and 2 i + 1 are in one row, in an even column and the next.
  template <class Fragment>
  static constexpr bool kPairs = [] {
    constexpr auto layout = typename Fragment::layout_type{};
    bool pairs = true;
    for (int i = 0; i < cute::size(layout); i += 2) {
      const auto one = layout(i), other = layout(i + 1);
      pairs = pairs && cute::get<0>(one) == cute::get<0>(other) && cute::get<1>(one) % 2 == 0 &&
              cute::get<1>(other) == cute::get<1>(one) + 1;
    }
    return pairs;
  }();
};

using Element = cutlass::bfloat16_t;

template <class TileShape>
using Branch = sm90::Compute<cutlass::plus, sm90::PerColumn<TileShape, Element>, sm90::Accumulator>;

template <class TileShape, class Residual>
using StoredBranch = sm90::Stored<TileShape, Residual, Residual, Element, Branch<TileShape>>;

template <class TileShape, class Residual, class Input>
using Base = sm90::Gemm<Element, TileShape, Residual, Residual,
                        sm90::Compute<cutlass::homogeneous_multiply_add, PerSample<Element>, Input,
                                      sm90::fusion::Sm90SrcFetch<Residual>>>;

// Nine of them cover the 1584 columns of EPG-XL's decoder exactly, where wide tiles waste an eighth. Its residual is bfloat16;
// a float32 one is the encoder's, whose 768 columns are three wide tiles.
using Narrow = cute::Shape<cute::_128, cute::Int<176>, cute::_64>;

// The kernels' names, by which bench.resources lists them: the dtype of the residual. Where storing the branch costs no
// stage of the operands' pipeline, one kernel serves with and without.
struct linear_gate_residual_bf16_wide_kernel : Base<sm90::Wide, Element, Branch<sm90::Wide>> {};
struct linear_gate_residual_bf16_wide_saving_kernel : Base<sm90::Wide, Element, StoredBranch<sm90::Wide, Element>> {};
struct linear_gate_residual_bf16_narrow_kernel : Base<Narrow, Element, StoredBranch<Narrow, Element>> {};
struct linear_gate_residual_fp32_kernel : Base<sm90::Wide, float, StoredBranch<sm90::Wide, float>> {};

constexpr const char* kOp = "linear_gate_residual";

struct Tensors {
  Tensor out;
  std::optional<Tensor> branch;
  Tensor x;
  std::optional<Tensor> gate;
  Tensor h, weight, bias;
};

template <class Residual, class Kernel, class Branch>
void launch_kernel(const Tensors& t, const sm90::Problem& problem, const Branch& branch) {
  const auto stride = sm90::rows_of(problem.n);
  PerSample<Element>::Arguments gate;
  if (t.gate.has_value()) {
    gate = {t.gate->const_data_ptr(), t.gate->stride(0), static_cast<int>(problem.m / t.gate->size(0)),
            t.gate->scalar_type() == ScalarType::Float};
  }
  typename Kernel::EpilogueArguments epilogue{{gate, branch, {}, {}},
                                              static_cast<const Residual*>(t.x.const_data_ptr()),
                                              stride,
                                              static_cast<Residual*>(t.out.mutable_data_ptr()),
                                              stride};
  sm90::launch<Kernel>(kOp, problem, sm90::operands_of<Kernel, Element>(t.h, t.weight, problem), epilogue,
                       t.h.get_device_index());
}

template <class TileShape>
typename Branch<TileShape>::Arguments branch_of(const Tensors& t) {
  return {{static_cast<const Element*>(t.bias.const_data_ptr())}, {}, {}};
}

template <class TileShape, class Residual, class Kernel>
void launch_storing(const Tensors& t, const sm90::Problem& problem) {
  Element* const data = t.branch.has_value() ? static_cast<Element*>(t.branch->mutable_data_ptr()) : nullptr;
  const typename StoredBranch<TileShape, Residual>::Arguments stored{branch_of<TileShape>(t),
                                                                     {data, sm90::rows_of(problem.n)}};
  launch_kernel<Residual, Kernel>(t, problem, stored);
}

// If every tile takes the time of its width, the rounds that the persistent clusters need decide. Not measured.
bool narrow_is_faster(const sm90::Problem& problem, int32_t device) {
  const int64_t clusters = std::max(1, sm90::hopper_multiprocessors(device) / 2);
  const auto time = [&](int64_t width) {
    const int64_t tiles = (problem.m + 255) / 256 * ((problem.n + width - 1) / width);
    return (tiles + clusters - 1) / clusters * width;
  };
  return time(cute::size<1>(Narrow{})) < time(cute::size<1>(sm90::Wide{}));
}

void check_gate(const Tensor& gate, const Tensor& h, const sm90::Problem& problem) {
  STD_TORCH_CHECK(gate.dim() == 2 && gate.size(0) == h.size(0) && gate.size(1) == problem.n && h.dim() == 3, kOp,
                  ": wanted h [B, L, K] and gate [B, N]");
  const bool is_float32 = gate.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(is_float32 || gate.scalar_type() == h.scalar_type(), kOp, ": gate must be float32 or have h's dtype");
  check_same_device(kOp, "gate", gate, "h", h);
  // Two values are read at once.
  STD_TORCH_CHECK(gate.stride(1) == 1 && gate.stride(0) % 2 == 0 && gate.stride(0) >= 0 &&
                      aligned(gate.const_data_ptr(), is_float32 ? 8 : 4),
                  kOp, ": the rows of gate must be contiguous and start at an even multiple of its values' size");
}

void linear_gate_residual_cuda(Tensor out, std::optional<Tensor> branch, Tensor x, std::optional<Tensor> gate, Tensor h,
                               Tensor weight, Tensor bias) {
  const sm90::Problem problem = sm90::problem_of(kOp, "h", h, weight, bias);
  constexpr ScalarType bf16 = ScalarType::BFloat16;
  const ScalarType residual = x.scalar_type();
  STD_TORCH_CHECK(residual == bf16 || residual == ScalarType::Float, kOp, ": x must be float32 or bfloat16");
  sm90::check_arguments(kOp, problem,
                        {{"h", h, bf16}, {"weight", weight, bf16}, {"bias", bias, bf16}, {"x", x, residual},
                         {"out", out, residual}});
  sm90::check_rows_of_result(kOp, "x", x, problem);
  sm90::check_rows_of_result(kOp, "out", out, problem);
  if (branch.has_value()) {
    sm90::check_arguments(kOp, problem, {{"h", h, bf16}, {"branch", *branch, bf16}});
    sm90::check_rows_of_result(kOp, "branch", *branch, problem);
  }
  if (gate.has_value()) {
    check_gate(*gate, h, problem);
  }

  const Tensors tensors{out, branch, x, gate, h, weight, bias};
  if (residual == ScalarType::Float) {
    launch_storing<sm90::Wide, float, linear_gate_residual_fp32_kernel>(tensors, problem);
  } else if (narrow_is_faster(problem, h.get_device_index())) {
    launch_storing<Narrow, Element, linear_gate_residual_bf16_narrow_kernel>(tensors, problem);
  } else if (branch.has_value()) {
    launch_storing<sm90::Wide, Element, linear_gate_residual_bf16_wide_saving_kernel>(tensors, problem);
  } else {
    launch_kernel<Element, linear_gate_residual_bf16_wide_kernel>(tensors, problem, branch_of<sm90::Wide>(tensors));
  }
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_FRAGMENT(epg_fast, m) {
  m.def(
      "linear_gate_residual_out(Tensor(a!) out, Tensor(b!)? branch, Tensor x, Tensor? gate, Tensor h, Tensor weight, "
      "Tensor bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) {
  m.impl("linear_gate_residual_out", TORCH_BOX(&epg_fast::linear_gate_residual_cuda));
}
