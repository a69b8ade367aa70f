#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Half.h>

using __half = c10::Half;
struct __half2 {
  __half x, y;
};
inline __half __float2half_rn(float value) { return __half(value); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
