// What every operation of the extension uses to launch on CUDA.
#pragma once

#include "common.h"

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>

// Only a CUDA build of libtorch has this symbol; weak, so that the library also loads in a CPU build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace epg_fast {

inline cudaStream_t current_stream(const char* op, int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                      aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  op, ": this PyTorch has no CUDA stream to launch on");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": launch failed: ", cudaGetErrorString(error));
}

inline bool aligned(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// How an element-wise kernel on float32 covers `size` elements: the first 4 * vectors in 16-byte accesses, the rest one by
// one, both in grid-stride loops.
struct ElementwiseLaunch {
  static constexpr int kThreads = 256;
  static constexpr int64_t kMaxBlocks = 4096;

  int64_t vectors;
  unsigned blocks;

  ElementwiseLaunch(int64_t size, std::initializer_list<const void*> pointers) {
    const bool wide = std::all_of(pointers.begin(), pointers.end(), [](const void* p) { return aligned(p, 16); });
    vectors = wide ? size / 4 : 0;
    const int64_t items = wide ? (size + 3) / 4 : size;
    blocks = static_cast<unsigned>(std::min(kMaxBlocks, (items + kThreads - 1) / kThreads));
  }
};

}  // namespace epg_fast
