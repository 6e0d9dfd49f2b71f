// libnvidia-ml: what the card holds and who holds it. This process is alone on it, so what is used is its own.
#include "null.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { NVML_INSUFFICIENT_SIZE = 7, NVML_NOT_SUPPORTED = 3 };
static int the_only_device;

static unsigned long long used_bytes(void) { return the_card()->context_bytes + device_account.used; }

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlInit(void) { return SUCCESS; }
int nvmlInitWithFlags(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int error) {
  return error == SUCCESS ? "Success" : error == NVML_NOT_SUPPORTED ? "Not Supported by the null device" : "Invalid Argument";
}
int nvmlSystemGetCudaDriverVersion(int *version) {
  *version = CUDART_VERSION;
  return SUCCESS;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }
int nvmlSystemGetDriverVersion(char *text, unsigned length) {
  snprintf(text, length, "null");
  return SUCCESS;
}

// NVML counts all cards, whatever CUDA_VISIBLE_DEVICES says. PyTorch looks that up in it, so there are enough, but none more.
int nvmlDeviceGetCount(unsigned *count) {
  *count = (unsigned)(first_visible() + 1);
  return SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned *count) { return nvmlDeviceGetCount(count); }
int nvmlDeviceGetHandleByIndex(unsigned index, void **device) {
  (void)index;
  *device = &the_only_device;
  return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { return nvmlDeviceGetHandleByIndex(index, device); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) {
  (void)id;
  return nvmlDeviceGetHandleByIndex(0, device);
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { return nvmlDeviceGetHandleByPciBusId_v2(uuid, device); }
int nvmlDeviceGetIndex(void *device, unsigned *index) {
  (void)device;
  *index = 0;
  return SUCCESS;
}
int nvmlDeviceGetName(void *device, char *text, unsigned length) {
  (void)device;
  snprintf(text, length, "%s", the_card()->name);
  return SUCCESS;
}
int nvmlDeviceGetUUID(void *device, char *text, unsigned length) {
  (void)device;
  snprintf(text, length, "GPU-00000000-0000-0000-0000-000000000000");
  return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  (void)device;
  *major = the_card()->major;
  *minor = the_card()->minor;
  return SUCCESS;
}

typedef struct { unsigned long long total, free, used; } MemoryInfo;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryInfo_v2;
int nvmlDeviceGetMemoryInfo(void *device, MemoryInfo *memory) {
  (void)device;
  unsigned long long total = the_card()->total_bytes, used = used_bytes();
  *memory = (MemoryInfo){total, total - used, used};
  return SUCCESS;
}
int nvmlDeviceGetMemoryInfo_v2(void *device, MemoryInfo_v2 *memory) {
  (void)device;
  unsigned long long total = the_card()->total_bytes, used = used_bytes();
  *memory = (MemoryInfo_v2){memory->version, total, 0, total - used, used};
  return SUCCESS;
}

// The versions differ in what they say of each process: its id and bytes first, then two instance ids.
typedef struct { unsigned pid; unsigned long long used; } Process;
typedef struct { unsigned pid; unsigned long long used; unsigned instances[2]; } Process_v2;
static int room_for_one(unsigned *count) {
  unsigned room = *count;
  *count = 1;
  return room ? SUCCESS : NVML_INSUFFICIENT_SIZE;
}
int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, Process *processes) {
  (void)device;
  int error = room_for_one(count);
  if (!error) *processes = (Process){(unsigned)getpid(), used_bytes()};
  return error;
}
int nvmlDeviceGetComputeRunningProcesses_v2(void *device, unsigned *count, Process_v2 *processes) {
  (void)device;
  int error = room_for_one(count);
  if (!error) *processes = (Process_v2){(unsigned)getpid(), used_bytes(), {~0u, ~0u}};
  return error;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, Process_v2 *processes) {
  return nvmlDeviceGetComputeRunningProcesses_v2(device, count, processes);
}

// The card is on no fabric: nvmlGpuFabricInfoV_t's version, then an id, a status, a clique and the state, all 0 for that.
int nvmlDeviceGetGpuFabricInfoV(void *device, char *information) {
  (void)device;
  enum { VERSION_BYTES = 4, REST_BYTES = 16 + 4 + 4 + 1 };
  memset(information + VERSION_BYTES, 0, REST_BYTES);
  return SUCCESS;
}

// NVML's own way to say that a card does not tell; nothing here is measured.
int nvmlDeviceGetUtilizationRates(void) { return NVML_NOT_SUPPORTED; }
int nvmlDeviceGetTemperature(void) { return NVML_NOT_SUPPORTED; }
int nvmlDeviceGetPowerUsage(void) { return NVML_NOT_SUPPORTED; }
int nvmlDeviceGetClockInfo(void) { return NVML_NOT_SUPPORTED; }
