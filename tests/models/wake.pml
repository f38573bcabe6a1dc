/*
 * wake.pml - sleeping and waking without a lost wake-up; one sender, one receiver, one direction.
 *
 * Mirrors  ring.c    ring_push() (payload, tail), ring_peek()
 *          wake.c    wake_arm(), wake_arm_fence(), wake_disarm(), wake_peer_for_data(), ring_if_asleep()
 *          lead.c  poll_conn(), arm_all(), look(), poller_heat()
 *
 * Shared words, each with a single writer:
 *     W_DATA+i  payload of message i          W: sender
 *     W_TAIL    messages published            W: sender
 *     W_ARM     epoch << 1 | asleep            W: receiver
 * `bell` is the receiver's eventfd in its epoll set, registered EPOLLET and never read: an event is
 * pending when a write happened since epoll_wait last returned one; returning it takes it.
 *
 * Abstracted: the ring never fills (space.pml), nobody dies (close.pml), indices count messages and not
 * bytes, spinning is left out (it is a drain that finds nothing, with arm untouched).
 * Nondeterministic: the sender may call wake_peer_for_data once for a batch; a drain may stop early (budget), but takes at
 * least one message; epoll_wait may return once for nothing (EINTR, deadline) - once only,
 * so that a lost wake-up still ends in a deadlock.
 *
 * Checked: no invalid end state (= no lost wake-up), every payload complete and in order (assert);
 * run with -DNP also: no infinite execution, hence all N messages are received on every schedule.
 *
 * Configurations that must hold: (none) = TSO;  PSO = stores drain out of order;  LEVEL = asyncio's add_reader,
 * level-triggered: the callback reads the eventfd as a step of its own;  BORN_ARMED = as segment_map_own() leaves it:
 * asleep in epoch 1 before the sender can see the segment, and no look at tail before the first sleep.
 *
 * What the model taught (BUG_12, BUG_13): a sender rings once per epoch, and the ring may be late - for a
 * message that the receiver took by itself before it armed. So a doorbell event that is consumed uses its
 * epoch up, whether or not a message was found: whoever takes the event must disarm, and re-arm with a
 * new epoch before sleeping.
 *
 * Variants that must fail:
 *   BUG_1  no fence E (sender: tail store / arm load)
 *   BUG_2  no fence F (receiver: arm store / tail load)
 *   BUG_3  no re-check of tail after arming
 *   BUG_4  the epoch does not advance: every sleep looks like the one already rung
 *   BUG_5  sender remembers "rung" as a flag, reset when it sees the receiver disarmed
 *   BUG_6  doorbell read/cleared between the re-check and the sleep
 *   BUG_7  sender loads arm before it stores tail
 *   BUG_8  tail published before the payload is written
 *   BUG_9  re-check compares tail with the last tail seen, not with what was consumed (drain budget)
 *   BUG_10 tail stored without release (needs PSO; on TSO it is only a compiler matter)
 *   BUG_11 sender remembers `rung` also when it did not ring: last value seen, armed or not,
 *          compared by epoch, and wake_disarm already announces the next epoch
 *   BUG_12 doorbell read/cleared between arming and the re-check
 *   BUG_13 woken, nothing found, sleeps again on the same armed epoch
 */
#ifndef N
#define N 3
#endif
#ifndef SB
#define SB 3
#endif

#define W_TAIL	0
#define W_ARM	1
#define W_DATA	2
#define WORDS	(W_DATA + N)
#define CPUS	2
#define CPU	_pid			/* active processes are numbered in the order of the text */
#include "store_buffer.h"

bit bell;
#ifdef BORN_ARMED
bit born;
#endif

#ifdef BUG_10
#define PUBLISH_TAIL(v)	STORE(W_TAIL, v)
#else
#define PUBLISH_TAIL(v)	STORE_REL(W_TAIL, v)
#endif

active proctype sender()
{
	byte i, a, rung;

#ifdef BORN_ARMED
	born;
#endif
	do
	:: i < N ->
#ifdef BUG_7
		a = LOAD(W_ARM);
#endif
#ifdef BUG_8
		PUBLISH_TAIL(i + 1);
		STORE(W_DATA + i, i + 1);
#else
		STORE(W_DATA + i, i + 1);	/* ring_push */
		PUBLISH_TAIL(i + 1);		/* B */
#endif
		i++;
		if
		:: i < N -> goto next		/* more of this batch follows: wake_peer_for_data later */
		:: true
		fi;
#ifndef BUG_1
		FENCE;				/* E, matches F */
#endif
#ifndef BUG_7
		a = LOAD(W_ARM);
#endif
#if defined(BUG_5)
		if
		:: (a & 1) && !rung -> rung = 1; bell = 1
		:: !(a & 1) -> rung = 0
		:: else
		fi;
#elif defined(BUG_11)
		if
		:: (a >> 1) != rung ->
			rung = a >> 1;
			if
			:: a & 1 -> bell = 1
			:: else
			fi
		:: else
		fi;
#else
		if
		:: (a & 1) && a != rung -> rung = a; bell = 1
		:: else
		fi;
#endif
		a = 0;
next:		skip
	:: else -> break
	od
}

#ifdef BUG_4
#define EPOCH 1
#else
#define EPOCH epoch
#endif
#ifdef BUG_11
#define DISARMED ((EPOCH + 1) << 1)
#else
#define DISARMED (EPOCH << 1)
#endif

active proctype receiver()
{
	byte head, tail, epoch;
	bit spurious = 1;

#ifdef BORN_ARMED
	epoch = 1;
	d_step { mem[W_ARM] = 1 << 1 | 1; born = 1 };
	goto sleep;
#endif
drain:
	tail = LOAD(W_TAIL);
	do
	:: head != tail ->
		assert(LOAD(W_DATA + head) == head + 1);
		head++;
		if
		:: head != tail -> break	/* budget spent */
		:: true
		fi
	:: else -> break
	od;
	if
	:: head == N -> goto done
	:: else
	fi;

	epoch++;
	STORE(W_ARM, EPOCH << 1 | 1);		/* wake_arm */
#ifndef BUG_2
	FENCE;					/* F, matches E */
#endif
#ifdef BUG_12
	bell = 0;
#endif
#if defined(BUG_9)
	if
	:: LOAD(W_TAIL) != tail ->
		STORE(W_ARM, DISARMED);
		goto drain
	:: else
	fi;
#elif !defined(BUG_3)
	if
	:: LOAD(W_TAIL) != head ->		/* re-check */
		STORE(W_ARM, DISARMED);
		goto drain
	:: else
	fi;
#endif
#ifdef BUG_6
	bell = 0;
#endif
sleep:
	if
#ifdef LEVEL
	:: bell -> bell = 0			/* add_reader callback; read() is a second step */
#else
	:: atomic { bell -> bell = 0 }		/* epoll_wait takes the edge */
#endif
	:: spurious -> spurious = 0		/* EINTR, deadline */
	fi;
#ifdef BUG_13
	if
	:: LOAD(W_TAIL) == head -> goto sleep
	:: else
	fi;
#endif
	STORE(W_ARM, DISARMED);			/* wake_disarm */
	goto drain;
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
	REORDER(0, W_TAIL)
	REORDER(0, W_DATA)
	REORDER(0, W_DATA + 1)
	REORDER(0, W_DATA + 2)
	od
}
