/* CUDA's runtime: devices, memory, copies, streams, events and launches that run nothing. */
#include "nullcuda.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- the log ---- */

static FILE *log_file(void) {
    static FILE *file;
    static int owner; /* a forked child writes a file of its own */
    const char *path = getenv("NULLCUDA_LOG");
    if (path && owner != getpid()) {
        char name[4096];
        snprintf(name, sizeof name, "%s.%d", path, owner = getpid());
        file = fopen(name, "w");
    }
    return file;
}

void note(const char *format, ...) {
    pthread_mutex_lock(&lock);
    FILE *file = log_file();
    if (file) {
        va_list values;
        va_start(values, format);
        vfprintf(file, format, values);
        va_end(values);
        fputc('\n', file);
    }
    pthread_mutex_unlock(&lock);
}

/* For observers: writes a line that tells where in the run the log is, and all lines so far. */
API void nullcuda_mark(const char *text) {
    note("mark %s", text);
    pthread_mutex_lock(&lock);
    FILE *file = log_file();
    if (file) fflush(file);
    pthread_mutex_unlock(&lock);
}

/* What no file here answers for; the stubs that are made when this is built come here. */
API int nullcuda_stub(const char *name) {
    note("stub %s", name);
    return 0;
}

/* ---- devices ---- */

static const Gpu GPUS[] = {
    {"h100", "NVIDIA H100 80GB HBM3", 85024112640, 9, 0, 132, 232448, 52428800, 5120},
    {"h200", "NVIDIA H200", 150754820096, 9, 0, 132, 232448, 62914560, 6144},
    {"a100-80", "NVIDIA A100-SXM4-80GB", 84987740160, 8, 0, 108, 166912, 41943040, 5120},
    {"a100-40", "NVIDIA A100-SXM4-40GB", 42297786368, 8, 0, 108, 166912, 41943040, 5120},
};
static __thread int current;

const Gpu *nullcuda_gpu(void) {
    const char *asked = getenv("NULLCUDA_DEVICE");
    for (size_t i = 0; i < sizeof GPUS / sizeof *GPUS; i++)
        if (asked && !strcmp(asked, GPUS[i].id)) return &GPUS[i];
    return &GPUS[0];
}

int nullcuda_devices(void) {
    const char *number = getenv("NULLCUDA_DEVICES");
    return number ? atoi(number) : 1;
}

API cudaError_t cudaGetDeviceCount(int *count) { *count = nullcuda_devices(); return cudaSuccess; }
API cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }
API cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= nullcuda_devices()) return cudaErrorInvalidDevice;
    current = device;
    return cudaSuccess;
}

API cudaError_t cudaGetLastError(void) { return cudaSuccess; }
API cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
API const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorNull";
}
API const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the null device";
}

API cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }

#undef cudaGetDeviceProperties
static cudaError_t properties(struct cudaDeviceProp *p, int device) {
    const Gpu *g = nullcuda_gpu();
    memset(p, 0, sizeof *p);
    strcpy(p->name, g->name);
    p->totalGlobalMem = g->bytes;
    p->major = g->major;
    p->minor = g->minor;
    p->multiProcessorCount = g->multiprocessors;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = g->shared_bytes;
    p->sharedMemPerMultiprocessor = g->shared_bytes + 1024;
    p->l2CacheSize = g->l2_bytes;
    p->memoryBusWidth = g->bus_bits;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxGridSize[0] = p->memPitch = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 65536;
    p->textureAlignment = 512;
    p->concurrentKernels = p->canMapHostMemory = p->unifiedAddressing = p->cooperativeLaunch = 1;
    p->asyncEngineCount = 3;
    p->pciBusID = 4 + device;
    p->uuid.bytes[0] = device;
    return cudaSuccess;
}
API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) { return properties(p, d); }
API cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int d) { return properties(p, d); }

API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    properties(&p, device);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrTextureAlignment: *value = 512; break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrUnifiedAddressing: *value = 1; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", 4 + device);
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 1; return cudaSuccess; }

/* ---- memory ---- */

typedef struct {
    char *start;
    size_t size;
    int device; /* -1: pinned memory of the host */
} Allocation;
static Allocation allocations[65536];
static int number_of_allocations;
static size_t used[16];

static Allocation *find(const void *at) { /* the caller holds the lock */
    for (int i = 0; i < number_of_allocations; i++) {
        Allocation *a = &allocations[i];
        if (a->start && (char *)at >= a->start && (char *)at < a->start + a->size) return a;
    }
    return NULL;
}

static cudaError_t allocate(void **at, size_t size, int device) {
    size_t whole = (size + 2097151) & ~(size_t)2097151; /* as the driver hands it out */
    if (!whole) whole = 2097152;
    pthread_mutex_lock(&lock);
    int fits = device < 0 || used[device] + whole <= nullcuda_gpu()->bytes;
    int i = 0;
    while (i < number_of_allocations && allocations[i].start) i++;
    /* Host code that touches device memory crashes, as it does on a GPU. */
    int access = device < 0 ? PROT_READ | PROT_WRITE : PROT_NONE;
    void *start = MAP_FAILED;
    if (fits && i < 65536) start = mmap(0, whole, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start != MAP_FAILED) {
        allocations[i] = (Allocation){start, whole, device};
        if (i == number_of_allocations) number_of_allocations++;
        if (device >= 0) used[device] += whole;
        *at = start;
    }
    pthread_mutex_unlock(&lock);
    return start == MAP_FAILED ? cudaErrorMemoryAllocation : cudaSuccess;
}

static cudaError_t release(void *at) {
    pthread_mutex_lock(&lock);
    Allocation *a = at ? find(at) : NULL;
    if (a) {
        munmap(a->start, a->size);
        if (a->device >= 0) used[a->device] -= a->size;
        a->start = NULL;
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static int on_device(const void *at) {
    pthread_mutex_lock(&lock);
    Allocation *a = find(at);
    int yes = a && a->device >= 0;
    pthread_mutex_unlock(&lock);
    return yes;
}

API cudaError_t cudaMalloc(void **at, size_t size) { return allocate(at, size, current); }
API cudaError_t cudaFree(void *at) { return release(at); }
API cudaError_t cudaHostAlloc(void **at, size_t size, unsigned flags) { return allocate(at, size, -1); }
API cudaError_t cudaMallocHost(void **at, size_t size) { return allocate(at, size, -1); }
API cudaError_t cudaFreeHost(void *at) { return release(at); }
API cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
    *total = nullcuda_gpu()->bytes;
    *unused = *total - used[current];
    return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *at) {
    memset(attributes, 0, sizeof *attributes);
    pthread_mutex_lock(&lock);
    Allocation *a = find(at);
    attributes->type = !a ? cudaMemoryTypeUnregistered
                          : a->device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->device = a && a->device >= 0 ? a->device : 0;
    if (a) attributes->devicePointer = (void *)at;
    if (a && a->device < 0) attributes->hostPointer = (void *)at;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

/* ---- the bytes that small copies carry ---- */

#define KNOWN 64
static struct {
    char *at;
    size_t size;
    char *bytes;
} known[KNOWN];
static int next_known;
static pthread_mutex_t known_lock = PTHREAD_MUTEX_INITIALIZER;

void put(void *at, const void *bytes, size_t size) {
    pthread_mutex_lock(&known_lock);
    for (int i = 0; i < KNOWN; i++) /* what is overwritten is no longer known, if only in part */
        if (known[i].size && known[i].at < (char *)at + size && (char *)at < known[i].at + known[i].size)
            known[i].size = 0;
    if (size <= CARRIED) {
        int i = next_known++ % KNOWN;
        known[i].at = at;
        known[i].size = size;
        known[i].bytes = realloc(known[i].bytes, size ? size : 1);
        memcpy(known[i].bytes, bytes, size);
    }
    pthread_mutex_unlock(&known_lock);
}

void get(void *bytes, const void *at, size_t size) {
    memset(bytes, 0, size);
    pthread_mutex_lock(&known_lock);
    for (int i = 0; i < KNOWN; i++) {
        char *from = known[i].at > (char *)at ? known[i].at : (char *)at;
        char *to = known[i].at + known[i].size;
        if (to > (char *)at + size) to = (char *)at + size;
        if (known[i].size && from < to)
            memcpy((char *)bytes + (from - (char *)at), known[i].bytes + (from - known[i].at), to - from);
    }
    pthread_mutex_unlock(&known_lock);
}

void launched(void) {
    pthread_mutex_lock(&known_lock);
    for (int i = 0; i < KNOWN; i++) known[i].size = 0;
    pthread_mutex_unlock(&known_lock);
}

static void copy(void *to, const void *from, size_t size) {
    int source = on_device(from), destination = on_device(to);
    if (!source && !destination) {
        memmove(to, from, size);
    } else if (!destination) {
        get(to, from, size);
    } else if (!source || size > CARRIED) {
        put(to, from, size);
    } else {
        char *bytes = malloc(size ? size : 1);
        get(bytes, from, size);
        put(to, bytes, size);
        free(bytes);
    }
}

static const char *direction(const void *to, const void *from) {
    return on_device(from) ? on_device(to) ? "D2D" : "D2H" : on_device(to) ? "H2D" : "H2H";
}

static const char *host_memory(const void *to, const void *from) {
    const void *host = on_device(from) ? to : from;
    pthread_mutex_lock(&lock);
    const char *kind = find(host) ? "pinned" : "pageable";
    pthread_mutex_unlock(&lock);
    return kind;
}

API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    note("copy %s %zu waiting", direction(to, from), size);
    copy(to, from, size);
    return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(
    void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    note("copy %s %zu %s stream %p", direction(to, from), size, host_memory(to, from), (void *)stream);
    copy(to, from, size);
    return cudaSuccess;
}
API cudaError_t cudaMemcpyPeerAsync(
    void *to, int to_device, const void *from, int from_device, size_t size, cudaStream_t stream) {
    copy(to, from, size);
    return cudaSuccess;
}
API cudaError_t cudaMemset(void *at, int value, size_t size) { return cudaMemsetAsync(at, value, size, 0); }
API cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t stream) {
    note("set %zu stream %p", size, (void *)stream);
    char bytes[CARRIED];
    memset(bytes, value, sizeof bytes);
    put(at, bytes, size);
    return cudaSuccess;
}

/* ---- streams and events are numbers ---- */

static uintptr_t handle(void) {
    static uintptr_t last = 0x1000;
    return __sync_add_and_fetch(&last, 16);
}

API cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = (cudaStream_t)handle(); return cudaSuccess; }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
    return cudaStreamCreate(s);
}
API cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { *priority = 0; return cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
static cudaError_t not_capturing(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id) {
    if (status) *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    return cudaSuccess;
}
#undef cudaStreamGetCaptureInfo
API cudaError_t cudaStreamGetCaptureInfo_v2(
    cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, size_t *count) {
    return not_capturing(s, status, id);
}
API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *count) {
    return not_capturing(s, status, id);
}
API cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    note("wait for stream %p", (void *)s);
    return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize(void) {
    note("wait for device");
    return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags) {
    note("stream %p after event %p", (void *)s, (void *)event);
    return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = (cudaEvent_t)handle(); return cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return cudaEventCreate(e); }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) {
    note("event %p in stream %p", (void *)event, (void *)s);
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t s, unsigned flags) {
    return cudaEventRecord(event, s);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    note("wait for event %p", (void *)event);
    return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t a, cudaEvent_t b) {
    *milliseconds = 1;
    return cudaSuccess;
}

/* ---- launches ---- */

typedef struct {
    const void *function;
    const char *name;
} Kernel;
static Kernel *kernels;
static int number_of_kernels, room_for_kernels, sorted_kernels;

API void **__cudaRegisterFatBinary(void *binary) { static void *handle[2]; return handle; }
API void __cudaRegisterFunction(
    void **module, const char *function, char *device_function, const char *name, int limit, void *thread,
    void *block, void *block_size, void *grid_size, int *warp_size) {
    pthread_mutex_lock(&lock);
    if (number_of_kernels == room_for_kernels) {
        room_for_kernels = room_for_kernels ? 2 * room_for_kernels : 65536;
        kernels = realloc(kernels, room_for_kernels * sizeof *kernels);
    }
    kernels[number_of_kernels++] = (Kernel){function, name};
    pthread_mutex_unlock(&lock);
}

static int by_function(const void *a, const void *b) {
    const void *x = ((const Kernel *)a)->function, *y = ((const Kernel *)b)->function;
    return (x > y) - (x < y);
}

static const char *name_of(const void *function) {
    pthread_mutex_lock(&lock);
    if (sorted_kernels != number_of_kernels)
        qsort(kernels, sorted_kernels = number_of_kernels, sizeof *kernels, by_function);
    Kernel wanted = {function, NULL};
    Kernel *k = bsearch(&wanted, kernels, number_of_kernels, sizeof *kernels, by_function);
    pthread_mutex_unlock(&lock);
    return k ? k->name : "?";
}

void nullcuda_kernel(const char *name, unsigned x, unsigned y, unsigned z, void *stream) {
    launched();
    note("kernel %s grid %u,%u,%u stream %p", name, x, y, z, stream);
}

static cudaError_t launch(const void *function, dim3 grid, void *stream) {
    nullcuda_kernel(name_of(function), grid.x, grid.y, grid.z, stream);
    return cudaSuccess;
}

API cudaError_t cudaLaunchKernel(
    const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(function, grid, stream);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
    return launch(function, config->gridDim, config->stream);
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, stream);
}

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configuration;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    return cudaSuccess;
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = 10 * nullcuda_gpu()->major + nullcuda_gpu()->minor;
    attributes->maxDynamicSharedSizeBytes = nullcuda_gpu()->shared_bytes;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int block_size, size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int *blocks, const void *function, int block_size, size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) {
    static char bytes[1 << 20];
    *at = bytes;
    return cudaSuccess;
}

static int nothing(void) { return 0; }

API cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    void *found = driver ? dlsym(driver, name) : NULL;
    if (!found) note("stub %s", name);
    *function = found ? found : (void *)nothing;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
