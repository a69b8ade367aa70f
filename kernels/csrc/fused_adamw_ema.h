#pragma once

#include "tensor_list.h"

#include <cmath>
#include <optional>

namespace epg_fast {

inline constexpr size_t kMaxEmas = 4;

// What all tensors have in common in one update.
struct AdamW {
  float beta1;
  float beta2;
  float one_minus_beta1;
  float one_minus_beta2;
  float eps;
  double double_beta1;
  double double_beta2;
};

// What one tensor adds: its learning rate, decay and step count, with the bias corrections worked in.
struct TensorStep {
  float step_size;         // lr / (1 - beta1^step)
  float decay;             // 1 - lr * weight_decay
  float inverse_root;      // 1 / sqrt(1 - beta2^step)
};

inline AdamW make_adamw(double beta1, double beta2, double eps) {
  return {static_cast<float>(beta1),     static_cast<float>(beta2), static_cast<float>(1.0 - beta1),
          static_cast<float>(1.0 - beta2), static_cast<float>(eps),   beta1,
          beta2};
}

EPG_HOST_DEVICE TensorStep make_tensor_step(double lr, double weight_decay, double step, const AdamW& adamw) {
  return {static_cast<float>(lr / (1.0 - pow(adamw.double_beta1, step))), static_cast<float>(1.0 - lr * weight_decay),
          static_cast<float>(1.0 / sqrt(1.0 - pow(adamw.double_beta2, step)))};
}

// What the gradients are multiplied by: unscaled, and clipped as torch.nn.utils.clip_grad_norm_ does.
EPG_HOST_DEVICE float gradient_factor(float norm, double max_norm, float grad_scale) {
  const double clip = max_norm / (static_cast<double>(norm) / grad_scale + 1e-6);
  return static_cast<float>((clip > 1.0 ? 1.0 : clip) / grad_scale);  // NaN stays
}

// As torch.lerp: exactly `start` at weight 0 and exactly `end` at weight 1.
EPG_HOST_DEVICE float lerp(float start, float end, float weight) {
  return weight < 0.5f ? start + weight * (end - start) : end - (end - start) * (1.0f - weight);
}

EPG_HOST_DEVICE void adamw_step(float& param, float grad, float& exp_avg, float& exp_avg_sq, const AdamW& adamw,
                                const TensorStep& step) {
  exp_avg = lerp(exp_avg, grad, adamw.one_minus_beta1);
  exp_avg_sq = exp_avg_sq * adamw.beta2 + grad * grad * adamw.one_minus_beta2;
  param = param * step.decay - step.step_size * exp_avg / (sqrtf(exp_avg_sq) * step.inverse_root + adamw.eps);
}

struct AdamWEmaLists {
  const TensorList& params;
  const TensorList& grads;
  const TensorList& exp_avgs;
  const TensorList& exp_avg_sqs;
  const TensorList& emas;  // one per parameter and average: the first average of all parameters, then the second ...
  // In 16 bits: of all parameters, or of all parameters and then of the first average, or none. One without elements is
  // not wanted.
  const TensorList& copies;

  bool copies_averages() const { return copies.size() > params.size(); }
};

// One value or one per tensor, on the device of the parameters.
struct AdamWEmaScalars {
  const Tensor& steps;
  const Tensor& lrs;
  const Tensor& weight_decays;
  const Tensor& ema_weights;
  const Tensor& norm;
  const Tensor& found_inf;
  const Tensor& max_norm;
  const std::optional<Tensor>& grad_scale;
};

inline void check_adamw_ema(const AdamWEmaLists& lists, const AdamWEmaScalars& scalars) {
  constexpr const char* op = "fused_adamw_ema_";
  const size_t count = lists.params.size();
  const size_t emas = static_cast<size_t>(scalars.ema_weights.numel());
  STD_TORCH_CHECK(emas <= kMaxEmas, op, ": ema_weights holds ", emas, " values, wanted at most ", kMaxEmas);
  const auto check_scalars = [&](const char* name, const Tensor& tensor, ScalarType dtype, size_t size) {
    const char* const wanted = dtype == ScalarType::Float ? "float32" : "float64";
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " must be ", wanted);
    STD_TORCH_CHECK(static_cast<size_t>(tensor.numel()) == size, op, ": ", name, " must hold ", size, " values, has ",
                    tensor.numel());
    check_contiguous(op, name, tensor);
    check_same_device(op, name, tensor, "steps", scalars.steps);
  };
  const auto check_length = [&](const char* name, const TensorList& list, size_t wanted) {
    STD_TORCH_CHECK(list.size() == wanted, op, ": ", name, " has ", list.size(), " tensors, wanted ", wanted);
  };
  check_scalars("steps", scalars.steps, ScalarType::Float, count);
  check_scalars("lrs", scalars.lrs, ScalarType::Double, count);
  check_scalars("weight_decays", scalars.weight_decays, ScalarType::Double, count);
  check_scalars("ema_weights", scalars.ema_weights, ScalarType::Double, emas);
  check_scalars("norm", scalars.norm, ScalarType::Float, 1);
  check_scalars("found_inf", scalars.found_inf, ScalarType::Float, 1);
  check_scalars("max_norm", scalars.max_norm, ScalarType::Double, 1);
  if (scalars.grad_scale) {
    check_scalars("grad_scale", *scalars.grad_scale, ScalarType::Float, 1);
  }
  check_length("grads", lists.grads, count);
  check_length("exp_avgs", lists.exp_avgs, count);
  check_length("exp_avg_sqs", lists.exp_avg_sqs, count);
  check_length("emas", lists.emas, count * emas);
  if (!lists.copies.empty()) {
    const bool averages = emas > 0 && lists.copies_averages();
    check_length("copies", lists.copies, averages ? 2 * count : count);
  }

  const auto check = [&](const char* name, const TensorList& list, bool bfloat16_too) {
    for (size_t i = 0; i < list.size(); ++i) {
      STD_TORCH_CHECK(&list == &lists.params || list[i].numel() == 0 ||
                          list[i].const_data_ptr() != lists.params[i % count].const_data_ptr(),
                      op, ": ", name, "[", i, "] must not share its memory with params");
      check_tensor(op, {name, i}, list[i], "steps", scalars.steps, bfloat16_too);
      check_same_shape(op, {name, i}, list[i], "params", lists.params[i % count]);
    }
  };
  check("params", lists.params, false);
  check("grads", lists.grads, true);
  check("exp_avgs", lists.exp_avgs, false);
  check("exp_avg_sqs", lists.exp_avg_sqs, false);
  check("emas", lists.emas, false);
  for (size_t i = 0; i < lists.copies.size(); ++i) {
    const Tensor& copy = lists.copies[i];
    const ScalarType dtype = copy.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, ": copies[", i,
                    "] must be bfloat16 or float16");
    STD_TORCH_CHECK(dtype == lists.copies[0].scalar_type(), op, ": copies[", i, "] must have the dtype of copies[0]");
    if (copy.numel() > 0) {
      check_contiguous(op, {"copies", i}, copy);
      check_same_device(op, {"copies", i}, copy, "steps", scalars.steps);
      check_same_shape(op, {"copies", i}, copy, "params", lists.params[i % count]);
    }
  }
}

}  // namespace epg_fast
