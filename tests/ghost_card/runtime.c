// The CUDA runtime and cuBLAS of a card that is not there: memory, streams and handles are handed out, nothing is computed.
// Memory is reserved from the host and written only by copies, so a card of 12 GiB costs what is really copied to it.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <time.h>
#include "card.h"

enum { SLOTS = 1 << 16, PAGE = 2 << 20, SMALL_COPY = 1 << 16 };
static struct { char *at; size_t size; } blocks[SLOTS];
static size_t held, peak, taken_by_others;
static long launches, allocations;
static int device_lost, lost_at_launch, allocations_to_refuse, host_memory_refused, launches_refused, struck;
static _Thread_local int current_device;
static _Thread_local cudaError_t last_error;

static cudaError_t fail(cudaError_t error) { struck++; return last_error = error; }
static cudaError_t alive(void) { return device_lost ? fail(cudaErrorLaunchFailure) : cudaSuccess; }
size_t card_memory(void) { return (size_t)setting("GHOST_MIB", 12282) << 20; }
size_t card_free(void) {
  size_t used = held + taken_by_others;
  return card_memory() > used ? card_memory() - used : 0;
}
int card_is_lost(void) { return device_lost; }
int launch(void) {
  launches++;
  device_lost |= lost_at_launch;
  return launches_refused ? fail(cudaErrorInvalidDeviceFunction) : alive();
}

// What a test arms, and what it asks afterwards.
void ghost_lose_device(void) { device_lost = 1; }
void ghost_lose_device_at_launch(void) { lost_at_launch = 1; }
void ghost_take_memory(void) { taken_by_others = card_free(); }  // another process takes all that is free
void ghost_give_memory_back(void) { taken_by_others = 0; }
void ghost_refuse_allocations(int count) { allocations_to_refuse = count; }
void ghost_refuse_host_memory(void) { host_memory_refused = 1; }
void ghost_refuse_launches(void) { launches_refused = 1; }  // a launch is then work that the host did not do
int ghost_struck(void) { return struck; }
long ghost_launches(void) { return launches; }
size_t ghost_peak(void) { return peak; }
void ghost_forget_peak(void) { peak = held; }

cudaError_t cudaGetDeviceCount(int *count) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  *count = visible && !*visible ? 0 : setting("GHOST_COUNT", 1);
  return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int *device) { *device = current_device; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { current_device = device; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaGetLastError(void) { cudaError_t error = last_error; last_error = cudaSuccess; return error; }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    default: return "an error of the ghost card";
  }
}
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorInvalidDeviceFunction: return "the host computes no such kernel (ghost card)";
    default: return "an error of the ghost card";
  }
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  const char *name = getenv("GHOST_NAME");
  memset(found, 0, sizeof *found);
  snprintf(found->name, sizeof found->name, "%s", name ? name : "NVIDIA GeForce RTX 4070");
  found->totalGlobalMem = card_memory();
  found->major = major(), found->minor = minor(), found->multiProcessorCount = multiprocessors();
  found->warpSize = 32, found->maxThreadsPerBlock = 1024, found->maxBlocksPerMultiProcessor = 24;
  found->maxThreadsPerMultiProcessor = threads_of_multiprocessor();
  found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->sharedMemPerBlock = 49152, found->sharedMemPerBlockOptin = shared_memory();
  found->sharedMemPerMultiprocessor = shared_memory() + 1024;
  found->l2CacheSize = 36 << 20, found->memoryBusWidth = 192, found->totalConstMem = 65536;
  found->textureAlignment = 512, found->unifiedAddressing = 1;
  found->uuid.bytes[0] = device + 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp card;
  cudaGetDeviceProperties(&card, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = card.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = card.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = card.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = card.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = card.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = card.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = card.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = card.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = card.regsPerBlock; break;
    case cudaDevAttrWarpSize: *value = card.warpSize; break;
    case cudaDevAttrMaxGridDimX: *value = card.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = card.maxGridSize[1]; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = card.maxThreadsDim[0]; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

static int on_card(const void *at) {
  for (int i = 0; i < SLOTS; i++)
    if (blocks[i].at && (char *)at >= blocks[i].at && (char *)at < blocks[i].at + blocks[i].size) return 1;
  return 0;
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *total = card_memory(), *available = card_free();
  return alive();
}
cudaError_t cudaMalloc(void **at, size_t size) {
  *at = NULL, size = (size + PAGE - 1) / PAGE * PAGE;
  if (alive()) return last_error;
  if (allocations_to_refuse) return allocations_to_refuse--, fail(cudaErrorMemoryAllocation);
  if (size > card_free()) return taken_by_others && struck++, last_error = cudaErrorMemoryAllocation;
  char *found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return last_error = cudaErrorMemoryAllocation;
  int slot = 0;
  while (blocks[slot].at) slot++;
  blocks[slot].at = found, blocks[slot].size = size;
  allocations++, held += size;
  if (held > peak) peak = held;
  *at = found;
  return cudaSuccess;
}
cudaError_t cudaFree(void *at) {
  for (int i = 0; at && i < SLOTS; i++)
    if (blocks[i].at == at) {
      munmap(at, blocks[i].size);
      held -= blocks[i].size, blocks[i].at = NULL;
      break;
    }
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void **at, size_t size, cudaStream_t stream) { return cudaMalloc(at, size); }
cudaError_t cudaFreeAsync(void *at, cudaStream_t stream) { return cudaFree(at); }
cudaError_t cudaHostAlloc(void **at, size_t size, unsigned flags) {
  if (alive()) return last_error;
  if (host_memory_refused) return fail(cudaErrorMemoryAllocation);
  *at = aligned_alloc(4096, (size + 4095) & ~(size_t)4095);
  return *at ? cudaSuccess : (last_error = cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void *at) { free(at); return cudaSuccess; }
// Within the card only small things move, unless values are wanted: a large copy would touch memory that holds nothing.
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  if (alive()) return last_error;
  if (launches_refused || size <= SMALL_COPY || !(on_card(to) && on_card(from))) memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, size, kind, NULL);
}
cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t stream) {
  if (alive()) return last_error;
  if (launches_refused || size <= SMALL_COPY) memset(at, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *at, int value, size_t size) { return cudaMemsetAsync(at, value, size, NULL); }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *at) {
  memset(found, 0, sizeof *found);
  found->type = on_card(at) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  found->devicePointer = found->hostPointer = (void *)at;
  return cudaSuccess;
}

static void *handle(void) { return calloc(1, 64); }
static double milliseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
}
cudaError_t cudaDeviceSynchronize(void) { return alive(); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) { snprintf(id, size, "0000:%02d:00.0", device + 1); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) { *can = 0; return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return alive(); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return alive(); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) { *status = cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = handle(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { *(double *)event = milliseconds(); return alive(); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return alive(); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return alive(); }
cudaError_t cudaEventElapsedTime(float *elapsed, cudaEvent_t from, cudaEvent_t to) { *elapsed = *(double *)to - *(double *)from; return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024, found->numRegs = 64;
  int card = major() * 10 + minor();
  found->binaryVersion = found->ptxVersion = card == 89 ? 86 : card;  // torch has no code for 8.9 apart; cub looks for what it has
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t memory, unsigned flags) { *blocks = 2; return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
  *found = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) { *at = handle(); return cudaSuccess; }

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t memory, cudaStream_t stream) { return launch(); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *kernel, void **arguments) { return launch(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t memory, cudaStream_t stream) { return launch(); }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = handle(); return cudaSuccess; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t memory, void *stream) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *memory, void *stream) {
  *grid = *block = (dim3){1, 1, 1}, *memory = 0, *(void **)stream = NULL;
  return cudaSuccess;
}
void **__cudaRegisterFatBinary(void *binary) { static void *module[8]; return module; }
void __cudaRegisterFatBinaryEnd(void **module) {}
void __cudaUnregisterFatBinary(void **module) {}
void __cudaRegisterFunction(void **module, const char *host, char *device, const char *name, int limit, void *thread, void *block, void *block_size, void *grid, int *warp) {}
void __cudaRegisterVar(void **module, char *host, char *address, const char *name, int external, size_t size, int constant, int global) {}

// cuBLAS and cuBLASLt: one algorithm is found for every product. The products themselves are in the generated part.
int cublasCreate_v2(void **library) { *library = handle(); return 0; }
int cublasLtCreate(void **library) { *library = handle(); return 0; }
int cublasGetMathMode(void *library, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *library, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulDescCreate(void **found, int compute, int scale) { *found = handle(); return 0; }
int cublasLtMatrixLayoutCreate(void **found, int type, unsigned long rows, unsigned long columns, long leading) { *found = handle(); return 0; }
int cublasLtMatmulPreferenceCreate(void **found) { *found = handle(); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *library, void *what, void *a, void *b, void *c, void *d, void *preference, int wanted, void *results, int *found) {
  memset(results, 0, 64 + 8 + 4 + 4 + 16);  // cublasLtMatmulHeuristicResult_t: algorithm, workspace, state (0: success), waves
  *found = 1;
  return 0;
}

__attribute__((destructor)) static void report(void) {
  if (getenv("GHOST_REPORT") && launches)
    fprintf(stderr, "ghost card: peak %.0f MiB, %ld allocations, %ld launches\n", peak / 1048576.0, allocations, launches);
}
