/* service.c - see service.h. */
#include "service.h"

#include <errno.h>
#include <stdlib.h>

static void *work(void *argument);

static void start_thread(struct service *service)
{
    pthread_mutex_lock(&service->lock);
    REQUIRE(service->thread_count < SERVICE_THREADS_MAX);
    pthread_t *thread = &service->threads[service->thread_count++];
    REQUIRE(pthread_create(thread, NULL, work, service) == 0);
    pthread_mutex_unlock(&service->lock);
}

static void block(struct service *service)
{
    pthread_mutex_lock(&service->lock);
    service->blocked++;
    service->blocked_total++;
    pthread_cond_broadcast(&service->changed);
    while (!service->gate_open)
        pthread_cond_wait(&service->changed, &service->lock);
    service->blocked--;
    pthread_mutex_unlock(&service->lock);
}

static void count(struct service *service, uint32_t *field)
{
    pthread_mutex_lock(&service->lock);
    ++*field;
    pthread_cond_broadcast(&service->changed);
    pthread_mutex_unlock(&service->lock);
}

static int64_t run(struct service *service, shmrpc_slot *slot)
{
    const shmrpc_message *message = shmrpc_slot_message(slot);
    const char *body = (const char *)message->body;

    switch (message->method) {
    case METHOD_BLOCK:
        block(service);
        break;
    case METHOD_FAIL:
        shmrpc_reply_metadata(slot, "meta", 4);
        shmrpc_reply(slot, 2, body, message->body_bytes);
        return shmrpc_next(slot);
    case METHOD_NOTE:
        count(service, &service->notes);
        break;
    case METHOD_LARGE: {
        char *large = calloc(1, 3u << 20);
        int64_t result = shmrpc_reply_next(slot, large, 3u << 20);
        free(large);
        return result;
    }
    default:
        break;
    }
    return shmrpc_reply_next(slot, body, message->body_bytes);
}

static void *work(void *argument)
{
    struct service *service = argument;
    shmrpc_slot *slot = shmrpc_worker_new(service->poller);

    REQUIRE(slot != NULL);
    int64_t result = shmrpc_next(slot);
    while (result != SHMRPC_STOPPED) {
        if (result >= 0 || result == SHMRPC_MESSAGE) {
            result = run(service, slot);
            continue;
        }
        if (result == SHMRPC_SPAWN) {
            start_thread(service);
        } else if (result == SHMRPC_EVENTS) {
            while (shmrpc_take(slot))
                if (shmrpc_slot_message(slot)->kind == SHMRPC_CLOSED)
                    count(service, &service->closed);
        } else if (result == -EMSGSIZE) {
            shmrpc_reply(slot, 8, NULL, 0);
        } else if (result != -EINTR) {
            service->odd = result;
            sleep_us(1000);
        }
        result = shmrpc_next(slot);
    }
    shmrpc_slot_free(slot);
    return NULL;
}

void service_open(struct service *service, uint32_t workers, uint32_t max_concurrency,
                  uint32_t mode)
{
    *service = (struct service){
        .poller = shmrpc_poller_new(workers, max_concurrency, mode, 0),
        .lock = PTHREAD_MUTEX_INITIALIZER,
        .changed = PTHREAD_COND_INITIALIZER,
    };
    REQUIRE(service->poller != NULL);
    CHECK_EQUAL(shmrpc_method_add(service->poller, "echo", 4, METHOD_ECHO, 1), 0);
    CHECK_EQUAL(shmrpc_method_add(service->poller, "block", 5, METHOD_BLOCK, 1), 0);
    CHECK_EQUAL(shmrpc_method_add(service->poller, "fail", 4, METHOD_FAIL, 0), 0);
    CHECK_EQUAL(shmrpc_method_add(service->poller, "note", 4, METHOD_NOTE, 0), 0);
    CHECK_EQUAL(shmrpc_method_add(service->poller, "large", 5, METHOD_LARGE, 1), 0);
    start_thread(service);
    start_thread(service);
}

void service_gate(struct service *service, bool open)
{
    pthread_mutex_lock(&service->lock);
    service->gate_open = open;
    pthread_cond_broadcast(&service->changed);
    pthread_mutex_unlock(&service->lock);
}

void service_await(struct service *service, const uint32_t *field, uint32_t value)
{
    pthread_mutex_lock(&service->lock);
    while (*field < value)
        pthread_cond_wait(&service->changed, &service->lock);
    pthread_mutex_unlock(&service->lock);
}

void service_join(struct service *service)
{
    shmrpc_poller_stop(service->poller);
    for (uint32_t i = 0;; i++) {
        pthread_mutex_lock(&service->lock);
        bool more = i < service->thread_count;
        pthread_t thread = more ? service->threads[i] : pthread_self();
        pthread_mutex_unlock(&service->lock);
        if (!more)
            break;
        pthread_join(thread, NULL);
    }
    service->thread_count = 0;
}

void service_close(struct service *service)
{
    service_gate(service, true);
    service_join(service);
    CHECK_EQUAL(service->odd, 0);
    shmrpc_poller_free(service->poller);
    service->poller = NULL;
}

int64_t wait_on(shmrpc_slot *slot, int64_t result)
{
    while (result == -EAGAIN || result == -EINTR)
        result = shmrpc_wait(slot);
    return result;
}

int64_t call(shmrpc_slot *slot, const char *method, const uint8_t *body, size_t body_bytes,
             int64_t timeout_ns)
{
    shmrpc_name name = name_of(method);

    return wait_on(slot, shmrpc_call(slot, &name, (const char *)body, body_bytes, timeout_ns));
}

int64_t events(shmrpc_slot *slot, int64_t timeout_ns)
{
    int64_t result;

    while ((result = shmrpc_wait_events(slot, timeout_ns)) == -EAGAIN || result == -EINTR) {
    }
    return result;
}

int64_t flush(shmrpc_slot *slot, int64_t timeout_ns)
{
    int64_t result = wait_on(slot, shmrpc_flush(slot, timeout_ns));

    while (result == SHMRPC_EVENTS) {
        while (shmrpc_take(slot)) {
        }
        result = wait_on(slot, shmrpc_wait(slot));
    }
    return result;
}

bool echo_works(shmrpc_slot *slot, size_t body_bytes, uint64_t seed)
{
    uint8_t *body = malloc(body_bytes + 1);

    fill(body, body_bytes, seed);
    int64_t result = call(slot, "echo", body, body_bytes, -1);
    free(body);
    const shmrpc_message *message = shmrpc_slot_message(slot);
    if (result >= 0)
        return (size_t)result == body_bytes && filled(shmrpc_slot_view(slot), body_bytes, seed);
    return result == SHMRPC_MESSAGE && message->status == 0 && message->body_bytes == body_bytes &&
           filled(message->body, body_bytes, seed);
}
