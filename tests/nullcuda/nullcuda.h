/* What the sources of the null device share. */
#ifndef NULLCUDA_H
#define NULLCUDA_H

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>

#define API __attribute__((visibility("default")))

/* Bytes that a copy may have to carry what it copies; a larger one is only counted. */
#define CARRIED 65536

/* The GPU that is answered for: NULLCUDA_DEVICE, h100 by default. */
typedef struct {
    const char *id, *name;
    size_t bytes;
    int major, minor, multiprocessors, shared_bytes, l2_bytes, bus_bits;
} Gpu;
API const Gpu *nullcuda_gpu(void);
API int nullcuda_devices(void); /* how many of it: NULLCUDA_DEVICES, 1 by default */

/* A line of the log, if NULLCUDA_LOG names one. */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Device memory holds no bytes. It reads as zeros, but for what a small copy put there since the last kernel:
   a kernel might have written anywhere, so it makes all of them unknown. */
void put(void *at, const void *bytes, size_t size);
void get(void *bytes, const void *at, size_t size);
void launched(void);

/* Notes a launch, which runs nothing. */
API void nullcuda_kernel(const char *name, unsigned x, unsigned y, unsigned z, void *stream);

#endif
