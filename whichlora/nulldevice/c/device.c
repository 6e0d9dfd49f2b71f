// What the card says about itself, versions, and errors.
#include "null.h"

#include <stdio.h>
#include <string.h>

static __thread int last_error;

int fail(int error) {
  if (error) last_error = error;
  return error;
}
int cudaGetLastError(void) {
  int error = last_error;
  last_error = SUCCESS;
  return error;
}
int cudaPeekAtLastError(void) { return last_error; }

const char *cudaGetErrorName(int error) {
  switch (error) {
    case SUCCESS: return "cudaSuccess";
    case INVALID_VALUE: return "cudaErrorInvalidValue";
    case OUT_OF_MEMORY: return "cudaErrorMemoryAllocation";
    case NO_DEVICE: return "cudaErrorNoDevice";
    case INVALID_DEVICE: return "cudaErrorInvalidDevice";
    case NO_KERNEL_IMAGE: return "cudaErrorNoKernelImageForDevice";
    case NOT_SUPPORTED: return "cudaErrorNotSupported";
    default: return "cudaErrorUnknown";
  }
}

const char *cudaGetErrorString(int error) {
  static __thread char text[256];
  switch (error) {
    case SUCCESS: return "no error";
    case INVALID_VALUE: return "invalid argument";
    case OUT_OF_MEMORY: return "out of memory";
    case NO_DEVICE: return "no CUDA-capable device is detected";
    case INVALID_DEVICE: return "invalid device ordinal";
    case NO_KERNEL_IMAGE: return "no kernel image is available for execution on the device";
    case NOT_SUPPORTED:
      snprintf(text, sizeof text, "null device: %s is not implemented", last_missing());
      return text;
    default:
      snprintf(text, sizeof text, "null device: error %d", error);
      return text;
  }
}

// Attributes that are not listed are 0: the card has none of it. Clocks and bus widths, too: nothing here has a speed.
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  const Card *card = the_card();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = card->major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = card->minor; break;
    case cudaDevAttrMultiProcessorCount: *value = card->sm_count; break;
    case cudaDevAttrL2CacheSize: *value = card->l2_bytes; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = card->block_shared_bytes; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = card->sm_shared_bytes; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1 << 10; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = card->sm_threads; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = card->sm_blocks; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxPitch: *value = 2147483647; break;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrManagedMemory: case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrCanMapHostMemory: case cudaDevAttrConcurrentKernels: case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrStreamPrioritiesSupported: case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: *value = 0;
  }
  return SUCCESS;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  (void)device;
  const Card *card = the_card();
  *properties = (struct cudaDeviceProp){
      .totalGlobalMem = card->total_bytes, .sharedMemPerBlock = 48 << 10, .regsPerBlock = 65536, .warpSize = 32,
      .memPitch = 2147483647, .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64},
      .maxGridSize = {2147483647, 65535, 65535}, .totalConstMem = 64 << 10, .major = card->major, .minor = card->minor,
      .textureAlignment = 512, .multiProcessorCount = card->sm_count, .canMapHostMemory = 1, .concurrentKernels = 1,
      .asyncEngineCount = 3, .unifiedAddressing = 1, .l2CacheSize = card->l2_bytes,
      .maxThreadsPerMultiProcessor = card->sm_threads, .streamPrioritiesSupported = 1,
      .sharedMemPerMultiprocessor = (size_t)card->sm_shared_bytes, .regsPerMultiprocessor = 65536, .managedMemory = 1,
      .concurrentManagedAccess = 1, .cooperativeLaunch = 1, .sharedMemPerBlockOptin = (size_t)card->block_shared_bytes,
      .maxBlocksPerMultiProcessor = card->sm_blocks, .reservedSharedMemPerBlock = 1 << 10, .memoryPoolsSupported = 1,
  };
  memcpy(properties->name, card->name, sizeof properties->name);
  return SUCCESS;
}
// CUDA 12's name for the same structure.
int cudaGetDeviceProperties_v2(struct cudaDeviceProp *properties, int device) {
  return cudaGetDeviceProperties(properties, device);
}

int cudaGetDeviceCount(int *count) {
  *count = first_visible() >= 0;
  return fail(*count ? SUCCESS : NO_DEVICE);
}
int cudaGetDevice(int *device) {
  *device = 0;
  return SUCCESS;
}
int cudaSetDevice(int device) { return fail(device == 0 ? SUCCESS : INVALID_DEVICE); }
int cudaDeviceSynchronize(void) {
  wait_for_card();
  return SUCCESS;
}
int cudaDeviceGetPCIBusId(char *text, int length, int device) {
  (void)device;
  snprintf(text, (size_t)length, "0000:00:00.0");
  return SUCCESS;
}
int cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  (void)device, (void)peer;
  *can = 0;
  return SUCCESS;
}
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return SUCCESS;
}

// The driver is as new as the runtime that PyTorch was built with.
int cudaRuntimeGetVersion(int *version) {
  *version = CUDART_VERSION;
  return SUCCESS;
}
int cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return SUCCESS;
}

// Marks for a profiler that is not there.
int cudaProfilerStart(void) { return SUCCESS; }
int cudaProfilerStop(void) { return SUCCESS; }
