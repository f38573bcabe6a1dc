/*
 * close.pml - kill -9 between any two steps, of either side.
 *
 * Mirrors  lead.c   look() and control_event() (hang-up), the drain after it in poll_conn(), fail_conn()
 *          conn.c     conn_outcome()
 *          workers.c  take_request(), mark_queued(), unmark_queued(), start_queued()
 *          ring.c     ring_push(): tail is the only commit point; ring_release(): head means "taken"
 *          wake.c     arming and ringing, as in space.pml
 *
 * S sends N requests of two words each through a ring of SLOTS requests, and blocks for space; R takes each one and starts
 * it, or queues it and starts it later (one place in the queue). A killer kills S, or R, or nobody, at any moment (`unless`
 * leaves the body between any two statements). What a dying process leaves behind:
 *   - its retired stores reach memory (a CPU's store buffer survives the process), the others never happen;
 *   - then, when the last thread is gone, the kernel closes its descriptors and the control socket of the other side
 *     hangs up. So a hang-up is seen after the last store (FENCE below): that makes one more drain enough, and
 *     the dead peer's words final.
 * Leaving normally looks the same to the other side. The hang-up is level-triggered: it stays.
 *
 * Checked: no invalid end state = the survivor always ends; -DNP: every execution ends. No partial message; the survivor R
 * has received every message whose tail store happened; the survivor S never calls a request not started which was begun,
 * or will be (all asserts).
 *
 * Configurations that must hold: (none); PSO.
 *
 * Variants that must fail:
 *   BUG_1 R ends on the hang-up without a last drain
 *   BUG_2 R sleeps on the doorbell only
 *   BUG_3 R looks for the hang-up after the drain instead of before
 *   BUG_4 S claims (stores tail), then writes the second word
 *   BUG_5 R starts the request, then stores head
 *   BUG_6 S, waiting for space, sleeps on the doorbell only
 *   BUG_7 S judges the lost calls by its cached copy of head, from before the hang-up
 *   BUG_8 a forked child of S still holds S's end of the control socket: no hang-up when S dies
 *   BUG_9 S gives the connection up by itself and judges at once: R lives, drains and starts what S calls not started
 *   BUG_10 R starts a queued request, then takes it off the table of queued ones
 */
#ifndef N
#define N 3
#endif
#ifndef SLOTS
#define SLOTS 2
#endif

#define S_TAIL		0
#define S_SPACE		1
#define S_ARM		2
#define R_HEAD		3
#define R_ARM		4
#define R_QUEUED	5				/* request number, 0 = none */
#define S_SLOT(i)	(6 + 2 * ((i) % SLOTS))		/* two words */
#define WORDS		(6 + 2 * SLOTS)
#define CPUS		2
#define CPU		_pid	/* active processes are numbered in the order of the text */
#include "store_buffer.h"

bit bell_s, bell_r;		/* doorbells */
bit hup_s, hup_r;		/* the peer of S, of R is gone */
bit kill_s, kill_r;
bit begun[N + 1];		/* ghost: by request number, from 1 */
bit safe[N + 1];		/* ghost: S called it not started */

active proctype S()
{
	byte arm, tail, head /* cached */, epoch, rung;

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
			STORE_REL(S_TAIL, tail + 1);	/* B */
#endif
			tail++;
			FENCE;				/* E */
			arm = LOAD(R_ARM);
			if
			:: (arm & 1) && arm != rung -> rung = arm; bell_r = 1
			:: else
			fi;
			arm = 0
		:: tail < N && tail - head == SLOTS ->
			head = LOAD(R_HEAD);
			if
			:: tail - head < SLOTS -> goto again
			:: else
			fi;
			STORE(S_SPACE, 1);
			epoch++;
			STORE(S_ARM, epoch << 1 | 1);
			FENCE;				/* H, F */
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
		:: begun[1] && begun[2] && begun[N] -> goto leave	/* replies */
#ifdef BUG_9
		:: true -> goto lost
#endif
		fi;
lost:							/* conn_outcome() */
#ifndef BUG_7
		head = LOAD(R_HEAD);
#endif
		do
		:: head < N ->				/* the last ones may be not even sent */
			head++;
			atomic { safe[head] = 1; assert(!begun[head]) }
		:: else -> break
		od;
		arm = LOAD(R_QUEUED);
		atomic { safe[arm] = (arm != 0); assert(!(safe[arm] && begun[arm])); arm = 0 };
leave:		skip
	} unless { kill_s };

	FENCE;						/* the kernel, last thread gone */
#ifndef BUG_8
	hup_r = 1
#endif
}

#define BEGIN(number)	atomic { assert(!safe[number]); begun[number] = 1 }

active proctype R()
{
	byte arm, head, tail, epoch, rung, queued;
	bit last;

	{
		skip;
drain:
		tail = LOAD(S_TAIL);			/* C */
		do
		:: head != tail ->
			assert(LOAD(S_SLOT(head)) == head + 1);
			assert(LOAD(S_SLOT(head) + 1) == head + 1);
			head++;
			if
			:: true ->
#ifdef BUG_5
				BEGIN(head);
				STORE_REL(R_HEAD, head)
#else
				STORE_REL(R_HEAD, head);	/* D: taken ... */
				BEGIN(head)			/* ... then begun */
#endif
			:: !queued ->
				queued = head;
				STORE(R_QUEUED, head);		/* marked ... */
				STORE_REL(R_HEAD, head)		/* ... then taken */
			fi;
			FENCE;					/* G */
			if
			:: LOAD(S_SPACE) ->
				arm = LOAD(S_ARM);
				if
				:: (arm & 1) && arm != rung -> rung = arm; bell_s = 1
				:: else
				fi;
				arm = 0
			:: else
			fi
		:: else -> tail = 0; break
		od;
		if
		:: queued ->				/* start_queued() */
#ifdef BUG_10
			BEGIN(queued);
			STORE_REL(R_QUEUED, 0);
#else
			STORE_REL(R_QUEUED, 0);
			BEGIN(queued);
#endif
			queued = 0
		:: else
		fi;
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
		STORE(R_ARM, epoch << 1 | 1);		/* wake_arm */
		FENCE;					/* F */
		if
		:: LOAD(S_TAIL) != head -> goto disarm
		:: else
		fi;
		if
		:: atomic { bell_r -> bell_r = 0 }
#ifndef BUG_2
		:: hup_r -> last = 1			/* conn.hung_up */
#endif
		fi;
#ifdef BUG_1
		if
		:: last -> goto end_of_stream
		:: else
		fi;
#endif
disarm:		STORE(R_ARM, epoch << 1);		/* wake_disarm */
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
	REORDER(0, S_SPACE)
	REORDER(0, S_ARM)
	REORDER(0, S_SLOT(0))
	REORDER(0, S_SLOT(0) + 1)
	REORDER(0, S_SLOT(1))
	REORDER(0, S_SLOT(1) + 1)
	REORDER(1, R_ARM)
	REORDER(1, R_QUEUED)
	od
}
