#pragma once

#include "tensor_list.h"

#include <cfloat>

namespace epg_fast {

// A norm whose square float32 cannot hold counts as not finite: Adam would keep the infinity in its second moment for good.
EPG_HOST_DEVICE float found_inf_of(float norm) { return norm * norm <= FLT_MAX ? 0.0f : 1.0f; }

inline void check_global_norm(const Tensor& norm, const Tensor& found_inf, const TensorList& tensors) {
  constexpr const char* op = "global_norm";
  check_tensor(op, "norm", norm, "norm", norm);
  check_tensor(op, "found_inf", found_inf, "norm", norm);
  STD_TORCH_CHECK(norm.numel() == 1 && found_inf.numel() == 1, op, ": norm and found_inf must hold one value each");
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_tensor(op, {"tensors", i}, tensors[i], "norm", norm, true);
  }
}

}  // namespace epg_fast
