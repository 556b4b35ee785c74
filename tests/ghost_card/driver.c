// The CUDA driver of a card that is not there: Triton's cubins load and have attributes, their launches do nothing.
#include "card.h"

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetCount(int *count) { *count = setting("GHOST_COUNT", 1); return 0; }
int cuGetErrorName(int error, const char **name) { *name = error == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = error == 719 ? "unspecified launch failure" : "the host computes no such kernel (ghost card)"; return 0; }
static int context;
int cuCtxGetCurrent(void **found) { *found = &context; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **found, int device) { *found = &context; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {  // the numbers of CUdevice_attribute
  switch (attribute) {
    case 1: *value = 1024; break;                          // MAX_THREADS_PER_BLOCK
    case 8: *value = 49152; break;                         // MAX_SHARED_MEMORY_PER_BLOCK
    case 10: *value = 32; break;                           // WARP_SIZE
    case 12: case 82: *value = 65536; break;               // MAX_REGISTERS_PER_BLOCK, _PER_MULTIPROCESSOR
    case 13: case 36: *value = 2500000; break;             // CLOCK_RATE, MEMORY_CLOCK_RATE, kHz
    case 16: *value = multiprocessors(); break;            // MULTIPROCESSOR_COUNT
    case 37: *value = 192; break;                          // GLOBAL_MEMORY_BUS_WIDTH
    case 39: *value = threads_of_multiprocessor(); break;  // MAX_THREADS_PER_MULTIPROCESSOR
    case 75: *value = major(); break;                      // COMPUTE_CAPABILITY_MAJOR
    case 76: *value = minor(); break;                      // COMPUTE_CAPABILITY_MINOR
    case 81: *value = shared_memory() + 1024; break;       // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 97: *value = shared_memory(); break;              // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    default: *value = 0;
  }
  return 0;
}
int cuModuleLoadData(void **module, const void *image) { *module = calloc(1, 64); return 0; }
int cuModuleLoadDataEx(void **module, const void *image, unsigned count, void *options, void *values) { return cuModuleLoadData(module, image); }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = calloc(1, 64); return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0;  // MAX_THREADS_PER_BLOCK, NUM_REGS; no bytes are spilled
  return 0;
}
int cuPointerGetAttribute(void *value, int attribute, unsigned long long at) { *(unsigned long long *)value = at; return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, void *how) { *count = 1; return 0; }
int cuMemGetInfo_v2(size_t *available, size_t *total) { *total = card_memory(), *available = card_free(); return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuLaunchKernel(void *function, ...) { return launch(); }
int cuLaunchKernelEx(void *how, void *function, void **arguments, void **extra) { return launch(); }
