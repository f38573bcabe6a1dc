/* methods.h - which index belongs to a method name, so that a request needs no lookup in Python. */
#ifndef SHMRPC_METHODS_H
#define SHMRPC_METHODS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "shmrpc.h"

struct method {
    char name[SHMRPC_METHOD_MAX];
    uint8_t bytes;
    bool fast;
    int32_t index;
    uint64_t calls; /* that were started */
};

struct methods {
    struct method *table; /* open addressing; a free place has bytes == 0 */
    uint32_t capacity, count;
};

/* Add or replace. 0, -EINVAL, -ENOMEM. */
int methods_add(struct methods *methods, const char *name, size_t bytes, int32_t index, bool fast);
/* Null if unknown. */
struct method *methods_find(const struct methods *methods, const uint8_t *name, size_t bytes);
void methods_free(struct methods *methods);

#endif
