// cuBLAS and cuBLASLt: matrix products and solvers that write nothing. PyTorch gives them their workspace from its own
// allocator, so it is counted. Then handles of other libraries, whose creation is harmless: what is done with them is not.
#include "null.h"

#include <stdlib.h>
#include <string.h>

int cublasCreate_v2(void **handle) { return new_handle(handle); }
int cublasDestroy_v2(void *handle) {
  free(handle);
  return SUCCESS;
}
int cublasGetMathMode(void *handle, int *mode) {
  (void)handle;
  *mode = 0;
  return SUCCESS;
}
int cublasGetPointerMode_v2(void *handle, int *mode) {
  (void)handle;
  *mode = 0;
  return SUCCESS;
}

// Safe to skip: settings of a handle, and functions whose results are device memory (for dot products PyTorch asks for that).
#define SKIP(function) \
  int function(void) { \
    forget_last_kernel(); \
    return SUCCESS; \
  }
#define COMPUTE(function) \
  int function(void) { \
    forget_last_kernel(); \
    count_launch(); \
    return SUCCESS; \
  }
#define COMPUTE_TYPES(function) \
  COMPUTE(cublasS##function) COMPUTE(cublasD##function) COMPUTE(cublasC##function) COMPUTE(cublasZ##function)
SKIP(cublasSetMathMode) SKIP(cublasSetPointerMode_v2) SKIP(cublasSetStream_v2) SKIP(cublasSetWorkspace_v2)
SKIP(cublasSetSmCountTarget) SKIP(cublasSetAtomicsMode)
COMPUTE_TYPES(gemm_v2) COMPUTE_TYPES(gemmBatched) COMPUTE_TYPES(gemmStridedBatched) COMPUTE_TYPES(gemv_v2)
COMPUTE_TYPES(trsm_v2) COMPUTE_TYPES(trsmBatched) COMPUTE_TYPES(gelsBatched) COMPUTE_TYPES(geqrfBatched)
COMPUTE_TYPES(getrfBatched) COMPUTE_TYPES(getrsBatched)
COMPUTE(cublasGemmEx) COMPUTE(cublasGemmBatchedEx) COMPUTE(cublasGemmStridedBatchedEx) COMPUTE(cublasSgemmEx)
COMPUTE(cublasDotEx) COMPUTE(cublasSdot_v2) COMPUTE(cublasDdot_v2)
COMPUTE(cublasCdotc_v2) COMPUTE(cublasCdotu_v2) COMPUTE(cublasZdotc_v2) COMPUTE(cublasZdotu_v2)

// cuBLASLt: descriptions of a product, then one algorithm that fits any of them and wants no workspace of its own.
static int describe(void **description) {
  *description = calloc(1, 512);
  return *description ? SUCCESS : 3 /* CUBLAS_STATUS_ALLOC_FAILED */;
}
static int forget(void *description) {
  free(description);
  return SUCCESS;
}
int cublasLtCreate(void **handle) { return describe(handle); }
int cublasLtDestroy(void *handle) { return forget(handle); }
int cublasLtMatmulDescCreate(void **description) { return describe(description); }
int cublasLtMatmulDescDestroy(void *description) { return forget(description); }
int cublasLtMatmulPreferenceCreate(void **description) { return describe(description); }
int cublasLtMatmulPreferenceDestroy(void *description) { return forget(description); }
int cublasLtMatrixLayoutCreate(void **description) { return describe(description); }
int cublasLtMatrixLayoutDestroy(void *description) { return forget(description); }
SKIP(cublasLtMatmulDescSetAttribute) SKIP(cublasLtMatmulPreferenceSetAttribute) SKIP(cublasLtMatrixLayoutSetAttribute)
COMPUTE(cublasLtMatmul)

typedef struct { uint64_t algorithm[8]; size_t workspace_bytes; int status; float waves; int reserved[4]; } Heuristic;
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, Heuristic *results, int *found) {
  (void)handle, (void)product, (void)a, (void)b, (void)c, (void)d, (void)preference;
  *found = wanted > 0;
  if (*found) *results = (Heuristic){.waves = 1};
  return SUCCESS;
}

int cusparseCreate(void **handle) { return new_handle(handle); }
int cusparseDestroy(void *handle) { return forget(handle); }
int cusparseSetStream(void) { return SUCCESS; }
int cudnnCreate(void **handle) { return new_handle(handle); }
int cudnnDestroy(void *handle) { return forget(handle); }
int cudnnSetStream(void) { return SUCCESS; }
int cusolverDnCreate(void **handle) { return new_handle(handle); }
int cusolverDnDestroy(void *handle) { return forget(handle); }
int cusolverDnSetStream(void) { return SUCCESS; }
