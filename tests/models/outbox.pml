/*
 * outbox.pml - a full ring in a process with several threads: who flushes the outbox?
 *
 * Mirrors  conn.c    conn_send() from any thread: publish, or put into the outbox and ask for space
 *          poller.c  the thread that drains and sleeps for all (it alone arms)
 *          wake.c    wake_arm(), wake_disarm(), wake_peer()
 *
 * Three CPUs: S = a thread that sends M messages and does not wait for anything (notify), P = the
 * poller of the same process, R = the peer, which drains S's messages and sends D of its own. Words:
 *     W_TAIL, W_SLOT  the ring that S and P fill        W: holder of the process's lock
 *     W_WANT          space wanted                      W: holder of the lock
 *     W_OUTBOX        messages waiting for space        W: holder of the lock; P also reads it without
 *     W_ARM           epoch << 1 | armed                W: P
 *     R_HEAD, R_TAIL, R_ARM                             W: R
 * The lock is a word too: taking it drains the taker's store buffer (lock cmpxchg), leaving it is a release store.
 * `pub`, `queued`, `signalled`, `want` are plain data under the lock.
 *
 * The point that space.pml can't show: S asks for space while P may be anywhere - about to arm, asleep with
 * this epoch already signalled, or between epoll_wait and wake_disarm. Two re-checks are needed:
 *     S: WANT = 1; FENCE; re-check the peer's head, flush oneself if there is space after all
 *     P: ARM; FENCE; re-check the peer's tail AND (outbox not empty and space)
 *
 * Abstracted: the reverse ring is never full; one sending thread (P's flush is the second writer).
 * Checked: no invalid end state, order and content of messages (assert); -DNP: every execution ends.
 *
 * Configurations that must hold: (none); PSO; RING_UNLOCKED = wake_peer is called after the lock was left (no
 * system call under the lock), with `signalled` shared and unsynchronised: worst case one ring too many.
 *
 * Variants that must fail:
 *   BUG_1 S: no fence between WANT and the re-check of head
 *   BUG_2 S: no re-check of head after WANT
 *   BUG_3 P: looks at the outbox before arming, not after
 *   BUG_4 P: clears WANT after it left the lock
 *   BUG_5 P: flushes without the lock
 *   BUG_6 S: publishes directly although the outbox is not empty (overtakes it)
 *   BUG_7 P: no fence F
 *   BUG_8 R: no fence G (head store / want load)
 *   BUG_9 nobody polls while a message is in the outbox (P leaves as soon as it has its own data)
 */
#ifndef M
#define M 3
#endif
#ifndef D
#define D 1
#endif
#ifndef SLOTS
#define SLOTS 1
#endif

#define W_LOCK		0
#define W_TAIL		1
#define W_WANT		2
#define W_OUTBOX	3
#define W_ARM		4
#define R_HEAD		5
#define R_TAIL		6
#define R_ARM		7
#define W_SLOT(i)	(8 + (i) % SLOTS)
#define WORDS		(8 + SLOTS)
#define CPUS		3
#define CPU		_pid		/* active processes are numbered in the order of the text */
#define SB		2
#include "store_buffer.h"

bit bell_p, bell_r;
byte pub, queued, signalled;	/* under the lock */
bit want;			/* under the lock: private twin of W_WANT */
byte received;			/* ghost */

#define LOCK	atomic { FENCE && mem[W_LOCK] == 0 -> mem[W_LOCK] = 1 }
#define UNLOCK	STORE_REL(W_LOCK, 0)
#define SPACE	(pub - LOAD(R_HEAD) < SLOTS)

inline wake_r()
{
#ifdef R_SLEEPS
	FENCE;				/* E */
	a = LOAD(R_ARM);
	if
	:: (a & 1) && a != signalled -> signalled = a; bell_r = 1
	:: else
	fi;
	a = 0
#else
	skip
#endif
}

inline publish(number)
{
	STORE(W_SLOT(pub), number);
	pub++;
	STORE_REL(W_TAIL, pub);
	published = 1
}

/* conn_flush(): with the lock held. */
inline flush()
{
	do
	:: pub != queued && SPACE -> publish(pub + 1); STORE(W_OUTBOX, queued - pub)
	:: else -> break
	od
}

#ifdef RING_UNLOCKED
#define RING_LOCKED
#define RING_AFTER	if :: published -> published = 0; wake_r() :: else fi
#else
#define RING_LOCKED	if :: published -> published = 0; wake_r() :: else fi
#define RING_AFTER	skip
#endif

active proctype S()
{
	byte a, i;
	bit published;

	do
	:: i < M ->
		LOCK;
		queued++;
		if
#ifdef BUG_6
		:: SPACE -> publish(queued)
#else
		:: pub + 1 == queued && SPACE -> publish(queued)
#endif
		:: else ->
			STORE(W_OUTBOX, queued - pub);
			want = 1;
			STORE(W_WANT, 1);
#ifndef BUG_1
			FENCE;			/* F, matches G */
#endif
#ifndef BUG_2
			flush()
#endif
		fi;
		RING_LOCKED;
		UNLOCK;
		RING_AFTER;
		i++
	:: else -> break
	od
}

active proctype P()
{
	byte a, head, t, epoch;
	bit published;

turn:
	t = LOAD(R_TAIL);
	head = t;				/* deliver everything */
	t = 0;
#ifndef BUG_5
	LOCK;
#endif
	flush();
#ifndef BUG_4
	if
	:: want && pub == queued -> want = 0; STORE(W_WANT, 0)
	:: else
	fi;
#endif
	RING_LOCKED;
#ifndef BUG_5
	UNLOCK;
#endif
	RING_AFTER;
#ifdef BUG_4
	if
	:: want && pub == queued -> want = 0; STORE(W_WANT, 0)
	:: else
	fi;
#endif
#ifdef BUG_9
	if
	:: head == D -> goto done
	:: else
	fi;
#endif
	epoch++;
	STORE(W_ARM, epoch << 1 | 1);		/* wake_arm */
#ifndef BUG_7
	FENCE;					/* F, matches E and G */
#endif
	if
	:: LOAD(R_TAIL) != head -> goto disarm
	:: else
	fi;
#ifndef BUG_3
	if
	:: LOAD(W_OUTBOX) ->			/* without the lock */
		if
		:: LOAD(W_TAIL) - LOAD(R_HEAD) < SLOTS -> goto disarm
		:: else
		fi
	:: else
	fi;
#endif
	if
	:: atomic { bell_p -> bell_p = 0 }
	:: received == M && head == D -> goto done	/* ghost: nothing will ever come */
	fi;
disarm:
	STORE(W_ARM, epoch << 1);		/* wake_disarm */
	goto turn;
done:
	skip
}

inline wake_p()
{
	a = LOAD(W_ARM);
	if
	:: (a & 1) && a != r_signalled -> r_signalled = a; bell_p = 1
	:: else
	fi;
	a = 0
}

active proctype R()
{
	byte a, head, sent, epoch, r_signalled;

drain:
	do
	:: LOAD(W_TAIL) != head ->
		assert(LOAD(W_SLOT(head)) == head + 1);
		head++;
		received = head;
		STORE_REL(R_HEAD, head);
#ifndef BUG_8
		FENCE;				/* G, matches F */
#endif
		if
		:: LOAD(W_WANT) -> wake_p()
		:: else
		fi
	:: sent < D ->
own:		sent++;
		STORE_REL(R_TAIL, sent);
		FENCE;				/* E */
		wake_p()
	:: head == M && sent == D -> goto done
#ifdef R_SLEEPS
	:: LOAD(W_TAIL) == head && !(head == M && sent == D) -> break
#endif
	od;
#ifdef R_SLEEPS
	epoch++;
	STORE(R_ARM, epoch << 1 | 1);
	FENCE;					/* F */
	if
	:: LOAD(W_TAIL) != head -> STORE(R_ARM, epoch << 1); goto drain
	:: else
	fi;
	if
	:: atomic { bell_r -> bell_r = 0 }; STORE(R_ARM, epoch << 1); goto drain
	:: sent < D -> STORE(R_ARM, epoch << 1); goto own	/* another thread of the peer sends */
	fi;
#endif
done:
	skip
}

active proctype memory()
{
	byte w, v;
end:
	do
	FLUSH(0)
	FLUSH(1)
	FLUSH(2)
	REORDER(0, W_SLOT(0))
	REORDER(0, W_OUTBOX)
	REORDER(0, W_WANT)
	REORDER(1, W_SLOT(0))
	REORDER(1, W_OUTBOX)
	REORDER(1, W_WANT)
	REORDER(1, W_ARM)
	REORDER(2, R_ARM)
	od
}
