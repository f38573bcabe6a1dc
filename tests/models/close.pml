/*
 * close.pml - kill -9 between any two steps, of either side.
 *
 * Mirrors  conn.c  the hang-up path: control socket beside the doorbell in the epoll set, last drain, outcome
 *          of the calls that were lost (not_started / unknown)
 *          ring.c  ring_publish(): tail is the only commit point;  ring_read(): head is "taken"
 *          wake.c  wake_arm(), wake_disarm(), wake_peer()
 *
 * S sends N messages of two words through a ring of SLOTS messages and blocks for space; R takes each
 * one and starts its handler. A killer kills S, or R, or nobody, at any moment (`unless` leaves the body
 * between any two statements, inside of atomic ones too). What a dying process leaves behind:
 *   - its retired stores reach memory (a CPU's store buffer survives the process), the others never happen;
 *   - then, when the last thread is gone, the kernel closes its descriptors: the control socket of the
 *     other side hangs up. So a hang-up is seen after the last store (FENCE below), which is what makes
 *     one more drain enough.
 * Leaving normally looks the same to the other side. The hang-up is level-triggered: it stays.
 *
 * Checked: no invalid end state = the survivor always ends; -DNP: every execution ends. No partial message;
 * the survivor R has received every message whose tail store happened; the survivor S, looking at the dead
 * R's head, never takes a request for not started whose handler has begun (all asserts).
 *
 * Configurations that must hold: (none); PSO.
 *
 * Variants that must fail:
 *   BUG_1 R ends on the hang-up without a last drain
 *   BUG_2 R sleeps on the doorbell only
 *   BUG_3 R looks for the hang-up after the drain instead of before
 *   BUG_4 S claims (stores tail), then writes the second word
 *   BUG_5 R starts the handler, then stores head: "not_started" would be a lie
 *   BUG_6 S, waiting for space, sleeps on the doorbell only
 *   BUG_7 S judges the lost calls by its cached copy of head, from before the hang-up
 *   BUG_8 a forked child of S still holds S's end of the control socket: no hang-up when S dies
 */
#ifndef N
#define N 3
#endif
#ifndef SLOTS
#define SLOTS 2
#endif

#define S_TAIL		0
#define S_WANT		1
#define S_ARM		2
#define R_HEAD		3
#define R_ARM		4
#define S_SLOT(i)	(5 + 2 * ((i) % SLOTS))		/* two words */
#define WORDS		(5 + 2 * SLOTS)
#define CPUS		2
#define CPU		_pid	/* active processes are numbered in the order of the text */
#include "store_buffer.h"

bit bell_s, bell_r;		/* doorbells */
bit hup_s, hup_r;		/* the peer of S, of R is gone */
bit kill_s, kill_r;
byte started;			/* ghost: handlers that have begun */

active proctype S()
{
	byte a, tail, head /* cached */, epoch, signalled;

	{
		do
		:: tail == N -> break
		:: tail < N && tail - head < SLOTS ->
			STORE(S_SLOT(tail), tail + 1);
#ifdef BUG_4
			STORE_REL(S_TAIL, tail + 1);
			STORE(S_SLOT(tail) + 1, tail + 1);
#else
			STORE(S_SLOT(tail) + 1, tail + 1);
			STORE_REL(S_TAIL, tail + 1);
#endif
			tail++;
			FENCE;			/* E */
			a = LOAD(R_ARM);
			if
			:: (a & 1) && a != signalled -> signalled = a; bell_r = 1
			:: else
			fi;
			a = 0
		:: tail < N && tail - head == SLOTS ->
			head = LOAD(R_HEAD);
			if
			:: tail - head < SLOTS -> goto again
			:: else
			fi;
			STORE(S_WANT, 1);
			epoch++;
			STORE(S_ARM, epoch << 1 | 1);
			FENCE;			/* F */
			if
			:: tail - LOAD(R_HEAD) < SLOTS -> goto disarm
			:: else
			fi;
			if
			:: atomic { bell_s -> bell_s = 0 }
#ifndef BUG_6
			:: hup_s -> goto lost
#endif
			fi;
disarm:			STORE(S_ARM, epoch << 1);
again:			skip
		od;
		if
		:: hup_s -> goto lost
		:: started == N -> goto leave	/* every reply came */
		fi;
lost:
#ifndef BUG_7
		head = LOAD(R_HEAD);
#endif
		/* calls [0, head) are "unknown", calls [head, N) "not_started" */
		assert(started <= head);
leave:		skip
	} unless { kill_s };

	FENCE;					/* the kernel, last thread gone */
#ifndef BUG_8
	hup_r = 1
#endif

}

active proctype R()
{
	byte a, head, tail, epoch, signalled;
	bit last;

	{
		skip;
drain:
		tail = LOAD(S_TAIL);
		do
		:: head != tail ->
			assert(LOAD(S_SLOT(head)) == head + 1);
			assert(LOAD(S_SLOT(head) + 1) == head + 1);
			head++;
#ifdef BUG_5
			started++;
			STORE_REL(R_HEAD, head);
#else
			STORE_REL(R_HEAD, head);	/* taken ... */
			started++;			/* ... then begun */
#endif
			FENCE;			/* G */
			if
			:: LOAD(S_WANT) ->
				a = LOAD(S_ARM);
				if
				:: (a & 1) && a != signalled -> signalled = a; bell_s = 1
				:: else
				fi;
				a = 0
			:: else
			fi
		:: else -> tail = 0; break
		od;
#ifdef BUG_3
		if
		:: hup_r -> goto end_of_stream
		:: else
		fi;
#else
		if
		:: last -> goto end_of_stream
		:: else
		fi;
#endif
		epoch++;
		STORE(R_ARM, epoch << 1 | 1);	/* wake_arm */
		FENCE;				/* F */
		if
		:: LOAD(S_TAIL) != head -> goto disarm
		:: else
		fi;
		if
		:: atomic { bell_r -> bell_r = 0 }
#ifndef BUG_2
		:: hup_r -> last = 1
#endif
		fi;
#ifdef BUG_1
		if
		:: last -> goto end_of_stream
		:: else
		fi;
#endif
disarm:		STORE(R_ARM, epoch << 1);	/* wake_disarm */
		goto drain;
end_of_stream:
		assert(head == LOAD(S_TAIL))
	} unless { kill_r };

	FENCE;
	hup_s = 1
}

active proctype killer()
{
	if
	:: kill_s = 1
	:: kill_r = 1
	:: true
	fi
}

active proctype memory()
{
	byte w, v;
end:
	do
	FLUSH(0)
	FLUSH(1)
	REORDER(0, S_WANT)
	REORDER(0, S_ARM)
	REORDER(0, S_SLOT(0))
	REORDER(0, S_SLOT(0) + 1)
	REORDER(0, S_SLOT(1))
	REORDER(0, S_SLOT(1) + 1)
	REORDER(1, R_ARM)
	od
}
