// NCCL for ghost cards of one machine: processes meet in shared memory, and sums are made in the order of their ranks.
// A call ends when every process has made it, and fails when one stays away or its own card is lost. What torch asks
// for and is not here, as sending from one to another, is still NCCL's own, and fails without a driver.
#define __CUDA_FP16_H__  // nccl.h includes these two, which are C++, and uses nothing of them
#define __CUDA_BF16_H__
#define _GNU_SOURCE
#include <fcntl.h>
#include <nccl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>
#include "card.h"

enum { MOST_RANKS = 8, PIECE = 1 << 20, POLL_MICROSECONDS = 50, PATIENCE_SECONDS = 120 };
struct meeting { atomic_long arrived; char of_rank[MOST_RANKS][PIECE]; };
struct ncclComm { int rank, ranks; long rounds; struct meeting *meeting; };
static long reductions;

static ncclResult_t meet(ncclComm_t group) {  // until all ranks have come here as often as this one
  if (card_is_lost()) return ncclUnhandledCudaError;
  long wanted = ++group->rounds * group->ranks, polls = 0;
  atomic_fetch_add(&group->meeting->arrived, 1);
  while (atomic_load(&group->meeting->arrived) < wanted) {
    if (++polls > PATIENCE_SECONDS * 1000000L / POLL_MICROSECONDS) return ncclRemoteError;
    usleep(POLL_MICROSECONDS);
  }
  return ncclSuccess;
}

ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
  static int made;
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "/ghost-nccl-%d-%d", getpid(), made++);
  return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *made, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config) {
  int file = ranks <= MOST_RANKS ? shm_open(id.internal, O_CREAT | O_RDWR, 0600) : -1;
  if (file < 0 || ftruncate(file, sizeof(struct meeting))) return ncclSystemError;
  ncclComm_t group = calloc(1, sizeof *group);
  group->rank = rank, group->ranks = ranks;
  group->meeting = mmap(NULL, sizeof(struct meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  ncclResult_t met = meet(group);
  shm_unlink(id.internal);  // all have it
  *made = group;
  return met;
}
ncclResult_t ncclCommInitRank(ncclComm_t *made, int ranks, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(made, ranks, id, rank, NULL);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *made, int ranks, int rank, int ids, ncclUniqueId *id, ncclConfig_t *config) {
  return ncclCommInitRankConfig(made, ranks, *id, rank, config);
}
ncclResult_t ncclCommFinalize(ncclComm_t group) { return ncclSuccess; }
ncclResult_t ncclCommDestroy(ncclComm_t group) { return ncclSuccess; }
ncclResult_t ncclCommAbort(ncclComm_t group) { return ncclSuccess; }
ncclResult_t ncclCommGetAsyncError(ncclComm_t group, ncclResult_t *error) { return *error = ncclSuccess; }
ncclResult_t ncclCommCount(const ncclComm_t group, int *ranks) { *ranks = group->ranks; return ncclSuccess; }
ncclResult_t ncclCommUserRank(const ncclComm_t group, int *rank) { *rank = group->rank; return ncclSuccess; }
ncclResult_t ncclGroupStart(void) { return ncclSuccess; }
ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }
const char *ncclGetLastError(ncclComm_t group) { return ""; }
const char *ncclGetErrorString(ncclResult_t error) {
  return error == ncclSuccess ? "no error" : error == ncclRemoteError ? "a process stayed away (ghost card)" : "an error of the ghost card";
}

static size_t width(ncclDataType_t type) {
  static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return bytes[type];
}
#define SUM(type) \
  for (size_t i = 0; i < count; i++) { \
    type total = 0; \
    for (int r = 0; r < group->ranks; r++) total += ((type *)group->meeting->of_rank[r])[i]; \
    ((type *)to)[i] = operation == ncclAvg ? total / group->ranks : total; \
  }
static ncclResult_t sum(void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t group) {
  switch (type) {
    case ncclFloat32: SUM(float) break;
    case ncclFloat64: SUM(double) break;
    case ncclInt32: SUM(int32_t) break;
    case ncclInt64: SUM(int64_t) break;
    default: return ncclInvalidArgument;
  }
  return ncclSuccess;
}
ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t group, cudaStream_t stream) {
  if (operation != ncclSum && operation != ncclAvg) return ncclInvalidArgument;
  reductions++;
  size_t bytes = width(type), at_once = PIECE / bytes;
  for (size_t done = 0; done < count; done += at_once) {
    size_t now = count - done < at_once ? count - done : at_once;
    memcpy(group->meeting->of_rank[group->rank], (char *)from + done * bytes, now * bytes);
    ncclResult_t result = meet(group);
    if (!result) result = sum((char *)to + done * bytes, now, type, operation, group);
    if (result || (result = meet(group))) return result;
  }
  return ncclSuccess;
}
ncclResult_t ncclAllGather(const void *from, void *to, size_t count, ncclDataType_t type, ncclComm_t group, cudaStream_t stream) {
  size_t bytes = count * width(type);
  for (size_t done = 0; done < bytes; done += PIECE) {
    size_t now = bytes - done < PIECE ? bytes - done : PIECE;
    memcpy(group->meeting->of_rank[group->rank], (char *)from + done, now);
    ncclResult_t result = meet(group);
    for (int r = 0; r < group->ranks && !result; r++) memcpy((char *)to + r * bytes + done, group->meeting->of_rank[r], now);
    if (result || (result = meet(group))) return result;
  }
  return ncclSuccess;
}
ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t type, int root, ncclComm_t group, cudaStream_t stream) {
  size_t bytes = count * width(type);
  for (size_t done = 0; done < bytes; done += PIECE) {
    size_t now = bytes - done < PIECE ? bytes - done : PIECE;
    if (group->rank == root) memcpy(group->meeting->of_rank[root], (char *)from + done, now);
    ncclResult_t result = meet(group);
    if (!result) memcpy((char *)to + done, group->meeting->of_rank[root], now);
    if (result || (result = meet(group))) return result;
  }
  return ncclSuccess;
}
ncclResult_t ncclBcast(void *at, size_t count, ncclDataType_t type, int root, ncclComm_t group, cudaStream_t stream) {
  return ncclBroadcast(at, at, count, type, root, group, stream);
}

__attribute__((destructor)) static void report(void) {
  if (getenv("GHOST_REPORT") && reductions) fprintf(stderr, "ghost card: %ld reductions over the processes\n", reductions);
}
