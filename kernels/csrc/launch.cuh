// Launches on CUDA, and what a kernel does as a block. The only file that tests/emulation replaces, to run the kernels of
// this folder on a CPU, one thread after another.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cuda_runtime.h>

#include <cstdint>

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

// Launches kernels on a device's current stream.
class Launcher {
 public:
  Launcher(const char* op, int32_t device) : op_(op), guard_(device), stream_(current_stream(op, device)) {}

  template <class Kernel, class... Arguments>
  void operator()(int64_t blocks, int threads, Kernel kernel, const Arguments&... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, op_, ": launch failed: ", cudaGetErrorString(error));
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// The sum over the block's kThreads threads, in thread 0.
template <int kThreads>
__device__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  }
  if (threadIdx.x % 32 == 0) {
    warps[threadIdx.x / 32] = value;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : 0.0;
    for (int offset = 16; offset > 0; offset /= 2) {
      value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
    }
  }
  return value;
}

}  // namespace epg_fast
