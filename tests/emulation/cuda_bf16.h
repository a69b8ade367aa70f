#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>

using __nv_bfloat16 = c10::BFloat16;
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
