// Calls that nobody wrote. Every function that NVIDIA's installed libraries export, and that the other files here do not
// define, is defined in the generated calls.h to end up here: it says its name and returns its library's error.
#include "null.h"

#pragma GCC optimize("O0") // thousands of functions that run once: compiling them is what takes time

#include <stdio.h>

static const char *volatile last = "";
const char *last_missing(void) { return last; }
const char *nullcuda_last_missing(void) { return last; }
void nullcuda_forget_missing(void) { last = ""; }

int missing(const char *function, int error) {
  last = function;
  fprintf(stderr, "null device: %s is not implemented\n", function);
  return error;
}

typedef struct { const char *function; int error, said; } Call;
static int fail_by_name(Call *call) {
  last = call->function;
  if (call->said) return call->error;
  call->said = 1;
  return missing(call->function, call->error);
}

// Weak: a definition in another file wins.
#define MISSING(name, code)                    \
  __attribute__((weak)) int name(void) {       \
    static Call call = {#name, code, 0};       \
    return fail_by_name(&call);                \
  }
#include "calls.h"
