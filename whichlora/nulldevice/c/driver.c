// libcuda, for those who open it themselves (Triton) or ask the runtime for its functions (PyTorch).
#define _GNU_SOURCE
#include "null.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

int cudaDeviceGetAttribute(int *value, int attribute, int device);
int cudaDriverGetVersion(int *version);
int cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes);
int cudaMalloc(void **pointer, size_t bytes);
int cudaMallocManaged(void **pointer, size_t bytes, unsigned flags);
int cudaFree(void *pointer);
int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags);
int cudaFreeHost(void *pointer);
const char *cudaGetErrorName(int error);
const char *cudaGetErrorString(int error);

int cuInit(unsigned flags) {
  (void)flags;
  return SUCCESS;
}
int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuGetErrorName(int error, const char **text) {
  *text = cudaGetErrorName(error);
  return SUCCESS;
}
int cuGetErrorString(int error, const char **text) {
  *text = cudaGetErrorString(error);
  return SUCCESS;
}

int cuDeviceGetCount(int *count) {
  *count = first_visible() >= 0;
  return SUCCESS;
}
int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetName(char *text, int length, int device) {
  (void)device;
  snprintf(text, (size_t)length, "%s", the_card()->name);
  return SUCCESS;
}
int cuDeviceGetUuid(char *uuid, int device) {
  (void)device;
  memset(uuid, 0, 16);
  return SUCCESS;
}
int cuDeviceGetUuid_v2(char *uuid, int device) { return cuDeviceGetUuid(uuid, device); }
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  (void)device;
  *bytes = the_card()->total_bytes;
  return SUCCESS;
}
// The runtime numbers attributes as the driver does.
int cuDeviceGetAttribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }

// The driver's private tables, which NVRTC can do without.
int cuGetExportTable(void) { return NOT_FOUND; }

// A log of errors, which nothing is written to.
int cuLogsRegisterCallback(void) { return SUCCESS; }
int cuLogsUnregisterCallback(void) { return SUCCESS; }

// One context, always there and always current.
static void *const context = (void *)16;
static int get_context(void **current) {
  *current = context;
  return SUCCESS;
}
int cuCtxGetCurrent(void **current) { return get_context(current); }
int cuDevicePrimaryCtxRetain(void **current) { return get_context(current); }
int cuCtxPopCurrent_v2(void **current) { return current ? get_context(current) : SUCCESS; }
int cuCtxPushCurrent_v2(void) { return SUCCESS; }
int cuCtxSetCurrent(void) { return SUCCESS; }
int cuCtxSynchronize(void) {
  wait_for_card();
  return SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(void) { return SUCCESS; }
int cuCtxGetDevice(int *device) {
  *device = 0;
  return SUCCESS;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  (void)device;
  *flags = 0;
  *active = 1;
  return SUCCESS;
}

// Code: anything loads, every function is in it, nothing of it runs.
int cuModuleLoad(void **module) { return new_handle(module); }
int cuModuleLoadData(void **module) { return new_handle(module); }
int cuModuleLoadDataEx(void **module) { return new_handle(module); }
int cuModuleUnload(void) { return SUCCESS; }
int cuModuleGetFunction(void **function) { return new_handle(function); }
int cuLibraryLoadData(void **library) { return new_handle(library); }
int cuLibraryUnload(void) { return SUCCESS; }
int cuLibraryGetKernel(void **kernel) { return new_handle(kernel); }
int cuKernelGetFunction(void **function) { return new_handle(function); }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  (void)function;
  enum { MAX_THREADS_PER_BLOCK = 0, NUM_REGS = 4 };
  *value = attribute == MAX_THREADS_PER_BLOCK ? 1024 : attribute == NUM_REGS ? 64 : 0;
  return SUCCESS;
}
int cuFuncSetAttribute(void) { return SUCCESS; }
int cuFuncSetCacheConfig(void) { return SUCCESS; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
  *blocks = 2;
  return SUCCESS;
}
int cuOccupancyMaxActiveClusters(int *clusters) {
  *clusters = the_card()->sm_count;
  return SUCCESS;
}
int cuTensorMapEncodeTiled(void) { return SUCCESS; } // describes a tensor to a kernel that will not run

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes) { return cudaMemGetInfo(free_bytes, total_bytes); }
int cuMemAlloc_v2(void **pointer, size_t bytes) { return cudaMalloc(pointer, bytes); }
int cuMemFree_v2(void *pointer) { return cudaFree(pointer); }
int cuMemAllocManaged(void **pointer, size_t bytes, unsigned flags) { return cudaMallocManaged(pointer, bytes, flags); }
int cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) { return cudaHostAlloc(pointer, bytes, flags); }
int cuMemFreeHost(void *pointer) { return cudaFreeHost(pointer); }

// Triton asks for the device's view of a pointer, to refuse those of the host.
int cuPointerGetAttribute(void *value, int attribute, const void *pointer) {
  enum { MEMORY_TYPE = 2, DEVICE_POINTER = 3, DEVICE_ORDINAL = 9, TYPE_HOST = 1, TYPE_DEVICE = 2 };
  if (!is_device(pointer) && !is_managed(pointer) && !is_pinned(pointer)) return INVALID_VALUE;
  switch (attribute) {
    case MEMORY_TYPE: *(int *)value = is_pinned(pointer) ? TYPE_HOST : TYPE_DEVICE; return SUCCESS;
    case DEVICE_POINTER: *(const void **)value = pointer; return SUCCESS;
    case DEVICE_ORDINAL: *(int *)value = 0; return SUCCESS;
    default: return missing("cuPointerGetAttribute for that attribute", NOT_SUPPORTED);
  }
}

// The runtime's ways to ask for a function of the driver by its name, which means the newest of that name.
static int find(const char *name, void **function, int *status) {
  char newer[128];
  snprintf(newer, sizeof newer, "%s_v2", name);
  *function = dlsym(RTLD_DEFAULT, newer);
  if (!*function) *function = dlsym(RTLD_DEFAULT, name);
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return SUCCESS;
}
int cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, int *status) {
  (void)flags;
  return find(name, function, status);
}
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
  (void)version, (void)flags;
  return find(name, function, status);
}
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
  (void)version, (void)flags;
  find(name, function, status);
  return *function ? SUCCESS : NOT_FOUND;
}
