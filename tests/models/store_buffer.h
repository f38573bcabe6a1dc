/*
 * store_buffer.h - x86-TSO for Promela (Spin itself is sequentially consistent
 * and would bless a protocol without its fences).
 *
 *   CPU c:  STORE ---> [ sb[c]: FIFO of SB entries ] ---> mem[]     (process `memory` moves them,
 *           LOAD  <------------------------------------- mem[]      one at a time, whenever it likes)
 *           FENCE = wait until sb[c] is empty (x86: mfence / lock-prefixed instruction)
 *
 * Rule 1: every word shared between CPUs lives in mem[] and is touched by STORE and LOAD only.
 * Rule 2: a process never LOADs a word that may still be in its own buffer (so no store-to-load
 *         forwarding is needed). The C core has the same rule: it keeps private twins of its own words.
 * Rule 3: no system call is a fence here (eventfd write and epoll_wait drain the buffer on real
 *         hardware; the protocol must not depend on it).
 *
 * With -DPSO stores drain out of order as well, as on aarch64: an entry made by STORE may overtake any older
 * one of another word; an entry made by STORE_REL waits until everything older is in memory. Entries
 * of one word stay in order. (Loads are still in order and never speculated: what that leaves out is
 * said in README.md.)
 *
 * The including model defines WORDS, CPUS and CPU (index of the executing process's buffer), and ends with
 *	active proctype memory() { byte w, v; end: do FLUSH(0) ... REORDER(0, word) ... od }
 * with a FLUSH for each CPU and a REORDER for each word that a CPU may STORE.
 */
#ifndef SB
#define SB 2
#endif

byte mem[WORDS];
chan sb[CPUS] = [SB] of { byte /* word */, byte /* value */, bit /* release */ };

#define LOAD(w)		mem[w]
#define STORE(w, v)	sb[CPU]!w, v, 0
#define STORE_REL(w, v)	sb[CPU]!w, v, 1
#define FENCE		empty(sb[CPU])

#define FLUSH(c)	:: d_step { sb[c]?w, v, _ -> mem[w] = v; w = 0; v = 0 }
#ifdef PSO
#define REORDER(c, word)	:: d_step { sb[c]??eval(word), v, 0 -> mem[word] = v; v = 0 }
#else
#define REORDER(c, word)
#endif
