// Kernels: registered by name when a library is loaded, launched without effect. Which one a thread launched last is
// remembered, because it shows what a value that is read back next is about.
#include "null.h"

#include <stdlib.h>
#include <string.h>

// Kernels by the address of the host function that stands for each: open addressing, never more than half full.
typedef enum { OTHER, COUNTS_NONZERO, SUMS_UP } Kind;
typedef struct { const void *function; const char *name; Kind kind; } Kernel;
static Kernel *kernels;
static size_t kernels_used, kernels_room;
static pthread_mutex_t kernels_lock = PTHREAD_MUTEX_INITIALIZER;

static __thread const char *last_name = "";
static __thread long long last_count = -1;
static __thread int copied;

static Kernel *slot_of(Kernel *table, size_t room, const void *function) {
  size_t i = ((uintptr_t)function >> 4) * 0x9E3779B97F4A7C15ull & (room - 1);
  while (table[i].function && table[i].function != function) i = (i + 1) & (room - 1);
  return &table[i];
}

static void grow(void) {
  size_t room = kernels_room ? 2 * kernels_room : 1 << 15;
  Kernel *table = calloc(room, sizeof *table);
  if (!table) abort();
  for (size_t i = 0; i < kernels_room; i++)
    if (kernels[i].function) *slot_of(table, room, kernels[i].function) = kernels[i];
  free(kernels);
  kernels = table;
  kernels_room = room;
}

// CUB sums up in one kernel, or in many blocks and then in one kernel over their sums.
static Kind kind_of(const char *name) {
  if (!strstr(name, "DeviceReduce")) return OTHER;
  return strstr(name, "NonZeroOp") ? COUNTS_NONZERO : SUMS_UP;
}

void __cudaRegisterFunction(void **module, const char *function, char *device_function, const char *name) {
  (void)module, (void)device_function;
  pthread_mutex_lock(&kernels_lock);
  if (2 * kernels_used >= kernels_room) grow();
  Kernel *slot = slot_of(kernels, kernels_room, function);
  kernels_used += !slot->function;
  *slot = (Kernel){function, name, kind_of(name)};
  pthread_mutex_unlock(&kernels_lock);
}

static Kernel find_kernel(const void *function) {
  pthread_mutex_lock(&kernels_lock);
  Kernel kernel = kernels_room ? *slot_of(kernels, kernels_room, function) : (Kernel){0};
  pthread_mutex_unlock(&kernels_lock);
  return kernel;
}

// How many elements CUB's reduction goes over: its third argument, of the type that its policy names after the sum's, an int.
static long long elements(const char *name, void *const *arguments) {
  const char *policy = strstr(name, "policy_hubIi");
  if (!policy) policy = strstr(name, "DeviceReducePolicyIi");
  if (!policy || !arguments) return -1;
  switch (strchr(policy, 'I')[2]) {
    case 'i': case 'j': return *(const unsigned *)arguments[2];
    case 'l': case 'm': case 'x': case 'y': return *(const long long *)arguments[2];
    default: return -1;
  }
}

const char *last_kernel(void) { return last_name; }
long long last_counted(void) { return last_count; }
int copied_since(void) { return copied; }
void note_copy(void) { copied = 1; }
void forget_last_kernel(void) {
  last_name = "";
  last_count = -1;
  copied = 0;
}

static int launch(const void *function, void *const *arguments) {
  Kernel kernel = find_kernel(function);
  count_launch();
  last_name = kernel.name ? kernel.name : "";
  copied = 0;
  if (kernel.kind == COUNTS_NONZERO) last_count = elements(kernel.name, arguments);
  if (kernel.kind == OTHER) last_count = -1;
  return fail(the_card()->code ? SUCCESS : NO_KERNEL_IMAGE);
}

// What nvcc's generated code calls when a library with kernels is loaded and unloaded.
static void *module_handle[4];
void **__cudaRegisterFatBinary(void *image) {
  (void)image;
  return module_handle;
}
void __cudaRegisterFatBinaryEnd(void **module) { (void)module; }
void __cudaUnregisterFatBinary(void **module) { (void)module; }
void __cudaRegisterVar(void) {}
char __cudaInitModule(void **module) {
  (void)module;
  return 0;
}

// And for kernel<<<grid, block, shared, stream>>>(…).
static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid, configuration.block = block, configuration.shared = shared, configuration.stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared, *stream = configuration.stream;
  return SUCCESS;
}

int __cudaGetKernel(const void **kernel, const void *function) {
  *kernel = function;
  return SUCCESS;
}
int __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments) {
  (void)grid, (void)block;
  return launch(kernel, arguments);
}
int cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments) {
  (void)grid, (void)block;
  return launch(function, arguments);
}
int cudaLaunchCooperativeKernel(const void *function) { return launch(function, NULL); }
int cudaLaunchKernelExC(const void *settings, const void *function, void **arguments) {
  (void)settings;
  return launch(function, arguments);
}

int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  (void)function;
  const Card *card = the_card();
  *attributes = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 64};
  attributes->ptxVersion = attributes->binaryVersion = card->code; // CUB picks its sizes by what the build holds
  attributes->maxDynamicSharedSizeBytes = card->block_shared_bytes;
  return fail(card->code ? SUCCESS : NO_KERNEL_IMAGE);
}
int cudaFuncSetAttribute(void) { return SUCCESS; }
int cudaFuncSetCacheConfig(void) { return SUCCESS; }
int cudaKernelSetAttributeForDevice(void) { return SUCCESS; }

// Two blocks of anything fit an SM: kernels that size their grid or workspace by this get a number that a real card may not give.
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
  *blocks = 2;
  return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) {
  *blocks = 2;
  return SUCCESS;
}

// Code loaded at run time.
int cudaLibraryLoadData(void **library) { return new_handle(library); }
int cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  (void)library, (void)name;
  return new_handle(kernel);
}
int cudaLibraryUnload(void) { return SUCCESS; }

// Variables on the device are never written, and have addresses of their own below every allocation.
int cudaGetSymbolAddress(void **address, const void *symbol) {
  (void)symbol;
  *address = (void *)0x100000000000;
  return SUCCESS;
}

// The driver's launches: Triton's kernels and those that PyTorch compiles at run time.
static int driver_launch(void) {
  forget_last_kernel();
  count_launch();
  last_name = "a kernel compiled at run time";
  return SUCCESS;
}
int cuLaunchKernel(void) { return driver_launch(); }
int cuLaunchKernelEx(void) { return driver_launch(); }
int cuLaunchCooperativeKernel(void) { return driver_launch(); }
