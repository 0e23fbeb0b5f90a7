/* NCCL between the processes of one host: they meet in shared memory at each collective, which holds their
   order; small buffers are really reduced and gathered. */
#include "nullcuda.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define RANKS 16
#define PATIENCE 300 /* seconds */

typedef struct {
    char bytes[128];
} Id;
typedef struct {
    volatile int arrived, round;
    int color[RANKS], key[RANKS];
    char doing[RANKS][128];
    char buffer[RANKS][CARRIED];
} Shared;
typedef struct {
    int size, rank, splits;
    char name[112];
    Shared *shared;
} Comm;

/* ---- meeting ---- */

static void give_up(const Comm *c) {
    for (int i = 0; i < c->size; i++)
        fprintf(stderr, "null NCCL, rank %d of %s: %s\n", i, c->name, c->shared->doing[i]);
    abort();
}

static void meet(Comm *c) {
    Shared *s = c->shared;
    int round = s->round;
    if (__sync_add_and_fetch(&s->arrived, 1) == c->size) {
        s->arrived = 0;
        __sync_synchronize();
        s->round = round + 1;
        return;
    }
    for (time_t began = time(NULL); s->round == round; usleep(50))
        if (time(NULL) - began > PATIENCE) give_up(c);
}

static Comm *join(int size, int rank, const char *name) {
    Comm *c = calloc(1, sizeof *c);
    *c = (Comm){.size = size, .rank = rank};
    snprintf(c->name, sizeof c->name, "%s", name);
    int file = shm_open(c->name, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared))) abort();
    c->shared = mmap(0, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    meet(c);
    if (rank == 0) shm_unlink(c->name);
    return c;
}

API int ncclGetVersion(int *version) { *version = 23007; return 0; }
API const char *ncclGetErrorString(int error) { return "an error of the null device"; }
API const char *ncclGetLastError(void *comm) { return ""; }
API int ncclCommGetAsyncError(void *comm, int *error) { *error = 0; return 0; }
API int ncclCommCount(Comm *c, int *size) { *size = c->size; return 0; }
API int ncclCommUserRank(Comm *c, int *rank) { *rank = c->rank; return 0; }

API int ncclGetUniqueId(Id *id) {
    static int number;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, 80, "/nullcuda_%d_%d_%ld", getpid(), number++, now.tv_nsec);
    return 0;
}
API int ncclCommInitRank(void **comm, int size, Id id, int rank) {
    *comm = join(size, rank, id.bytes);
    note("nccl init %p ranks %d", *comm, size);
    return 0;
}
API int ncclCommInitRankConfig(void **comm, int size, Id id, int rank, void *config) {
    return ncclCommInitRank(comm, size, id, rank);
}
API int ncclCommInitRankScalable(void **comm, int size, int rank, int ids, Id *id, void *config) {
    return ncclCommInitRank(comm, size, id[0], rank);
}
API int ncclCommSplit(Comm *parent, int color, int key, void **comm, void *config) {
    Shared *s = parent->shared;
    s->color[parent->rank] = color;
    s->key[parent->rank] = key;
    meet(parent);
    int size = 0, rank = 0;
    for (int i = 0; i < parent->size; i++) {
        if (s->color[i] != color) continue;
        size++;
        rank += s->key[i] < key || (s->key[i] == key && i < parent->rank);
    }
    meet(parent);
    char name[112];
    snprintf(name, sizeof name, "%.90s_%d_%d", parent->name, parent->splits++, color);
    *comm = color < 0 ? NULL : join(size, rank, name);
    note("nccl split %p of %p ranks %d", *comm, (void *)parent, size);
    return 0;
}

/* ---- collectives ---- */

static size_t size_of(int type) {
    static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return sizes[type];
}

/* Notes a collective, waits for the others, and stops if they are at another one. */
static void begin(Comm *c, const char *name, size_t count, int type, void *stream) {
    note("nccl %s comm %p count %zu type %d stream %p", name, (void *)c, count, type, stream);
    snprintf(c->shared->doing[c->rank], 128, "%s of %zu numbers of type %d", name, count, type);
    meet(c);
    for (int i = 0; i < c->size; i++)
        if (strcmp(c->shared->doing[i], c->shared->doing[c->rank])) give_up(c);
}

#define REDUCE(T)                                                                      \
    for (size_t i = 0; i < count; i++) {                                               \
        T *x = sum, *y = part;                                                         \
        x[i] = op == 1 ? x[i] * y[i] : op == 2 ? (x[i] > y[i] ? x[i] : y[i])           \
             : op == 3 ? (x[i] < y[i] ? x[i] : y[i]) : x[i] + y[i];                    \
    }

static void reduce_into(void *sum, void *part, size_t count, int type, int op) {
    switch (type) {
    case 0: REDUCE(int8_t) break;
    case 1: REDUCE(uint8_t) break;
    case 2: REDUCE(int32_t) break;
    case 3: REDUCE(uint32_t) break;
    case 4: REDUCE(int64_t) break;
    case 5: REDUCE(uint64_t) break;
    case 7: REDUCE(float) break;
    case 8: REDUCE(double) break;
    default: memset(sum, 0, count * size_of(type)); /* no sum in 16 bits is ever read */
    }
}

/* Puts into `to` what all ranks' `from` come to: reduced from `first` on, or that of `root`, or all in a row. */
enum Kind { REDUCED, GATHERED, SENT };
static int exchange(
    Comm *c, enum Kind kind, const void *from, void *to, size_t count, int type, int op, int root, size_t first,
    size_t taken) {
    size_t size = count * size_of(type), one = size_of(type);
    if (size > CARRIED) { /* no bytes are known; so none are, either, where they would go */
        put(to, NULL, kind == GATHERED ? size * c->size : taken * one);
        return 0;
    }
    if (from) get(c->shared->buffer[c->rank], from, size);
    meet(c);
    static __thread char sum[CARRIED];
    if (kind == REDUCED) {
        memcpy(sum, c->shared->buffer[0], size);
        for (int i = 1; i < c->size; i++) reduce_into(sum, c->shared->buffer[i], count, type, op);
        put(to, sum + first * one, taken * one);
    } else if (kind == SENT) {
        put(to, c->shared->buffer[root], size);
    } else {
        for (int i = 0; i < c->size; i++) put((char *)to + i * size, c->shared->buffer[i], size);
    }
    meet(c);
    return 0;
}

API int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, Comm *c, void *stream) {
    begin(c, "AllReduce", count, type, stream);
    return exchange(c, REDUCED, from, to, count, type, op, 0, 0, count);
}
API int ncclReduce(
    const void *from, void *to, size_t count, int type, int op, int root, Comm *c, void *stream) {
    begin(c, "Reduce", count, type, stream);
    return exchange(c, REDUCED, from, to, count, type, op, root, 0, c->rank == root ? count : 0);
}
API int ncclReduceScatter(const void *from, void *to, size_t count, int type, int op, Comm *c, void *stream) {
    begin(c, "ReduceScatter", count, type, stream);
    return exchange(c, REDUCED, from, to, count * c->size, type, op, 0, c->rank * count, count);
}
API int ncclAllGather(const void *from, void *to, size_t count, int type, Comm *c, void *stream) {
    begin(c, "AllGather", count, type, stream);
    return exchange(c, GATHERED, from, to, count, type, 0, 0, 0, count);
}
API int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Comm *c, void *stream) {
    begin(c, "Broadcast", count, type, stream);
    return exchange(c, SENT, c->rank == root ? from : NULL, to, count, type, 0, root, 0, count);
}
API int ncclBcast(void *at, size_t count, int type, int root, Comm *c, void *stream) {
    return ncclBroadcast(at, at, count, type, root, c, stream);
}
