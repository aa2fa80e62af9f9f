// A CUDA driver without a GPU, for Triton's own launcher: it refuses what a real one refuses, counts launches, runs nothing.
//
// Limits are a compute capability 9.0 device's. An error's text says what came and what is accepted; Triton raises it.
// cuTensorMapEncodeTiled's rules are those of the CUDA driver API's reference, section "Tensor Map Object Management".
#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_SHARED = 227 * 1024, WITHOUT_ASKING = 48 * 1024, MOST_FUNCTIONS = 1 << 16 };

static char reason[512] = "";
static long launches, maps;
static int functions;
static int shared_granted[MOST_FUNCTIONS];

long rehearsal_launches(void) { return launches; }
long rehearsal_maps(void) { return maps; }

#define REFUSE(...) return snprintf(reason, sizeof reason, __VA_ARGS__), CUDA_ERROR_INVALID_VALUE

CUresult CUDAAPI cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_SUCCESS ? "no error" : reason;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = MOST_SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = MOST_SHARED + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 1000;
    }
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    if (++functions >= MOST_FUNCTIONS) REFUSE("more than %d functions", MOST_FUNCTIONS);
    *function = (CUfunction)(intptr_t)functions;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    // Triton asks for Blackwell's larger shared memory first, and takes no for an answer.
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) REFUSE("function attribute %d is not known", attribute);
    if (value > MOST_SHARED) REFUSE("%d bytes of shared memory asked for, at most %d are to be had", value, MOST_SHARED);
    shared_granted[(intptr_t)function] = value;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    unsigned x = config->gridDimX, y = config->gridDimY, z = config->gridDimZ;
    unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ, shared = config->sharedMemBytes;
    intptr_t index = (intptr_t)function;
    if (index < 1 || index > functions) REFUSE("a function that nobody loaded");
    if (!x || !y || !z || x > 0x7fffffffu || y > 65535 || z > 65535)
        REFUSE("a grid of %u x %u x %u programs; 1 to 2^31 - 1, 65535 and 65535 are accepted", x, y, z);
    if (!threads || threads > 1024 || threads % 32) REFUSE("%u threads; whole warps, up to 1024 threads, are accepted", threads);
    int granted = shared_granted[index] > WITHOUT_ASKING ? shared_granted[index] : WITHOUT_ASKING;
    if (shared > (unsigned)granted) REFUSE("%u bytes of shared memory, %d were granted", shared, granted);
    launches++;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box, const cuuint32_t *element_stride,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
    // By CUtensorMapDataType: uint8, uint16, uint32, int32, uint64, int64, fp16, fp32, fp64, bf16, fp32 flushed, TF32 twice.
    static const int widths[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    if ((unsigned)type >= sizeof widths / sizeof *widths) REFUSE("a tensor map of type %d", type);
    int width = widths[type];
    if ((uintptr_t)map % 64) REFUSE("a tensor map at %p; multiples of 64 bytes are accepted", (void *)map);
    if ((uintptr_t)address % 16) REFUSE("a tensor map of address %p; multiples of 16 bytes are accepted", address);
    if (rank < 1 || rank > 5) REFUSE("a tensor map of %u dimensions; 1 to 5 are accepted", rank);
    for (unsigned i = 0; i < rank; i++) {
        if (!size[i] || size[i] > 1ull << 32) REFUSE("dimension %u has %llu elements; 1 to 2^32 are accepted", i, (unsigned long long)size[i]);
        if (!box[i] || box[i] > 256) REFUSE("dimension %u of the box has %u elements; 1 to 256 are accepted", i, box[i]);
        if (!element_stride[i] || element_stride[i] > 8) REFUSE("element stride %u; 1 to 8 are accepted", element_stride[i]);
    }
    for (unsigned i = 0; i + 1 < rank; i++)
        if (stride[i] % 16 || stride[i] >= 1ull << 40)
            REFUSE("dimension %u lies %llu bytes apart; multiples of 16 below 2^40 are accepted", i + 1, (unsigned long long)stride[i]);
    unsigned row = box[0] * width;
    unsigned widest = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 1u << 30 : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                    : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 128;
    if (row % 16 || row > widest) REFUSE("a box's row has %u bytes; multiples of 16 up to %u are accepted", row, widest);
    memset(map, 0, sizeof *map);
    maps++;
    return CUDA_SUCCESS;
}

CUresult CUDAAPI cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult CUDAAPI cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult CUDAAPI cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult CUDAAPI cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult CUDAAPI cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult CUDAAPI cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult CUDAAPI cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuFuncSetCacheConfig(CUfunction function, CUfunc_cache cache) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return *status = 0, CUDA_SUCCESS; }
CUresult CUDAAPI cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    return *count = 1, CUDA_SUCCESS;
}
// An address is a device's address if it says so: the caller checks where it lies.
CUresult CUDAAPI cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}
