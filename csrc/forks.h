/* forks.h - knowing in a forked child what is the parent's: its locks may be held by threads that
 * the child does not have.
 */
#ifndef SHMRPC_FORKS_H
#define SHMRPC_FORKS_H

#include <stdint.h>

/* Count from now on. Any thread, any number of times. */
void forks_watch(void);
/* How many forks lie between this process and the one that began to count: what was made at another
 * number is inherited. */
uint64_t forks_seen(void);

#endif
