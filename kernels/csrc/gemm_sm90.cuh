// What the matrix products written with CUTLASS share: D = epilogue(A B^T) for row-major A [M, K] and B [N, K], or
// D = epilogue(A B) for row-major B [K, N], on GPUs of compute capability 9.0. Two warp groups multiply one tile with
// wgmma while a third fetches the next operands by TMA; blocks are persistent, and two neighbours in M form a cluster and
// share B's tiles.
#pragma once

#include "common.h"
#include "launch.cuh"

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_store_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <array>
#include <initializer_list>
#include <limits>

namespace epg_fast::sm90 {

namespace fusion = cutlass::epilogue::fusion;

constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
using RowMajor = cutlass::layout::RowMajor;
using Wide = cute::Shape<cute::_128, cute::_256, cute::_64>;  // a tile of 16-bit operands

template <class Element>
constexpr int kAlignment = 16 / sizeof(Element);  // values in the 16 bytes that TMA wants rows to be a multiple of
template <>
constexpr int kAlignment<void> = 1;

// Nodes of an epilogue, which compute in float32.
template <template <class> class Function, class... Inputs>
using Compute = fusion::Sm90EVT<fusion::Sm90Compute<Function, float, float, kRound>, Inputs...>;
template <class TileShape, class Element>
using PerColumn = fusion::Sm90RowBroadcast<0, TileShape, Element, float>;
template <class TileShape, class Element>
using PerRow = fusion::Sm90ColBroadcast<0, TileShape, Element, float>;
using Accumulator = fusion::Sm90AccFetch;
// Also stores what Input computes, [M, N] in Element, beside a D of ElementD; a null pointer stores nothing.
template <class TileShape, class ElementC, class ElementD, class Element, class Input>
struct StoredTypes {
  using Descriptor = cutlass::epilogue::collective::detail::EpilogueDescriptor<
      TileShape, cutlass::epilogue::collective::EpilogueTileAuto, ElementC, ElementD, EpilogueSchedule>;
  using Store = cutlass::epilogue::collective::detail::AuxStoreDescriptor<Descriptor, RowMajor, Element>;
  using Node = fusion::Sm90AuxStore<Store::Stages, typename Descriptor::EpilogueTile, Element, kRound,
                                    typename Store::Stride, typename Store::SmemLayoutAtom, typename Store::CopyOpR2S>;
};
template <class TileShape, class ElementC, class ElementD, class Element, class Input>
using Stored = fusion::Sm90EVT<typename StoredTypes<TileShape, ElementC, ElementD, Element, Input>::Node, Input>;

// C and D are [M, N]; ElementC is void where the epilogue reads no C. LayoutOfB is RowMajor for B [K, N].
template <class Element, class TileShape, class ElementC, class ElementD, class Epilogue,
          class LayoutOfB = cutlass::layout::ColumnMajor>
struct GemmTypes {
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, ElementC, RowMajor, kAlignment<ElementC>, ElementD,
      RowMajor, kAlignment<ElementD>, EpilogueSchedule, Epilogue>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment<Element>, Element, LayoutOfB,
      kAlignment<Element>, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename CollectiveEpilogue::SharedStorage)>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue>;
};

template <class Element, class TileShape, class ElementC, class ElementD, class Epilogue,
          class LayoutOfB = cutlass::layout::ColumnMajor>
using Gemm = typename GemmTypes<Element, TileShape, ElementC, ElementD, Epilogue, LayoutOfB>::Kernel;

using RowMajorStride = cute::Stride<int64_t, cute::_1, int64_t>;

inline RowMajorStride rows_of(int64_t width) { return cute::make_stride(width, cute::_1{}, int64_t{0}); }

struct Problem {
  int64_t m;
  int64_t n;
  int64_t k;
};

// Multiprocessors of a GPU, 0 if its compute capability is not 9.0; asked once per GPU.
inline int hopper_multiprocessors(int32_t device) {
  static std::array<int, 64> known = [] {
    std::array<int, 64> counts;
    counts.fill(-1);
    return counts;
  }();
  int& count = known[static_cast<size_t>(device) % known.size()];
  if (count < 0) {
    int major = 0, minor = 0, multiprocessors = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    count = major == 9 && minor == 0 ? multiprocessors : 0;
  }
  return count;
}

template <class Kernel>
constexpr bool kWholeInstructions =
    cute::size<1>(typename Kernel::TiledMma::AtomShape_MNK{}) == cute::size<1>(typename Kernel::TileShape{});

template <class Kernel>
void launch(const char* op, const Problem& problem, const typename Kernel::MainloopArguments& operands,
            const typename Kernel::EpilogueArguments& epilogue, int32_t device) {
  static_assert(kWholeInstructions<Kernel>, "one wgmma must span the width of a tile");
  using Adapter = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  typename Adapter::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(problem.m), static_cast<int>(problem.n), static_cast<int>(problem.k), 1},
      operands,
      epilogue};
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count = hopper_multiprocessors(device);
  STD_TORCH_CHECK(Adapter::can_implement(arguments) == cutlass::Status::kSuccess, op, ": the kernel does not take [",
                  problem.m, ", ", problem.k, "] x [", problem.k, ", ", problem.n, "]");
  STD_TORCH_CHECK(Adapter::get_workspace_size(arguments) == 0, op, ": the kernel wants a workspace");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(op, device);
  Adapter gemm;
  STD_TORCH_CHECK(gemm.initialize(arguments, nullptr, stream) == cutlass::Status::kSuccess, op,
                  ": the kernel could not be prepared: ", cudaGetErrorString(cudaGetLastError()));
  STD_TORCH_CHECK(gemm.run(stream) == cutlass::Status::kSuccess, op, ": launch failed: ",
                  cudaGetErrorString(cudaGetLastError()));
}

// A [M, K] and B [N, K] for the tensor maps.
template <class Kernel, class Element>
typename Kernel::MainloopArguments operands_of(const Tensor& a, const Tensor& b, const Problem& problem) {
  return {static_cast<const Element*>(a.const_data_ptr()), rows_of(problem.k),
          static_cast<const Element*>(b.const_data_ptr()), rows_of(problem.k)};
}

// A [M, K] and B [K, N].
template <class Kernel, class Element>
typename Kernel::MainloopArguments operands_with_rows_of_b(const Tensor& a, const Tensor& b, const Problem& problem) {
  return {static_cast<const Element*>(a.const_data_ptr()), rows_of(problem.k),
          static_cast<const Element*>(b.const_data_ptr()), cute::make_stride(cute::_1{}, problem.n, int64_t{0})};
}

inline int64_t rows(const Tensor& tensor) {
  int64_t product = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    product *= tensor.size(i);
  }
  return product;
}

struct Argument {
  const char* name;
  const Tensor& tensor;
  ScalarType dtype;
};

// On one Hopper GPU, of these dtypes and contiguous; a matrix begins at a multiple of 16 bytes.
inline void check_arguments(const char* op, const Problem& problem, std::initializer_list<Argument> arguments) {
  const auto& [x_name, x, x_dtype] = *arguments.begin();
  STD_TORCH_CHECK(x.is_cuda() && hopper_multiprocessors(x.get_device_index()) > 0, op, ": ", x_name,
                  " must be on a GPU of compute capability 9.0");
  // Coordinates are 32 bits, with room for the tiles that reach over the edges.
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() - 1024;
  for (const int64_t size : {problem.m, problem.n, problem.k}) {
    STD_TORCH_CHECK(size > 0 && size <= limit, op, ": got a size of ", size, ", wanted 1 to ", limit);
  }
  for (const auto& [name, tensor, dtype] : arguments) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype);
    check_contiguous(op, name, tensor);
    check_same_device(op, name, tensor, x_name, x);
    STD_TORCH_CHECK(tensor.dim() < 2 || aligned(tensor.const_data_ptr(), 16), op, ": ", name,
                    " must start at a multiple of 16 bytes");
  }
}

// The sizes of x [..., K] @ weight^T [N, K] + bias [N].
inline Problem problem_of(const char* op, const char* x_name, const Tensor& x, const Tensor& weight,
                          const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() >= 2 && weight.dim() == 2 && bias.dim() == 1 && x.size(x.dim() - 1) == weight.size(1) &&
                      bias.size(0) == weight.size(0),
                  op, ": wanted ", x_name, " [..., K], weight [N, K] and bias [N]");
  return {rows(x), weight.size(0), weight.size(1)};
}

// A tensor [..., N] with the rows of the matrix product.
inline void check_rows_of_result(const char* op, const char* name, const Tensor& tensor, const Problem& problem) {
  STD_TORCH_CHECK(tensor.dim() >= 2 && tensor.size(tensor.dim() - 1) == problem.n && rows(tensor) == problem.m, op,
                  ": ", name, " must have ", problem.m, " rows of ", problem.n);
}

// 1 - Phi(u) for u >= 0, to a relative error of 1.5e-5 up to u = 7, where it is 1e-12: a polynomial for its logarithm
// takes a third of erf's instructions, and float16 rounds sixteen times as coarsely. The Triton kernel's coefficients.
__device__ __forceinline__ float gaussian_tail(float u) {
  float p = fmaf(-1.59717368e-06f, u, 5.63956733e-05f);
  p = fmaf(p, u, -8.85859230e-04f);
  p = fmaf(p, u, 8.31808749e-03f);
  p = fmaf(p, u, -5.35469396e-02f);
  p = fmaf(p, u, -4.58890226e-01f);
  p = fmaf(p, u, -1.15109186e+00f);
  return exp2f(fmaf(p, u, -1.0f));
}

// z Phi(z) = max(z, 0) - |z| (1 - Phi(|z|)); NaN stays, and infinity does not meet zero.
__device__ __forceinline__ float gelu(float z) {
  const float u = z != z ? z : fminf(fabsf(z), 16.0f);
  return fmaf(-u, gaussian_tail(u), fmaxf(z, 0.0f));
}

// Phi(z) + z phi(z), whose density vanishes before z * z overflows.
__device__ __forceinline__ float gelu_gradient(float z) {
  const float tail = gaussian_tail(fabsf(z));
  return fmaf(z * 0.3989422804014327f, exp2f(z * z * -0.7213475204444817f), z > 0.0f ? 1.0f - tail : tail);
}

struct GeluArguments {
  bool apply = true;
};

// As a node of an epilogue; `apply` leaves the choice to the caller, for one kernel with and without it.
template <class T>
struct OptionalGelu {
  using Arguments = GeluArguments;
};

template <int N>
struct OptionalGelu<cutlass::Array<float, N>> {
  using Arguments = GeluArguments;
  __device__ __forceinline__ cutlass::Array<float, N> operator()(cutlass::Array<float, N> z,
                                                                 const Arguments& arguments) const {
    if (arguments.apply) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        z[i] = gelu(z[i]);
      }
    }
    return z;
  }
};

template <class T>
struct Gelu {};

template <int N>
struct Gelu<cutlass::Array<float, N>> {
  __device__ __forceinline__ cutlass::Array<float, N> operator()(cutlass::Array<float, N> z) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      z[i] = gelu(z[i]);
    }
    return z;
  }
};

// dy gelu'(z)
template <class T>
struct GeluGradient {};

template <int N>
struct GeluGradient<cutlass::Array<float, N>> {
  __device__ __forceinline__ cutlass::Array<float, N> operator()(const cutlass::Array<float, N>& z,
                                                                 cutlass::Array<float, N> dy) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dy[i] *= gelu_gradient(z[i]);
    }
    return dy;
  }
};

}  // namespace epg_fast::sm90
