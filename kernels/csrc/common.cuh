// What every operation of the extension uses to launch on CUDA.
#pragma once

#include "common.h"

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

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

}  // namespace epg_fast
