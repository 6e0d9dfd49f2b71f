// Memory: what is allocated, where, and of which kind. No device memory exists: an address on the card is a number.
//
// Three ranges of addresses, each cut into pages of 2 MiB: the device's, which nothing backs (touching one from the host
// faults, as on a real card), and those of managed and pinned memory, which are host pages that the kernel provides when touched.
#define _GNU_SOURCE
#include "null.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define OTHER_PAGES ((size_t)1 << 22)

// taken[i] is how many pages the allocation that starts at page i has, 0 where none starts. That is table of sizes and map of
// free space in one: finding a size is one look-up, and a walk from one allocation's end sees every other one at its start.
typedef struct {
  uintptr_t base;
  size_t pages, next; // where the last search ended: addresses are reused only once all have been used
  uint32_t *taken;
} Range;

static uint32_t device_taken[DEVICE_PAGES], managed_taken[OTHER_PAGES], pinned_taken[OTHER_PAGES];
static Range device = {0x100000000000, DEVICE_PAGES, 1, device_taken}; // page 0 is where symbols live
static Range managed = {0x300000000000, OTHER_PAGES, 0, managed_taken};
static Range pinned = {0x380000000000, OTHER_PAGES, 0, pinned_taken};

pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
Account device_account, managed_account, pinned_account;

static size_t pages_of(size_t bytes) { return (bytes + PAGE_BYTES - 1) / PAGE_BYTES; }

static uintptr_t take(Range *range, size_t bytes) {
  size_t wanted = pages_of(bytes), page = range->next, free_pages = 0;
  for (int wraps = 0; wraps < 2;) {
    if (page >= range->pages) { page = range == &device ? 1 : 0; free_pages = 0; wraps++; continue; }
    if (range->taken[page]) { page += range->taken[page]; free_pages = 0; continue; }
    page++;
    if (++free_pages < wanted) continue;
    range->next = page;
    range->taken[page - wanted] = (uint32_t)wanted;
    return range->base + (page - wanted) * PAGE_BYTES;
  }
  return 0;
}

static int within(const Range *range, uintptr_t address) {
  return address >= range->base && address < range->base + range->pages * PAGE_BYTES;
}

static size_t give_back(Range *range, uintptr_t address) {
  if (!within(range, address) || (address - range->base) % PAGE_BYTES) return 0;
  uint32_t *taken = &range->taken[(address - range->base) / PAGE_BYTES];
  size_t bytes = *taken * PAGE_BYTES;
  *taken = 0;
  return bytes;
}

// Host memory that somebody else allocated and had pinned: a handful of ranges.
typedef struct { uintptr_t start, end; } Registered;
static Registered registered[1024];
static size_t registered_used;

static int is_registered(uintptr_t address) {
  for (size_t i = 0; i < registered_used; i++)
    if (address >= registered[i].start && address < registered[i].end) return 1;
  return 0;
}

int is_device(const void *pointer) { return within(&device, (uintptr_t)pointer); }
int is_managed(const void *pointer) { return within(&managed, (uintptr_t)pointer); }
int is_pinned(const void *pointer) { return within(&pinned, (uintptr_t)pointer) || is_registered((uintptr_t)pointer); }
uintptr_t take_addresses(size_t bytes) { return take(&device, bytes); }
size_t return_addresses(uintptr_t address) { return give_back(&device, address); }
size_t device_page(uintptr_t address) { return (address - device.base) / PAGE_BYTES; }

static void add(Account *account, size_t bytes) {
  account->used += bytes;
  if (account->used > account->peak) account->peak = account->used;
}

int charge(size_t bytes) {
  const Card *card = the_card();
  if (card->context_bytes + device_account.used + bytes > card->total_bytes) return OUT_OF_MEMORY;
  add(&device_account, bytes);
  return SUCCESS;
}

void refund(size_t bytes) { device_account.used -= bytes; }

int cudaMalloc(void **pointer, size_t bytes) {
  *pointer = NULL;
  if (!bytes) return SUCCESS;
  size_t rounded = pages_of(bytes) * PAGE_BYTES;
  pthread_mutex_lock(&memory_lock);
  int error = charge(rounded);
  if (!error && !(*pointer = (void *)take(&device, rounded))) {
    refund(rounded);
    error = OUT_OF_MEMORY;
  }
  pthread_mutex_unlock(&memory_lock);
  return fail(error);
}

// Host pages at addresses of ours, so that a pointer tells its kind. They cost nothing until somebody writes to them.
static int map_host(Range *range, Account *account, void **pointer, size_t bytes) {
  *pointer = NULL;
  if (!bytes) return SUCCESS;
  size_t rounded = pages_of(bytes) * PAGE_BYTES;
  pthread_mutex_lock(&memory_lock);
  uintptr_t address = take(range, bytes);
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
  void *mapped = address ? mmap((void *)address, rounded, PROT_READ | PROT_WRITE, flags, -1, 0) : MAP_FAILED;
  if (mapped == (void *)address) {
    *pointer = mapped;
    add(account, rounded);
  } else if (address) {
    if (mapped != MAP_FAILED) munmap(mapped, rounded);
    give_back(range, address);
  }
  pthread_mutex_unlock(&memory_lock);
  return fail(*pointer ? SUCCESS : OUT_OF_MEMORY);
}

static int unmap_host(Range *range, Account *account, void *pointer) {
  pthread_mutex_lock(&memory_lock);
  size_t bytes = give_back(range, (uintptr_t)pointer);
  account->used -= bytes;
  if (bytes) munmap(pointer, bytes);
  pthread_mutex_unlock(&memory_lock);
  return fail(bytes || !pointer ? SUCCESS : INVALID_VALUE);
}

int cudaMallocManaged(void **pointer, size_t bytes, unsigned flags) {
  (void)flags;
  return map_host(&managed, &managed_account, pointer, bytes);
}

int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  (void)flags;
  return map_host(&pinned, &pinned_account, pointer, bytes);
}
int cudaMallocHost(void **pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, 0); }
int cudaFreeHost(void *pointer) { return unmap_host(&pinned, &pinned_account, pointer); }

int cudaHostRegister(void *pointer, size_t bytes, unsigned flags) {
  (void)flags;
  uintptr_t start = (uintptr_t)pointer;
  pthread_mutex_lock(&memory_lock);
  int fits = registered_used < sizeof registered / sizeof *registered;
  if (fits) registered[registered_used++] = (Registered){start, start + bytes};
  pthread_mutex_unlock(&memory_lock);
  return fail(fits ? SUCCESS : OUT_OF_MEMORY);
}

int cudaHostUnregister(void *pointer) {
  int error = INVALID_VALUE;
  pthread_mutex_lock(&memory_lock);
  for (size_t i = registered_used; i-- > 0 && error;)
    if (registered[i].start == (uintptr_t)pointer) {
      registered[i] = registered[--registered_used];
      error = SUCCESS;
    }
  pthread_mutex_unlock(&memory_lock);
  return fail(error);
}

int cudaFree(void *pointer) {
  if (!pointer) return SUCCESS;
  if (is_managed(pointer)) return unmap_host(&managed, &managed_account, pointer);
  pthread_mutex_lock(&memory_lock);
  size_t bytes = give_back(&device, (uintptr_t)pointer);
  refund(bytes);
  pthread_mutex_unlock(&memory_lock);
  return fail(bytes ? SUCCESS : INVALID_VALUE);
}

int cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  const Card *card = the_card();
  pthread_mutex_lock(&memory_lock);
  *free_bytes = card->total_bytes - card->context_bytes - device_account.used;
  pthread_mutex_unlock(&memory_lock);
  *total_bytes = card->total_bytes;
  return SUCCESS;
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  *attributes = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered, .device = -1};
  if (is_device(pointer)) attributes->type = cudaMemoryTypeDevice;
  if (is_managed(pointer)) attributes->type = cudaMemoryTypeManaged;
  if (is_pinned(pointer)) attributes->type = cudaMemoryTypeHost;
  if (attributes->type == cudaMemoryTypeUnregistered) return SUCCESS;
  attributes->device = 0;
  attributes->devicePointer = (void *)pointer;
  if (attributes->type != cudaMemoryTypeDevice) attributes->hostPointer = (void *)pointer;
  return SUCCESS;
}

int cudaHostGetDevicePointer(void **device_pointer, void *host_pointer, unsigned flags) {
  (void)flags;
  *device_pointer = host_pointer;
  return SUCCESS;
}

// What the process that runs on the card asks about it (whichlora.nulldevice.control).
size_t nullcuda_used(void) { return device_account.used; }
size_t nullcuda_peak(void) { return device_account.peak; }
size_t nullcuda_managed_used(void) { return managed_account.used; }
size_t nullcuda_managed_peak(void) { return managed_account.peak; }
size_t nullcuda_pinned_used(void) { return pinned_account.used; }
size_t nullcuda_pinned_peak(void) { return pinned_account.peak; }

void nullcuda_reset_peaks(void) {
  pthread_mutex_lock(&memory_lock);
  device_account.peak = device_account.used;
  managed_account.peak = managed_account.used;
  pinned_account.peak = pinned_account.used;
  pthread_mutex_unlock(&memory_lock);
}
