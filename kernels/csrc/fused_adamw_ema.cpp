// AdamW, averages and 16-bit copies on the CPU: one pass over memory. Small blocks, so that all arrays stream at once, go
// through the parts one after another, each part a loop that the compiler vectorises.

#include "fused_adamw_ema.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

namespace epg_fast {
namespace {

constexpr int64_t kGrain = 32768;
constexpr int64_t kBlock = 256;

template <class Grad>
EPG_ALWAYS_INLINE void adamw_block(float* __restrict param, const Grad* __restrict grad, float* __restrict exp_avg,
                                   float* __restrict exp_avg_sq, int64_t size, float factor, const AdamW& adamw,
                                   const TensorStep& step) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    adamw_step(param[i], to_float(grad[i]) * factor, exp_avg[i], exp_avg_sq[i], adamw, step);
  }
}

EPG_CPU_CLONES void adamw_float32(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t size,
                                  float factor, const AdamW adamw, const TensorStep step) {
  adamw_block(param, grad, exp_avg, exp_avg_sq, size, factor, adamw, step);
}

EPG_CPU_CLONES void adamw_bfloat16(float* param, const uint16_t* grad, float* exp_avg, float* exp_avg_sq, int64_t size,
                                   float factor, const AdamW adamw, const TensorStep step) {
  adamw_block(param, grad, exp_avg, exp_avg_sq, size, factor, adamw, step);
}

EPG_CPU_CLONES void lerp_block(float* __restrict ema, const float* __restrict param, int64_t size, float weight) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    ema[i] = lerp(ema[i], param[i], weight);
  }
}

EPG_CPU_CLONES void copy_bfloat16(uint16_t* __restrict copy, const float* __restrict values, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    copy[i] = to_bfloat16(values[i]);
  }
}

EPG_CPU_CLONES void copy_float16(uint16_t* __restrict copy, const float* __restrict values, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    copy[i] = to_float16(values[i]);
  }
}

template <class T>
T* data(const TensorList& list, size_t i) {
  return static_cast<T*>(list[i].mutable_data_ptr());
}

void fused_adamw_ema_cpu(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                         TensorList emas, TensorList copies, Tensor steps, Tensor lrs, Tensor weight_decays,
                         Tensor ema_weights, Tensor norm, Tensor found_inf, Tensor max_norm,
                         std::optional<Tensor> grad_scale, double beta1, double beta2, double eps) {
  const AdamWEmaLists lists{params, grads, exp_avgs, exp_avg_sqs, emas, copies};
  check_adamw_ema(lists, {steps, lrs, weight_decays, ema_weights, norm, found_inf, max_norm, grad_scale});
  const auto value = [](const Tensor& tensor) { return *static_cast<const float*>(tensor.const_data_ptr()); };
  if (value(found_inf) != 0.0f) {
    return;
  }
  const AdamW adamw = make_adamw(beta1, beta2, eps);
  const float factor = gradient_factor(value(norm), *static_cast<const double*>(max_norm.const_data_ptr()),
                                       grad_scale ? value(*grad_scale) : 1.0f);
  const double* const weights = static_cast<const double*>(ema_weights.const_data_ptr());
  const size_t count = params.size(), averages = static_cast<size_t>(ema_weights.numel());

  std::vector<TensorStep> tensor_steps(count);
  float* const step = static_cast<float*>(steps.mutable_data_ptr());
  for (size_t i = 0; i < count; ++i) {
    step[i] += 1.0f;
    tensor_steps[i] = make_tensor_step(static_cast<const double*>(lrs.const_data_ptr())[i],
                                       static_cast<const double*>(weight_decays.const_data_ptr())[i], step[i], adamw);
  }

  const bool is_float16 = !copies.empty() && copies[0].scalar_type() == ScalarType::Half;
  const auto copy_block = is_float16 ? copy_float16 : copy_bfloat16;
  const auto update = [&](size_t i, int64_t begin, int64_t end) {
    float* const param = data<float>(params, i);
    float* const exp_avg = data<float>(exp_avgs, i);
    float* const exp_avg_sq = data<float>(exp_avg_sqs, i);
    const void* const grad = grads[i].const_data_ptr();
    const bool is_float32 = grads[i].scalar_type() == ScalarType::Float;
    uint16_t* const copy = copies.empty() ? nullptr : data<uint16_t>(copies, i);
    uint16_t* const ema_copy = lists.copies_averages() ? data<uint16_t>(copies, count + i) : nullptr;
    std::array<float*, kMaxEmas> ema{};
    for (size_t k = 0; k < averages; ++k) {
      ema[k] = data<float>(emas, k * count + i);
    }
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t size = std::min(kBlock, end - at);
      if (is_float32) {
        adamw_float32(param + at, static_cast<const float*>(grad) + at, exp_avg + at, exp_avg_sq + at, size, factor,
                      adamw, tensor_steps[i]);
      } else {
        adamw_bfloat16(param + at, static_cast<const uint16_t*>(grad) + at, exp_avg + at, exp_avg_sq + at, size, factor,
                       adamw, tensor_steps[i]);
      }
      for (size_t k = 0; k < averages; ++k) {
        lerp_block(ema[k] + at, param + at, size, static_cast<float>(weights[k]));
      }
      if (copy != nullptr) {
        copy_block(copy + at, param + at, size);
      }
      if (ema_copy != nullptr) {
        copy_block(ema_copy + at, ema[0] + at, size);
      }
    }
  };
  const std::vector<int64_t> offsets = offsets_of(params);
  torch::stable::parallel_for(0, offsets.back(), kGrain, [&](int64_t begin, int64_t end) {
    for_each_part(offsets, begin, end, update);
  });
}

}  // namespace
}  // namespace epg_fast

STABLE_TORCH_LIBRARY_IMPL(epg_fast, CPU, m) { m.impl("fused_adamw_ema_", TORCH_BOX(&epg_fast::fused_adamw_ema_cpu)); }
