// Lists of tensors in one launch: the addresses travel as a kernel parameter, by value, so that a launch needs no copy to
// the device and a captured graph keeps them. Blocks walk over chunks of equal size whatever tensor they lie in.
#pragma once

#include "launch.cuh"
#include "tensor_list.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <memory>

namespace epg_fast {

inline constexpr int64_t kChunk = 16384;  // elements
inline constexpr int kThreads = 512;
inline constexpr int kBlocksPerMultiprocessor = 4;
// Since CUDA 12.1 a kernel takes 32764 bytes of parameters; some are left for the other parameters.
inline constexpr size_t kTableBytes = 32256;

// Rows are tensors, pointers[j][row] is the tensor in list j.
template <int kLists>
struct TensorTable {
  static constexpr int kRowBytes = kLists * sizeof(void*) + sizeof(int64_t) + 2 * sizeof(int32_t) + sizeof(bool);
  static constexpr int kCapacity = static_cast<int>((kTableBytes - 32) / kRowBytes);

  void* pointers[kLists][kCapacity];
  int64_t sizes[kCapacity];
  int32_t tensors[kCapacity];               // place in the lists
  int32_t chunks_before[kCapacity + 1];     // chunks in the rows before
  bool bfloat16[kCapacity];                 // whether the gradient (or the value, in a single list) is bfloat16
  int32_t rows;

  __host__ __device__ int32_t chunks() const { return chunks_before[rows]; }
};

// Fills tables with the tensors that are not empty and calls launch(table) for each; describe(i, pointers) gives the
// addresses of tensor i in the lists and returns whether it is bfloat16.
template <int kLists, class Describe, class Launch>
void for_each_table(const TensorList& tensors, const Describe& describe, const Launch& launch) {
  const auto table = std::make_unique<TensorTable<kLists>>();
  table->rows = 0;
  table->chunks_before[0] = 0;
  const auto flush = [&] {
    if (table->rows > 0) {
      launch(*table);
    }
    table->rows = 0;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t size = tensors[i].numel();
    if (size == 0) {
      continue;
    }
    const int row = table->rows++;
    void* pointers[kLists];
    table->bfloat16[row] = describe(i, pointers);
    for (int list = 0; list < kLists; ++list) {
      table->pointers[list][row] = pointers[list];
    }
    table->sizes[row] = size;
    table->tensors[row] = static_cast<int32_t>(i);
    table->chunks_before[row + 1] = table->chunks_before[row] + static_cast<int32_t>((size + kChunk - 1) / kChunk);
    if (table->rows == TensorTable<kLists>::kCapacity) {
      flush();
    }
  }
  flush();
}

inline int grid_for(int32_t chunks, int32_t device) {
  int multiprocessors = 0;
  STD_TORCH_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess,
                  "the number of multiprocessors of device ", device, " cannot be read");
  return std::min(chunks, kBlocksPerMultiprocessor * multiprocessors);
}

// The row that a chunk lies in: the last one with chunks_before <= chunk.
template <int kLists>
__device__ __forceinline__ int row_of(const TensorTable<kLists>& table, int32_t chunk) {
  int low = 0, high = table.rows;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.chunks_before[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

// Every value is used once per launch: the loads and stores ask the caches to let go of it first.
__device__ __forceinline__ void load4(const float* from, float (&to)[4]) {
  const float4 values = __ldcs(reinterpret_cast<const float4*>(from));
  to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
}

__device__ __forceinline__ void load4(const __nv_bfloat16* from, float (&to)[4]) {
  const uint2 values = __ldcs(reinterpret_cast<const uint2*>(from));
  to[0] = __uint_as_float(values.x << 16), to[1] = __uint_as_float(values.x & 0xFFFF0000u);
  to[2] = __uint_as_float(values.y << 16), to[3] = __uint_as_float(values.y & 0xFFFF0000u);
}

__device__ __forceinline__ void store4(float* to, const float (&from)[4]) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
}

__device__ __forceinline__ void store4(__nv_bfloat16* to, const float (&from)[4]) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(from[0], from[1]), high = __floats2bfloat162_rn(from[2], from[3]);
  uint2 bits;
  memcpy(&bits.x, &low, sizeof(low));
  memcpy(&bits.y, &high, sizeof(high));
  *reinterpret_cast<uint2*>(to) = bits;
}

__device__ __forceinline__ void store4(__half* to, const float (&from)[4]) {
  const __half2 low = __floats2half2_rn(from[0], from[1]), high = __floats2half2_rn(from[2], from[3]);
  uint2 bits;
  memcpy(&bits.x, &low, sizeof(low));
  memcpy(&bits.y, &high, sizeof(high));
  *reinterpret_cast<uint2*>(to) = bits;
}

}  // namespace epg_fast
