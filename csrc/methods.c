/* methods.c - see methods.h. */
#include "methods.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint32_t hash(const void *name, size_t bytes)
{
    const uint8_t *text = name;
    uint32_t value = 2166136261u; /* FNV-1a */

    for (size_t i = 0; i < bytes; i++)
        value = (value ^ text[i]) * 16777619u;
    return value;
}

/* The place of this name, or the free place where it belongs. */
static struct method *place(struct method *table, uint32_t capacity, const void *name,
                            size_t bytes)
{
    uint32_t i = hash(name, bytes) & (capacity - 1);

    while (table[i].bytes != 0 &&
           (table[i].bytes != bytes || memcmp(table[i].name, name, bytes) != 0))
        i = (i + 1) & (capacity - 1);
    return &table[i];
}

static int grow(struct methods *methods)
{
    uint32_t capacity = methods->capacity == 0 ? 64 : methods->capacity * 2;
    struct method *table = calloc(capacity, sizeof *table);

    if (table == NULL)
        return -ENOMEM;
    for (uint32_t i = 0; i < methods->capacity; i++) {
        const struct method *old = &methods->table[i];
        if (old->bytes != 0)
            *place(table, capacity, old->name, old->bytes) = *old;
    }
    free(methods->table);
    methods->table = table;
    methods->capacity = capacity;
    return 0;
}

int methods_add(struct methods *methods, const char *name, size_t bytes, int32_t index, bool fast)
{
    if (bytes == 0 || bytes > SHMRPC_METHOD_MAX)
        return -EINVAL;
    if (methods->count >= methods->capacity / 2) {
        int status = grow(methods);
        if (status < 0)
            return status;
    }
    struct method *method = place(methods->table, methods->capacity, name, bytes);
    if (method->bytes == 0)
        methods->count++;
    memcpy(method->name, name, bytes);
    method->bytes = (uint8_t)bytes;
    method->index = index;
    method->fast = fast;
    return 0;
}

struct method *methods_find(const struct methods *methods, const uint8_t *name, size_t bytes)
{
    if (methods->capacity == 0 || bytes == 0 || bytes > SHMRPC_METHOD_MAX)
        return NULL;
    struct method *method = place(methods->table, methods->capacity, name, bytes);
    return method->bytes != 0 ? method : NULL;
}

void methods_free(struct methods *methods)
{
    free(methods->table);
    *methods = (struct methods){0};
}
