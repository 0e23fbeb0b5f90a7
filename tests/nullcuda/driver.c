/* libcuda.so.1, as far as Triton and torch ask it. It tells no static runtime (DALI's, FAISS's) of a device:
   those find functions by cuGetProcAddress, which is missing here, and go on without a GPU. */
#include "nullcuda.h"

#include <cuda.h>
#include <stdlib.h>
#include <string.h>

/* The preloaded library has these, and what nullcuda.h exports. */
extern int cudaGetDevice(int *);
extern int cudaDeviceGetAttribute(int *, int, int);

static CUcontext context = (CUcontext)0x55;

API CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int *count) { *count = nullcuda_devices(); return CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
API CUresult cuDeviceGetName(char *text, int size, CUdevice device) {
    strncpy(text, nullcuda_gpu()->name, size);
    return CUDA_SUCCESS;
}
API CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    *bytes = nullcuda_gpu()->bytes;
    return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return cudaDeviceGetAttribute(value, attribute, device); /* the two number them alike */
}
API CUresult cuCtxGetCurrent(CUcontext *c) { *c = context; return CUDA_SUCCESS; }
API CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice *device) { return cudaGetDevice(device); }
API CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice device) { *c = context; return CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "an error of the null device";
    return CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr at) {
    *(CUdeviceptr *)value = at;
    return CUDA_SUCCESS;
}

/* A function is its name. */
API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)0x60;
    return CUDA_SUCCESS;
}
API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                                  : 0;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
API CUresult cuLaunchKernel(
    CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, CUstream stream, void **arguments, void **extra) {
    nullcuda_kernel((const char *)function, x, y, z, stream);
    return CUDA_SUCCESS;
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
    nullcuda_kernel((const char *)function, c->gridDimX, c->gridDimY, c->gridDimZ, c->hStream);
    return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    *clusters = nullcuda_gpu()->multiprocessors / 2;
    return CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction f, int size, size_t shared) {
    *blocks = 2;
    return CUDA_SUCCESS;
}
