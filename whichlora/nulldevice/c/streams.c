// Streams, events, host callbacks and graph capture. Work has no duration: a stream is always idle, an event always reached.
#include "null.h"

#include <stdlib.h>
#include <time.h>

typedef struct { unsigned long long capture; int priority; } Stream; // capture: the id of the capture under way, 0 if none

int new_handle(void **handle) {
  *handle = calloc(1, 64);
  return fail(*handle ? SUCCESS : OUT_OF_MEMORY);
}
static int drop_handle(void *handle) {
  free(handle);
  return SUCCESS;
}

// Streams that nobody created: 0 is the default one, 1 and 2 are names for it.
static Stream *stream_of(void *handle) {
  static Stream standard;
  return (uintptr_t)handle > 2 ? handle : &standard;
}

int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
  (void)flags;
  int error = new_handle(stream);
  if (!error) stream_of(*stream)->priority = priority;
  return error;
}
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return cudaStreamCreateWithPriority(stream, flags, 0); }
int cudaStreamCreate(void **stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
int cudaStreamDestroy(void *stream) { return (uintptr_t)stream > 2 ? drop_handle(stream) : SUCCESS; }
int cudaStreamGetPriority(void *stream, int *priority) {
  *priority = stream_of(stream)->priority;
  return SUCCESS;
}
int cudaStreamQuery(void) { return SUCCESS; }
int cudaStreamSynchronize(void) {
  wait_for_card();
  return SUCCESS;
}
int cudaStreamWaitEvent(void) { return SUCCESS; }

int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *argument) {
  (void)stream;
  function(argument);
  return SUCCESS;
}
int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *argument, unsigned flags) {
  (void)flags;
  function(stream, SUCCESS, argument);
  return SUCCESS;
}

// An event is the moment when the host recorded it; where somebody tells how long work takes, when the card would reach it.
int cudaEventCreateWithFlags(void **event, unsigned flags) {
  (void)flags;
  return new_handle(event);
}
int cudaEventCreate(void **event) { return new_handle(event); }
int cudaEventDestroy(void *event) { return drop_handle(event); }
int cudaEventRecord(struct timespec *event, void *stream) {
  (void)stream;
  if (!card_time(event)) clock_gettime(CLOCK_MONOTONIC, event);
  return SUCCESS;
}
int cudaEventRecordWithFlags(struct timespec *event, void *stream, unsigned flags) {
  (void)flags;
  return cudaEventRecord(event, stream);
}
int cudaEventQuery(void) { return SUCCESS; }
int cudaEventSynchronize(void) {
  wait_for_card();
  return SUCCESS;
}
int cudaEventElapsedTime(float *ms, const struct timespec *start, const struct timespec *end) {
  *ms = (float)((double)(end->tv_sec - start->tv_sec) * 1e3 + (double)(end->tv_nsec - start->tv_nsec) * 1e-6);
  return SUCCESS;
}
int cudaEventElapsedTime_v2(float *ms, const struct timespec *start, const struct timespec *end) {
  return cudaEventElapsedTime(ms, start, end);
}

// Graph capture: PyTorch must see that it is capturing, to allocate from the graph's own pool. The graph itself is empty.
static unsigned long long captures;

int cudaStreamBeginCapture(void *stream, int mode) {
  (void)mode;
  stream_of(stream)->capture = __sync_add_and_fetch(&captures, 1);
  return SUCCESS;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  stream_of(stream)->capture = 0;
  return new_handle(graph);
}
int cudaStreamIsCapturing(void *stream, int *status) {
  *status = stream_of(stream)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return SUCCESS;
}
static int capture_info(void *stream, int *status, unsigned long long *id, void **graph, void **before, size_t *n_before) {
  static int no_graph;
  if (id) *id = stream_of(stream)->capture;
  if (graph) *graph = &no_graph;
  if (before) *before = NULL;
  if (n_before) *n_before = 0;
  return cudaStreamIsCapturing(stream, status);
}
#if CUDART_VERSION >= 13000
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id, void **graph, void **before, void **edges,
                             size_t *n_before) {
  if (edges) *edges = NULL;
  return capture_info(stream, status, id, graph, before, n_before);
}
#else
int cudaStreamGetCaptureInfo(void *stream, int *status, unsigned long long *id) {
  return capture_info(stream, status, id, NULL, NULL, NULL);
}
int cudaStreamGetCaptureInfo_v2(void *stream, int *status, unsigned long long *id, void **graph, void **before,
                                size_t *n_before) {
  return capture_info(stream, status, id, graph, before, n_before);
}
int cudaStreamGetCaptureInfo_v3(void *stream, int *status, unsigned long long *id, void **graph, void **before,
                                void **edges, size_t *n_before) {
  if (edges) *edges = NULL;
  return capture_info(stream, status, id, graph, before, n_before);
}
#endif
int cudaThreadExchangeStreamCaptureMode(int *mode) {
  static __thread int current = cudaStreamCaptureModeGlobal;
  int before = current;
  current = *mode;
  *mode = before;
  return SUCCESS;
}

int cudaGraphInstantiate(void **executable) { return new_handle(executable); }
int cudaGraphInstantiateWithFlags(void **executable) { return new_handle(executable); }
int cudaGraphGetNodes(void *graph, void **nodes, size_t *count) {
  (void)graph;
  if (nodes) return missing("cudaGraphGetNodes with room for nodes", NOT_SUPPORTED);
  *count = 1; // PyTorch warns about a graph without nodes, which this one would not be on a card
  return SUCCESS;
}
int cudaGraphLaunch(void) { return SUCCESS; }
int cudaGraphDestroy(void *graph) { return drop_handle(graph); }
int cudaGraphExecDestroy(void *executable) { return drop_handle(executable); }

// Objects whose life a graph would share: they live on.
int cudaUserObjectCreate(void **object) { return new_handle(object); }
int cudaUserObjectRelease(void) { return SUCCESS; }
int cudaGraphRetainUserObject(void) { return SUCCESS; }
