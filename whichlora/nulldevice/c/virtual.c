// Virtual memory management: PyTorch's expandable segments reserve addresses, create memory and map the one at the other.
// Memory counts from its creation until its handle is released and nothing maps it any more, as the driver counts it.
#include "null.h"

#include <stdlib.h>

typedef unsigned long long Handle;
typedef struct { size_t bytes; uint32_t maps, next_free; int held; } Memory;

static Memory *memories; // handle h is memories[h - 1]; those that are gone form a list from first_free
static uint32_t memories_used, memories_room, first_free;
static uint32_t mapped[DEVICE_PAGES]; // the handle of the memory whose mapping starts at a page, 0 where none does

static Handle new_memory(size_t bytes) {
  uint32_t handle = first_free;
  if (handle) {
    first_free = memories[handle - 1].next_free;
  } else {
    if (memories_used == memories_room) {
      memories_room = memories_room ? 2 * memories_room : 1024;
      memories = realloc(memories, memories_room * sizeof *memories);
      if (!memories) abort();
    }
    handle = ++memories_used;
  }
  memories[handle - 1] = (Memory){.bytes = bytes, .held = 1};
  return handle;
}

static void drop_if_unused(uint32_t handle) {
  Memory *memory = &memories[handle - 1];
  if (memory->held || memory->maps) return;
  refund(memory->bytes);
  memory->next_free = first_free;
  first_free = handle;
}

static Memory *memory_of(Handle handle) {
  return handle && handle <= memories_used ? &memories[handle - 1] : NULL;
}

int cuMemGetAllocationGranularity(size_t *bytes, const void *properties, int option) {
  (void)properties, (void)option;
  *bytes = PAGE_BYTES;
  return SUCCESS;
}

int cuMemAddressReserve(uintptr_t *address, size_t bytes, size_t alignment, uintptr_t hint, unsigned long long flags) {
  (void)hint, (void)flags;
  if (alignment > PAGE_BYTES || bytes % PAGE_BYTES) return INVALID_VALUE;
  pthread_mutex_lock(&memory_lock);
  *address = take_addresses(bytes);
  pthread_mutex_unlock(&memory_lock);
  return *address ? SUCCESS : OUT_OF_MEMORY;
}

int cuMemAddressFree(uintptr_t address, size_t bytes) {
  (void)bytes;
  pthread_mutex_lock(&memory_lock);
  size_t freed = return_addresses(address);
  pthread_mutex_unlock(&memory_lock);
  return freed ? SUCCESS : INVALID_VALUE;
}

int cuMemCreate(Handle *handle, size_t bytes, const int *properties, unsigned long long flags) {
  (void)flags;
  enum { LOCATION_TYPE = 2, ON_DEVICE = 1 }; // CUmemAllocationProp: type, requested handles, location's type, …
  if (properties[LOCATION_TYPE] != ON_DEVICE) return missing("cuMemCreate outside the device", NOT_SUPPORTED);
  if (!bytes || bytes % PAGE_BYTES) return INVALID_VALUE;
  pthread_mutex_lock(&memory_lock);
  int error = charge(bytes);
  if (!error) *handle = new_memory(bytes);
  pthread_mutex_unlock(&memory_lock);
  return error;
}

int cuMemRelease(Handle handle) {
  pthread_mutex_lock(&memory_lock);
  Memory *memory = memory_of(handle);
  int error = memory && memory->held ? SUCCESS : INVALID_VALUE;
  if (!error) {
    memory->held = 0;
    drop_if_unused((uint32_t)handle);
  }
  pthread_mutex_unlock(&memory_lock);
  return error;
}

int cuMemMap(uintptr_t address, size_t bytes, size_t offset, Handle handle, unsigned long long flags) {
  (void)flags;
  pthread_mutex_lock(&memory_lock);
  Memory *memory = memory_of(handle);
  int fits = memory && memory->held && offset == 0 && bytes == memory->bytes && is_device((void *)address);
  int error = fits && !mapped[device_page(address)] ? SUCCESS : INVALID_VALUE;
  if (!error) {
    mapped[device_page(address)] = (uint32_t)handle;
    memory->maps++;
  }
  pthread_mutex_unlock(&memory_lock);
  return error;
}

int cuMemUnmap(uintptr_t address, size_t bytes) {
  if (!is_device((void *)address) || !is_device((void *)(address + bytes - 1))) return INVALID_VALUE;
  pthread_mutex_lock(&memory_lock);
  size_t first = device_page(address), unmapped = 0;
  for (size_t page = first; page < first + bytes / PAGE_BYTES; page++) {
    if (!mapped[page]) continue;
    uint32_t handle = mapped[page];
    mapped[page] = 0;
    memories[handle - 1].maps--;
    drop_if_unused(handle);
    unmapped++;
  }
  pthread_mutex_unlock(&memory_lock);
  return unmapped ? SUCCESS : INVALID_VALUE;
}

// Who may touch the memory changes nothing here: nobody does.
int cuMemSetAccess(void) { return SUCCESS; }
