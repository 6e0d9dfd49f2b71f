// Copies and fills, and what somebody who reads from the device gets to see.
//
// Nothing is stored on the device, so whatever is read back is an answer that we choose. Bytes are 0, but for these; what was
// asked shows in the kernel that this thread launched last:
//   - a single byte is a bool. "Are all of them …" gets NULLCUDA_BOOL: 1 unless set, as for a mask without padding. "Is any of
//     them …" and "is it equal to, less than … that" get no: nothing is NaN, nobody has finished. Anything else NULLCUDA_BOOL.
//   - "how many are not zero", which sizes what a boolean mask selects, gets: all of them.
//   - answers that were queued (whichlora.nulldevice.answers) come first.
#include "null.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define QUEUE 4096
static long long counts[QUEUE];
static unsigned counts_first, counts_end;
static int next_bool = -1;

void nullcuda_forget_answers(void) {
  counts_first = counts_end = 0;
  next_bool = -1;
}

// The next bool that is read back is this one, whatever was asked.
void nullcuda_answer_bool(int value) { next_bool = value != 0; }

// What the next reads of "how many are not zero?" give, in order; what was queued before is forgotten.
int nullcuda_answer_counts(const long long *values, unsigned n) {
  if (n > QUEUE) return INVALID_VALUE;
  memcpy(counts, values, n * sizeof *values);
  counts_first = 0;
  counts_end = n;
  return SUCCESS;
}

static int asked(const char *kernel, const char *const *signs) {
  for (; *signs; signs++)
    if (strstr(kernel, *signs)) return 1;
  return 0;
}

// Of one element, PyTorch makes "all" and "any" alike by copying it. A whole number that was compared with a constant is then a
// mask that is asked whether all of it is so (a batch of one sequence, whether it is packed); anything else is asked for NaN.
static int all_of_one(const char *kernel) {
  static const char *const whole[] = {"UnaryFunctorIllb", "UnaryFunctorIiib", "UnaryFunctorIbbb", NULL};
  return copied_since() && strstr(kernel, "CompareEq") && asked(kernel, whole);
}

static int bool_answer(const char *kernel) {
  static const char *const any[] = {"or_kernel", NULL};
  static const char *const comparison[] = {"compare_scalar", "CompareEq", "CompareFunctor", NULL};
  if (next_bool >= 0) {
    int answer = next_bool;
    next_bool = -1;
    return answer;
  }
  the_card();
  if (all_of_one(kernel)) return bool_read;
  return asked(kernel, any) || asked(kernel, comparison) ? 0 : bool_read;
}

// 0 is the wrong answer to a question for a size. Say so, once.
static void warn_of_empty(const char *kernel) {
  static const char *const sizes[] = {"DeviceSelect", "DeviceScan", NULL};
  static int said;
  if (said || !asked(kernel, sizes)) return;
  said = 1;
  fprintf(stderr, "null device: a size was read back as 0 (unique, repeat_interleave …): what it sizes takes no memory here\n");
}

static long long count_answer(const char *kernel) {
  if (last_counted() >= 0) return counts_first < counts_end ? counts[counts_first++] : last_counted();
  warn_of_empty(kernel);
  return 0;
}

static void trace(size_t bytes, const void *answer, const char *kernel) {
  static int wanted = -1;
  if (wanted < 0) wanted = getenv("NULLCUDA_TRACE_READS") != NULL;
  long long first = 0;
  memcpy(&first, answer, bytes < sizeof first ? bytes : sizeof first);
  if (wanted) fprintf(stderr, "null device: read %zu bytes, %lld, after %s\n", bytes, first, *kernel ? kernel : "a copy");
}

static void read_back(void *host, size_t bytes) {
  wait_for_card();
  const char *kernel = last_kernel();
  memset(host, 0, bytes);
  if (bytes == 1) *(char *)host = (char)bool_answer(kernel);
  if (bytes == sizeof(int)) *(int *)host = (int)count_answer(kernel);
  if (bytes == sizeof(long long)) *(long long *)host = count_answer(kernel);
  trace(bytes, host, kernel);
}

static int on_card(const void *pointer) { return is_device(pointer) || is_managed(pointer); }

static int copy(void *to, const void *from, size_t bytes) {
  if (on_card(to)) {
    on_card(from) ? note_copy() : forget_last_kernel();
    count_launch();
  } else if (on_card(from)) {
    read_back(to, bytes);
  } else {
    memmove(to, from, bytes);
  }
  return SUCCESS;
}

static int copy_rows(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t height) {
  for (size_t row = 0; row < height; row++) copy(to + row * to_pitch, from + row * from_pitch, width);
  return SUCCESS;
}

static int fill(void *to, int value, size_t bytes) {
  if (on_card(to)) {
    forget_last_kernel();
    count_launch();
  } else {
    memset(to, value, bytes);
  }
  return SUCCESS;
}

int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
  (void)kind;
  return copy(to, from, bytes);
}
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
  (void)kind, (void)stream;
  return copy(to, from, bytes);
}
int cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, void *stream) {
  (void)to_device, (void)from_device, (void)stream;
  return copy(to, from, bytes);
}
int cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, int kind) {
  (void)kind;
  return copy_rows(to, to_pitch, from, from_pitch, width, height);
}
int cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                      int kind, void *stream) {
  (void)kind, (void)stream;
  return copy_rows(to, to_pitch, from, from_pitch, width, height);
}
int cudaMemcpyToSymbol(void) { return SUCCESS; }

int cudaMemset(void *to, int value, size_t bytes) { return fill(to, value, bytes); }
int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
  (void)stream;
  return fill(to, value, bytes);
}

// Moving managed pages ahead of their use changes no content.
int cudaMemPrefetchAsync(void) { return SUCCESS; }
int cudaMemAdvise(void) { return SUCCESS; }

// The same in the driver's words.
int cuMemcpyHtoD_v2(void *to, const void *from, size_t bytes) { return copy(to, from, bytes); }
int cuMemcpyDtoH_v2(void *to, const void *from, size_t bytes) { return copy(to, from, bytes); }
int cuMemcpyDtoD_v2(void *to, const void *from, size_t bytes) { return copy(to, from, bytes); }
int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes) { return copy(to, from, bytes); }
int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes) { return copy(to, from, bytes); }
int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes) { return copy(to, from, bytes); }
int cuMemcpyAsync(void *to, const void *from, size_t bytes) { return copy(to, from, bytes); }
int cuMemsetD8Async(void) { return SUCCESS; }
int cuMemsetD32Async(void) { return SUCCESS; }
