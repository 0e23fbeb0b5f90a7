/* cuBLAS and cuDNN: handles, versions, and products that are noted with their sizes. */
#include "nullcuda.h"

#include <stdlib.h>
#include <string.h>

static __thread void *stream;

API int cublasCreate_v2(void **handle) { *handle = calloc(1, 64); return 0; }
API int cublasSetStream_v2(void *handle, void *s) { stream = s; return 0; }
API int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
API int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }

static int product(const char *by, long m, long n, long k, long batch, int type, void *s) {
    launched();
    note("gemm %s m %ld n %ld k %ld batch %ld type %d stream %p", by, m, n, k, batch, type, s);
    return 0;
}

API int cublasSgemm_v2(void *handle, int ta, int tb, int m, int n, int k) {
    return product("Sgemm", m, n, k, 1, 0, stream);
}
API int cublasGemmEx(
    void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type) {
    return product("GemmEx", m, n, k, 1, type, stream);
}
API int cublasSgemmStridedBatched(
    void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int lda, long stride,
    const void *b, int ldb, long stride_b, const void *beta, void *c, int ldc, long stride_c, int batch) {
    return product("SgemmStridedBatched", m, n, k, batch, 0, stream);
}
API int cublasGemmStridedBatchedEx(
    void *handle, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int type, int lda,
    long stride, const void *b, int type_b, int ldb, long stride_b, const void *beta, void *c, int type_c,
    int ldc, long stride_c, int batch) {
    return product("GemmStridedBatchedEx", m, n, k, batch, type, stream);
}

/* cublasLt keeps the sizes in its descriptors. */
typedef struct {
    int type, transposed, batch;
    long rows, columns;
} Layout;
typedef struct {
    int transpose_a;
} Description;
enum { TRANSPOSE_A = 3, BATCH_COUNT = 5 }; /* CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT */

API size_t cublasLtGetVersion(void) { return 130000; }
API int cublasLtMatmulPreferenceCreate(void **preference) { *preference = calloc(1, 64); return 0; }
API int cublasLtMatmulPreferenceDestroy(void *preference) { free(preference); return 0; }
API int cublasLtMatmulDescCreate(void **description, int compute, int scale) {
    *description = calloc(1, sizeof(Description));
    return 0;
}
API int cublasLtMatmulDescDestroy(void *description) { free(description); return 0; }
API int cublasLtMatmulDescSetAttribute(Description *d, int attribute, const void *value, size_t size) {
    if (attribute == TRANSPOSE_A) memcpy(&d->transpose_a, value, sizeof(int));
    return 0;
}
API int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    Layout *l = calloc(1, sizeof *l);
    *l = (Layout){.type = type, .batch = 1, .rows = rows, .columns = columns};
    *layout = l;
    return 0;
}
API int cublasLtMatrixLayoutDestroy(void *layout) { free(layout); return 0; }
API int cublasLtMatrixLayoutSetAttribute(Layout *layout, int attribute, const void *value, size_t size) {
    if (attribute == BATCH_COUNT) memcpy(&layout->batch, value, sizeof(int));
    return 0;
}
API int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *description, void *a, void *b, void *c, void *d, void *preference, int asked,
    void *results, int *found) {
    memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t: success, without a workspace */
    *found = 1;
    return 0;
}
API int cublasLtMatmul(
    void *handle, Description *description, const void *alpha, const void *at_a, Layout *a, const void *at_b,
    Layout *b, const void *beta, const void *at_c, Layout *c, void *at_d, Layout *d, const void *algorithm,
    void *workspace, size_t workspace_size, void *s) {
    long k = description->transpose_a ? a->rows : a->columns;
    return product("cublasLt", d->rows, d->columns, k, d->batch, a->type, s);
}

/* cuDNN's graphs are descriptors that it alone can read. Every graph has one engine, whose numbers (workspace,
   shared memory, ...) are 0 and which has no notes. */
enum { ENGINES_FOUND = 202, ENGINE = 300 };  /* of cudnnBackendAttributeName_t */
enum { INT64 = 3, INT32 = 23 };              /* of cudnnBackendAttributeType_t */

API size_t cudnnGetVersion(void) { return 92400; }
API size_t cudnnGetCudartVersion(void) { return 13000; }
API const char *cudnnGetErrorString(int status) { return "an error of the null device"; }
API int cudnnCreate(void **handle) { *handle = calloc(1, 64); return 0; }
API int cudnnBackendCreateDescriptor(int kind, void **descriptor) { *descriptor = calloc(1, 64); return 0; }
API int cudnnBackendDestroyDescriptor(void *descriptor) { free(descriptor); return 0; }
API int cudnnBackendGetAttribute(
    void *descriptor, int attribute, int type, int64_t asked, int64_t *count, void *values) {
    int is_number = asked == 1 && (type == INT64 || type == INT32);
    if (is_number && values) memset(values, 0, type == INT64 ? 8 : 4);
    if (count) *count = is_number || attribute == ENGINES_FOUND || attribute == ENGINE;
    return 0;
}
API int cudnnBackendExecute(void *handle, void *plan, void *variants) {
    launched();
    note("kernel cudnn");
    return 0;
}
