// The null device: a CUDA runtime, driver and maths library that compute nothing. What its parts share.
//
// One shared library, preloaded under PyTorch, answers for libcudart, libcuda, libnvidia-ml, libcublas, libcublasLt and the
// rest: allocations are accounted for against a card of a given size, kernels and matrix products are skipped.
//   card.c      the card, from environment variables          missing.c   calls that nobody wrote, failing by name
//   memory.c    allocations, and pointers' kinds               virtual.c   cuMemCreate, cuMemMap …: expandable segments
//   copies.c    copies, fills, and what reading back gives     launch.c    kernels, and which one ran last
//   device.c    properties, versions, errors                   streams.c   streams, events, host callbacks, graph capture
//   driver.c    libcuda's entry points                         nvml.c      libnvidia-ml's
//   blas.c      cuBLAS, cuBLASLt, and handles of other libraries            clock.c     launches, and the two lanes of time
#pragma once
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include <driver_types.h>

// CUDA's libraries number their errors differently, but all of them are ints and success is 0 in all of them.
enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  NO_KERNEL_IMAGE = 209,
  NOT_FOUND = 500,
  NOT_SUPPORTED = 801
};

#define MIB ((size_t)1 << 20)
#define PAGE_BYTES (2 * MIB) // what the driver hands out device memory in

typedef struct {
  char name[256];
  size_t total_bytes, context_bytes; // context_bytes: taken from the start by what is not modelled, 0 unless told
  int major, minor, sm_count, l2_bytes;
  int block_shared_bytes, sm_shared_bytes, sm_threads, sm_blocks; // what one block may opt in to; what one SM holds
  int code; // the newest code in PyTorch's build that this card runs: 86 for sm_86; 0 if there is none
} Card;
const Card *the_card(void);
int first_visible(void); // the index that CUDA_VISIBLE_DEVICES gives this card, -1 if it hides it

// card.c: 1 if a bool that is read back as "are all of them …" is answered with yes
extern int bool_read;

// memory.c
typedef struct { size_t used, peak; } Account;
extern pthread_mutex_t memory_lock;
extern Account device_account, managed_account, pinned_account;
int is_device(const void *pointer);  // an address on the card, backed by nothing here
int is_managed(const void *pointer); // cudaMallocManaged: host pages that are never written
int is_pinned(const void *pointer);
uintptr_t take_addresses(size_t bytes);     // device addresses without memory; 0 if none are left. Needs memory_lock.
size_t return_addresses(uintptr_t address); // the bytes that were taken there, 0 if none were. Needs memory_lock.
size_t device_page(uintptr_t address);      // which page of the device's address range
int charge(size_t bytes);                   // SUCCESS, or OUT_OF_MEMORY if the card is full. Needs memory_lock.
void refund(size_t bytes);                  // Needs memory_lock.
#define DEVICE_PAGES ((size_t)1 << 24)      // 32 TiB of device addresses

// device.c
int fail(int error); // sets this thread's cudaGetLastError and returns the error

// launch.c: the mangled name of the kernel that this thread launched last, "" if unknown
const char *last_kernel(void);
long long last_counted(void);  // of how many elements it counted those that are not zero, -1 if it did no such thing
int copied_since(void);        // 1 if something was copied from device to device after it
void note_copy(void);          // something is
void forget_last_kernel(void); // something else wrote to the device since

// clock.c
void count_launch(void);             // a kernel or a product is launched
void wait_for_card(void);            // the host waits for all that it issued
int card_time(struct timespec *now); // when the card gets to what is issued now; 0 if nobody tells how long work takes

// streams.c: a new opaque object, for any create function
int new_handle(void **handle);

// missing.c
int missing(const char *function, int error); // says so on stderr, once a function, and returns the error
const char *last_missing(void);               // "" if nothing was missed
