// NVML of a card that is not there. GHOST_NVML is "missing", "raises" or "no energy" where something is wrong with it.
#include "card.h"

enum { OK = 0, NOT_SUPPORTED = 3, LIBRARY_NOT_FOUND = 12, GPU_IS_LOST = 15 };  // nvmlReturn_t
static int is(const char *what) {
  const char *value = getenv("GHOST_NVML");
  return value && !strcmp(value, what);
}
static int reading(void) { return is("raises") || card_is_lost() ? GPU_IS_LOST : OK; }

int nvmlInit_v2(void) { return is("missing") ? LIBRARY_NOT_FOUND : OK; }
int nvmlInitWithFlags(unsigned flags) { return nvmlInit_v2(); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int error) { return error == GPU_IS_LOST ? "GPU is lost" : "an error of the ghost card"; }
int nvmlSystemGetDriverVersion(char *version, unsigned size) {
  const char *value = getenv("GHOST_DRIVER");
  snprintf(version, size, "%s", value ? value : "580.95.05");
  return OK;
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = setting("GHOST_DRIVER_CUDA", 13000); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = setting("GHOST_COUNT", 1); return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(size_t)(index + 1); return OK; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = (void *)1; return OK; }
int nvmlDeviceGetName(void *device, char *name, unsigned size) {
  const char *value = getenv("GHOST_NAME");
  snprintf(name, size, "%s", value ? value : "NVIDIA GeForce RTX 4070");
  return OK;
}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *found) {  // nvmlMemory_t: total, free, used
  found[0] = card_memory(), found[1] = card_free(), found[2] = found[0] - found[1];
  return OK;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *high, int *low) { *high = major(), *low = minor(); return OK; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 168000; return reading(); }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
  static unsigned long long used;
  *millijoules = used += 1000;
  return is("no energy") ? NOT_SUPPORTED : reading();
}
