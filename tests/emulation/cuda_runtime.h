// As much of CUDA's run-time as the kernels use. A vector access at an address that a GPU would refuse aborts.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#define __device__
#define __forceinline__ inline
#define __global__ static
#define __grid_constant__
#define __host__
#define __launch_bounds__(threads)

struct Dimensions {
  unsigned x = 1;
};
inline thread_local Dimensions threadIdx, blockIdx, blockDim, gridDim;

constexpr int cudaSuccess = 0;
constexpr int cudaDevAttrMultiProcessorCount = 0;
inline int cudaDeviceGetAttribute(int* value, int, int) {
  *value = 3;
  return cudaSuccess;
}

using std::min;

template <class T>
T& vector_at(T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    std::fprintf(stderr, "an access of %zu bytes at an address that is no multiple of it\n", sizeof(T));
    std::abort();
  }
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return vector_at(address);
}
template <class T>
void __stcs(T* address, T value) {
  vector_at(address) = value;
}

struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
