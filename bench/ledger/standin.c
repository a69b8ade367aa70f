// The part of the CUDA runtime, and of its driver, that PyTorch asks about a GPU, answered for one H200 that is not there.
// Preloaded before the real runtime it makes C++ decide as it would on that GPU (which attention, which product). What
// would touch a GPU (memory, launches, events) is not answered here, so that nothing can seem to run.
#include <cuda_runtime_api.h>

#include <stddef.h>
#include <stdio.h>
#include <string.h>

#ifdef cudaGetDeviceProperties
#undef cudaGetDeviceProperties
#endif

// What the GPU is, once: attribute, value, and the property of that name. {0} properties have none.
#define FACTS(fact)                                                          \
  fact(cudaDevAttrComputeCapabilityMajor, major, 9)                          \
  fact(cudaDevAttrComputeCapabilityMinor, minor, 0)                          \
  fact(cudaDevAttrMultiProcessorCount, multiProcessorCount, 132)             \
  fact(cudaDevAttrWarpSize, warpSize, 32)                                    \
  fact(cudaDevAttrMaxThreadsPerBlock, maxThreadsPerBlock, 1024)              \
  fact(cudaDevAttrMaxThreadsPerMultiProcessor, maxThreadsPerMultiProcessor, 2048) \
  fact(cudaDevAttrMaxBlocksPerMultiprocessor, maxBlocksPerMultiProcessor, 32) \
  fact(cudaDevAttrMaxRegistersPerBlock, regsPerBlock, 65536)                 \
  fact(cudaDevAttrMaxRegistersPerMultiprocessor, regsPerMultiprocessor, 65536) \
  fact(cudaDevAttrMaxSharedMemoryPerBlock, sharedMemPerBlock, 48 << 10)      \
  fact(cudaDevAttrMaxSharedMemoryPerBlockOptin, sharedMemPerBlockOptin, 227 << 10) \
  fact(cudaDevAttrMaxSharedMemoryPerMultiprocessor, sharedMemPerMultiprocessor, 228 << 10) \
  fact(cudaDevAttrReservedSharedMemoryPerBlock, reservedSharedMemPerBlock, 1 << 10) \
  fact(cudaDevAttrL2CacheSize, l2CacheSize, 60 << 20)                        \
  fact(cudaDevAttrGlobalMemoryBusWidth, memoryBusWidth, 6144)                \
  fact(cudaDevAttrUnifiedAddressing, unifiedAddressing, 1)                   \
  fact(cudaDevAttrConcurrentKernels, concurrentKernels, 1)

static const int kBlocks[3] = {1024, 1024, 64}, kGrid[3] = {2147483647, 65535, 65535};

#define SUCCEED return cudaSuccess

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  (void)device;
#define ANSWER(name, property, number) case name: *value = (number); SUCCEED;
  switch (attribute) {
    FACTS(ANSWER)
    default: *value = 0; SUCCEED;
  }
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *known, int device) {
  (void)device;
  memset(known, 0, sizeof *known);
  snprintf(known->name, sizeof known->name, "NVIDIA H200 (counted, not there)");
  known->totalGlobalMem = 141ul << 30;
  memcpy(known->maxThreadsDim, kBlocks, sizeof kBlocks);
  memcpy(known->maxGridSize, kGrid, sizeof kGrid);
#define FILL(name, property, number) known->property = (number);
  FACTS(FILL)
  SUCCEED;
}
cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *known, int device) {
  return cudaGetDeviceProperties(known, device);
}

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; SUCCEED; }
cudaError_t cudaGetDevice(int *device) { *device = 0; SUCCEED; }
cudaError_t cudaSetDevice(int device) { (void)device; SUCCEED; }
cudaError_t cudaInitDevice(int device, unsigned flags, unsigned more) { (void)device, (void)flags, (void)more; SUCCEED; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; SUCCEED; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) { (void)one, (void)other; *can = 0; SUCCEED; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0, *most = -5; SUCCEED; }
cudaError_t cudaGetLastError(void) { SUCCEED; }
cudaError_t cudaPeekAtLastError(void) { SUCCEED; }

// Streams are numbers, and nothing is being captured.
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  static size_t number = 1;
  (void)flags, (void)priority;
  *stream = (cudaStream_t)(0x1000 + number++);
  SUCCEED;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  (void)stream;
  *status = cudaStreamCaptureStatusNone;
  SUCCEED;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { (void)mode; SUCCEED; }

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  (void)graph, (void)nodes, (void)edges;
  if (id) *id = 0;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
// Nothing is under way: events are numbers, too, and have happened.
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  static size_t number = 1;
  (void)flags;
  *event = (cudaEvent_t)(0x1000 + number++);
  SUCCEED;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { (void)event, (void)stream; SUCCEED; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  (void)event, (void)stream, (void)flags;
  SUCCEED;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { (void)event; SUCCEED; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { (void)event; SUCCEED; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { (void)event; SUCCEED; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  (void)stream, (void)event, (void)flags;
  SUCCEED;
}
cudaError_t cudaDeviceSynchronize(void) { SUCCEED; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { (void)stream; SUCCEED; }

// Of the driver PyTorch looks functions up by name; this library carries its name, and each lookup is answered.
static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  (void)name, (void)version, (void)flags;
  *found = (void *)nothing;
  if (result) *result = cudaDriverEntryPointSuccess;
  SUCCEED;
}
int cuInit(unsigned flags) { (void)flags; return 0; }
int cuDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { (void)device; *flags = 0, *active = 1; return 0; }
