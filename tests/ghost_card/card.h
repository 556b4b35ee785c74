// What the parts of the card share: its shape, its memory, and the faults that a test arms.
#pragma once
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static inline int setting(const char *name, int otherwise) {
  const char *value = getenv(name);
  return value ? atoi(value) : otherwise;
}
static inline int major(void) { return setting("GHOST_CAPABILITY", 89) / 10; }
static inline int minor(void) { return setting("GHOST_CAPABILITY", 89) % 10; }
static inline int multiprocessors(void) { return setting("GHOST_MULTIPROCESSORS", 46); }
static inline int data_centre(void) { return major() == 9 || major() == 10 || setting("GHOST_CAPABILITY", 89) == 80; }
static inline int shared_memory(void) {  // bytes that a block may opt in to: CUDA C++ Programming Guide, compute capabilities
  return major() == 7 ? 65536 : !data_centre() ? 101376 : major() == 8 ? 166912 : 232448;
}
static inline int threads_of_multiprocessor(void) { return major() == 7 ? 1024 : data_centre() ? 2048 : 1536; }

size_t card_memory(void);  // bytes of the card
size_t card_free(void);    // bytes that nobody holds
int card_is_lost(void);    // whether the device has fallen off the bus
int launch(void);          // a kernel or a product is launched: 0, or the error that the runtime and the driver share
