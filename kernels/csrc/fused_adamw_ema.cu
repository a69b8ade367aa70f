// AdamW, averages and 16-bit copies on CUDA: one small kernel counts the step and works out each tensor's coefficients,
// one kernel updates everything. All that changes from step to step is read on the device.

#include "fused_adamw_ema.h"

#include "tensor_list.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace epg_fast {
namespace {

constexpr const char* kOp = "fused_adamw_ema_";
// Rows of a table's pointers; the averages follow.
enum List { kParam, kGrad, kExpAvg, kExpAvgSq, kCopy, kEmaCopy, kEma };
constexpr int kFixedLists = 6;

struct DeviceScalars {
  const float* norm;
  const float* found_inf;
  const double* max_norm;
  const float* grad_scale;  // or null
  const double* ema_weights;
};

__global__ void adamw_prepare_kernel(TensorStep* tensor_steps, float* steps, const double* lrs,
                                     const double* weight_decays, const float* found_inf, int64_t count,
                                     const AdamW adamw) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count && *found_inf == 0.0f) {
    const float step = steps[i] + 1.0f;
    steps[i] = step;
    tensor_steps[i] = make_tensor_step(lrs[i], weight_decays[i], step, adamw);
  }
}

// The same offset into every list's tensor. A copy in 16 bits is not wanted where it is null.
template <int kEmas>
struct Slice {
  float* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  uint16_t* copy;
  uint16_t* ema_copy;
  bool float16;  // the copies, which are bfloat16 otherwise
  float* emas[kEmas > 0 ? kEmas : 1];
};

template <int kEmas, class Grad>
__device__ __forceinline__ bool is_aligned(const Slice<kEmas>& s) {
  uintptr_t wide = reinterpret_cast<uintptr_t>(s.param) | reinterpret_cast<uintptr_t>(s.exp_avg) |
                   reinterpret_cast<uintptr_t>(s.exp_avg_sq);
  for (int k = 0; k < kEmas; ++k) {
    wide |= reinterpret_cast<uintptr_t>(s.emas[k]);
  }
  const uintptr_t copies = reinterpret_cast<uintptr_t>(s.copy) | reinterpret_cast<uintptr_t>(s.ema_copy);
  return wide % 16 == 0 && copies % 8 == 0 && reinterpret_cast<uintptr_t>(s.grad) % (4 * sizeof(Grad)) == 0;
}

__device__ __forceinline__ void copy_four(uint16_t* to, int64_t at, bool float16, const float (&from)[4]) {
  if (to != nullptr && float16) {
    store4(reinterpret_cast<__half*>(to) + at, from);
  } else if (to != nullptr) {
    store4(reinterpret_cast<__nv_bfloat16*>(to) + at, from);
  }
}

__device__ __forceinline__ void copy_one(uint16_t* to, int64_t at, bool float16, float from) {
  if (to != nullptr && float16) {
    reinterpret_cast<__half*>(to)[at] = __float2half_rn(from);
  } else if (to != nullptr) {
    reinterpret_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(from);
  }
}

template <int kEmas, class Grad>
__device__ __forceinline__ void update_four(const Slice<kEmas>& s, int64_t at, float factor,
                                            const float (&ema_weights)[kMaxEmas], const AdamW& adamw,
                                            const TensorStep& step) {
  float param[4], grad[4], exp_avg[4], exp_avg_sq[4], emas[kEmas > 0 ? kEmas : 1][4];
  load4(s.param + at, param);
  load4(static_cast<const Grad*>(s.grad) + at, grad);
  load4(s.exp_avg + at, exp_avg);
  load4(s.exp_avg_sq + at, exp_avg_sq);
#pragma unroll
  for (int k = 0; k < kEmas; ++k) {
    load4(s.emas[k] + at, emas[k]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    adamw_step(param[j], grad[j] * factor, exp_avg[j], exp_avg_sq[j], adamw, step);
#pragma unroll
    for (int k = 0; k < kEmas; ++k) {
      emas[k][j] = lerp(emas[k][j], param[j], ema_weights[k]);
    }
  }
  store4(s.param + at, param);
  store4(s.exp_avg + at, exp_avg);
  store4(s.exp_avg_sq + at, exp_avg_sq);
#pragma unroll
  for (int k = 0; k < kEmas; ++k) {
    store4(s.emas[k] + at, emas[k]);
  }
  copy_four(s.copy, at, s.float16, param);
  if constexpr (kEmas > 0) {
    copy_four(s.ema_copy, at, s.float16, emas[0]);
  }
}

template <int kEmas, class Grad>
__device__ __forceinline__ void update_one(const Slice<kEmas>& s, int64_t at, float factor,
                                           const float (&ema_weights)[kMaxEmas], const AdamW& adamw,
                                           const TensorStep& step) {
  float param = s.param[at];
  const float grad = static_cast<float>(static_cast<const Grad*>(s.grad)[at]);
  adamw_step(param, grad * factor, s.exp_avg[at], s.exp_avg_sq[at], adamw, step);
  s.param[at] = param;
#pragma unroll
  for (int k = 0; k < kEmas; ++k) {
    s.emas[k][at] = lerp(s.emas[k][at], param, ema_weights[k]);
  }
  copy_one(s.copy, at, s.float16, param);
  if constexpr (kEmas > 0) {
    copy_one(s.ema_copy, at, s.float16, s.emas[0][at]);
  }
}

template <int kEmas, class Grad>
__device__ __forceinline__ void update_chunk(const Slice<kEmas>& s, int64_t size, float factor,
                                             const float (&ema_weights)[kMaxEmas], const AdamW& adamw,
                                             const TensorStep& step) {
  const int64_t vectors = is_aligned<kEmas, Grad>(s) ? size / 4 : 0;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    update_four<kEmas, Grad>(s, 4 * i, factor, ema_weights, adamw, step);
  }
#pragma unroll 1  // unrolled, it takes more registers than the loop that does the work
  for (int64_t i = 4 * vectors + threadIdx.x; i < size; i += kThreads) {
    update_one<kEmas, Grad>(s, i, factor, ema_weights, adamw, step);
  }
}

template <int kEmas>
__global__ void __launch_bounds__(kThreads)
    fused_adamw_ema_kernel(const __grid_constant__ TensorTable<kFixedLists + kEmas> table,
                           const TensorStep* tensor_steps, const DeviceScalars scalars, const AdamW adamw,
                           bool float16_copies) {
  if (*scalars.found_inf != 0.0f) {
    return;
  }
  const float factor = gradient_factor(*scalars.norm, *scalars.max_norm,
                                       scalars.grad_scale == nullptr ? 1.0f : *scalars.grad_scale);
  float ema_weights[kMaxEmas];
#pragma unroll
  for (int k = 0; k < kEmas; ++k) {
    ema_weights[k] = static_cast<float>(scalars.ema_weights[k]);
  }
  for (int32_t chunk = blockIdx.x; chunk < table.chunks(); chunk += gridDim.x) {
    const int row = row_of(table, chunk);
    const int64_t begin = (chunk - table.chunks_before[row]) * kChunk;
    const int64_t size = min(kChunk, table.sizes[row] - begin);
    const bool bfloat16 = table.bfloat16[row];
    const auto at = [&](int list) { return static_cast<float*>(table.pointers[list][row]) + begin; };
    Slice<kEmas> s;
    s.param = at(kParam);
    s.grad = static_cast<const char*>(table.pointers[kGrad][row]) + begin * (bfloat16 ? 2 : 4);
    s.exp_avg = at(kExpAvg);
    s.exp_avg_sq = at(kExpAvgSq);
    const auto copy_at = [&](int list) {
      uint16_t* const copy = static_cast<uint16_t*>(table.pointers[list][row]);
      return copy == nullptr ? nullptr : copy + begin;
    };
    s.copy = copy_at(kCopy);
    s.ema_copy = copy_at(kEmaCopy);
    s.float16 = float16_copies;
#pragma unroll
    for (int k = 0; k < kEmas; ++k) {
      s.emas[k] = at(kEma + k);
    }
    const TensorStep step = tensor_steps[table.tensors[row]];
    if (bfloat16) {
      update_chunk<kEmas, __nv_bfloat16>(s, size, factor, ema_weights, adamw, step);
    } else {
      update_chunk<kEmas, float>(s, size, factor, ema_weights, adamw, step);
    }
  }
}

template <int kEmas>
void update(const AdamWEmaLists& lists, const TensorStep* tensor_steps, const DeviceScalars& scalars,
            const AdamW& adamw, int32_t device, const Launcher& launch) {
  constexpr int kLists = kFixedLists + kEmas;
  const size_t count = lists.params.size();
  const auto describe = [&](size_t i, void* (&pointers)[kLists]) {
    pointers[kParam] = lists.params[i].mutable_data_ptr();
    pointers[kGrad] = const_cast<void*>(lists.grads[i].const_data_ptr());
    pointers[kExpAvg] = lists.exp_avgs[i].mutable_data_ptr();
    pointers[kExpAvgSq] = lists.exp_avg_sqs[i].mutable_data_ptr();
    pointers[kCopy] = lists.copies.empty() ? nullptr : lists.copies[i].mutable_data_ptr();
    pointers[kEmaCopy] = lists.copies_averages() ? lists.copies[count + i].mutable_data_ptr() : nullptr;
    for (int k = 0; k < kEmas; ++k) {
      pointers[kEma + k] = lists.emas[k * count + i].mutable_data_ptr();
    }
    return lists.grads[i].scalar_type() == ScalarType::BFloat16;
  };
  const bool float16_copies = !lists.copies.empty() && lists.copies[0].scalar_type() == ScalarType::Half;
  for_each_table<kLists>(lists.params, describe, [&](const TensorTable<kLists>& table) {
    launch(grid_for(table.chunks(), device), kThreads, fused_adamw_ema_kernel<kEmas>, table, tensor_steps, scalars,
           adamw, float16_copies);
  });
}

void fused_adamw_ema_cuda(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                          TensorList emas, TensorList copies, Tensor steps, Tensor lrs, Tensor weight_decays,
                          Tensor ema_weights, Tensor norm, Tensor found_inf, Tensor max_norm,
                          std::optional<Tensor> grad_scale, double beta1, double beta2, double eps) {
  const AdamWEmaLists lists{params, grads, exp_avgs, exp_avg_sqs, emas, copies};
  check_adamw_ema(lists, {steps, lrs, weight_decays, ema_weights, norm, found_inf, max_norm, grad_scale});
  const int64_t count = static_cast<int64_t>(params.size());
  if (count == 0) {
    return;
  }
  const int32_t device = steps.get_device_index();
  const Launcher launch(kOp, device);
  const auto float_data = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  const auto double_data = [](const Tensor& tensor) { return static_cast<const double*>(tensor.const_data_ptr()); };

  const AdamW adamw = make_adamw(beta1, beta2, eps);
  constexpr int64_t kFloats = sizeof(TensorStep) / sizeof(float);
  const Tensor scratch = torch::stable::new_empty(steps, {count * kFloats}, ScalarType::Float);
  TensorStep* const tensor_steps = static_cast<TensorStep*>(scratch.mutable_data_ptr());
  constexpr int kPrepareThreads = 128;
  launch((count + kPrepareThreads - 1) / kPrepareThreads, kPrepareThreads, adamw_prepare_kernel, tensor_steps,
         static_cast<float*>(steps.mutable_data_ptr()), double_data(lrs), double_data(weight_decays),
         float_data(found_inf), count, adamw);

  const DeviceScalars scalars{float_data(norm), float_data(found_inf), double_data(max_norm),
                              grad_scale ? float_data(*grad_scale) : nullptr, double_data(ema_weights)};
  static_assert(kMaxEmas == 4);
  constexpr decltype(&update<0>) updates[] = {update<0>, update<1>, update<2>, update<3>, update<4>};
  updates[ema_weights.numel()](lists, tensor_steps, scalars, adamw, device, launch);
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CUDA, m) { m.impl("fused_adamw_ema_", TORCH_BOX(&epg_fast::fused_adamw_ema_cuda)); }
