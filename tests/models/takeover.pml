/*
 * takeover.pml - server workers: the thread that reads a request also runs its handler; if the handler
 * takes long, a standby thread takes the reading over.
 *
 * Mirrors  poller.c  poller_lead() on the server's side, poller_standby(), poller_take_over(), poller_park()
 *
 * NT threads. One leads: it reads requests and runs handlers inline. One is the standby; the others
 * are in reserve, asleep, until the standby's place is free. Words:
 *     W_SEQ     2 * n + busy: the leader has entered n handlers; odd = it is in one       W: the leader
 *     W_PARKED  the standby is (about to be) asleep on its futex                          W: the standby
 * The leader, for each request:  SEQ odd; FENCE; if (PARKED) futex_wake(standby); handler; under the mutex: still
 * leader? then SEQ even.
 * The standby ticks every millisecond while the leader is busy: the same odd SEQ on two ticks = stuck; then, under
 * the mutex, if SEQ is still that: it is the leader now, appoints one of the reserve as standby, and reads.
 * Leader idle (SEQ even) on a tick: PARKED = 1; FENCE; futex_wait(SEQ, that even value). This is another store-buffering
 * pair: SEQ / PARKED. (Both under the mutex would do as well.) The futex is SEQ, not PARKED: the kernel's comparison
 * must see a word that the leader changes, or the wake gets lost between re-check and sleep (BUG_13).
 * The old leader comes back, finds under the mutex that it does not lead any more, and becomes the standby if
 * there is none, else goes into the reserve. A thread that joins the pool does the same.
 *
 * Abstracted: time (a tick may come at any moment, so also two ticks within one short handler: a takeover that
 * was not needed must be harmless too); the ring is a counter, its wake-ups are wake.pml's. A handler returns
 * or blocks for ever.
 *
 * Checked: one reader at a time (assert); when nothing moves any more, no request is waiting unless every thread is stuck in
 * a handler (assert at `timeout`); no thread but these waits (invalid end states); -DNP: no endless
 * ticking. Two takeovers happen; a leader that was robbed returns.
 *
 * Configurations that must hold: (none). (PSO adds nothing: no CPU has two relaxed stores on their way.)
 *
 * Variants that must fail:
 *   BUG_1  no standby: nobody takes over
 *   BUG_2  leader does not wake the parked standby before the handler
 *   BUG_3  leader: no fence between SEQ and PARKED
 *   BUG_4  standby: no fence between PARKED and the re-check of SEQ
 *   BUG_5  standby: sleeps without comparing SEQ
 *   BUG_6  takeover without the mutex (SEQ compared before it is taken)
 *   BUG_7  old leader returns and goes on reading without looking who leads
 *   BUG_8  old leader looks who leads without the mutex, then stores SEQ
 *   BUG_9  takeover does not appoint a new standby from the reserve
 *   BUG_10 old leader always goes into the reserve, also when there is no standby
 *   BUG_11 new leader leaves SEQ as it was (odd): its standby believes it stuck while it reads
 *   BUG_12 leader wakes the standby after the handler, not before
 *   BUG_13 standby: re-checks SEQ, then sleeps on another word (PARKED), which the leader does not change
 *   BUG_14 standby forgets between two ticks which SEQ it saw: ticks for ever (found with -DNP only)
 */
#ifndef NT
#define NT 3
#endif
#ifndef REQUESTS
#define REQUESTS 3
#endif
#define NONE NT

#define W_SEQ		0
#define W_PARKED	1
#define WORDS		2
#define CPUS		NT
#define CPU		me
#include "store_buffer.h"

bit mutex;
byte leader = 0;
byte standby = NONE;		/* under the mutex */
bit reserve[NT];		/* under the mutex: asleep, waiting for the standby's place */
bit asleep;			/* kernel: the standby is queued on the futex PARKED */
byte waiting;			/* requests in the rings */
byte stuck, readers;		/* ghosts */

/* Lock-prefixed instruction: drains the store buffer. */
#define LOCK	atomic { FENCE && mutex == 0 -> mutex = 1 }
/* Nothing that the mutex protects is in mem[] except SEQ; its release waits for SEQ's store. */
#define UNLOCK	atomic { FENCE -> mutex = 0 }

inline futex_wake_standby()
{
	asleep = 0
}

proctype worker(byte me)
{
	byte s, seen, seq;
#ifdef BUG_8
	bit kept;
#endif

	if
	:: me == 0 -> goto lead
	:: else -> LOCK; goto join
	fi;

lead:
	atomic { readers++; assert(readers == 1) };
end_idle:
	atomic { waiting > 0 -> waiting-- };	/* drain; else arm and sleep in epoll_wait */
	readers--;
	seq = seq + 1;
	STORE_REL(W_SEQ, seq);			/* odd: busy */
#ifndef BUG_3
	FENCE;					/* H, matches I */
#endif
#if !defined(BUG_2) && !defined(BUG_12)
	if
	:: LOAD(W_PARKED) -> futex_wake_standby()
	:: else
	fi;
#endif
	/* the handler */
	if
	:: true
	:: stuck++; goto end_stuck
	fi;
#ifdef BUG_12
	if
	:: LOAD(W_PARKED) -> futex_wake_standby()
	:: else
	fi;
#endif
#ifdef BUG_7
	seq++;
	STORE(W_SEQ, seq);
	goto lead;
#endif
#ifdef BUG_8
	kept = (leader == me);
	LOCK;
	if
	:: kept ->
#else
	LOCK;
	if
	:: leader == me ->
#endif
		seq++;
		STORE(W_SEQ, seq);		/* even: idle */
		UNLOCK;
		goto lead
	:: else
	fi;
	seq = 0;
	/* robbed of the role while in the handler */
join:	if
#ifndef BUG_10
	:: standby == NONE -> standby = me; UNLOCK; goto tick
#endif
	:: else -> reserve[me] = 1; UNLOCK
	fi;

end_reserve:
	!reserve[me];				/* futex */
tick:
#ifdef BUG_1
end_none:
	false;
#endif
	s = LOAD(W_SEQ);
	if
	:: s & 1 ->
		if
		:: s == seen -> goto take_over
#ifdef BUG_14
		:: else -> goto tick
#else
		:: else -> seen = s; goto tick
#endif
		fi
	:: else
	fi;
	/* poller_park() */
	STORE(W_PARKED, 1);
#ifndef BUG_4
	FENCE;					/* I, matches H */
#endif
#if defined(BUG_5)
	asleep = 1;
#elif defined(BUG_13)
	if
	:: LOAD(W_SEQ) == s -> asleep = 1
	:: else -> goto unpark
	fi;
#else
	atomic {				/* futex_wait(SEQ, s) */
		if
		:: LOAD(W_SEQ) == s -> asleep = 1
		:: else -> goto unpark
		fi
	};
#endif
end_parked:
	!asleep;
unpark:
	STORE(W_PARKED, 0);
	goto tick;

take_over:
	LOCK;
#ifdef BUG_6
	if
	:: true ->
#else
	if
	:: LOAD(W_SEQ) == seen ->
#endif
		leader = me;
#ifndef BUG_11
		seq = seen + 1;
		STORE(W_SEQ, seq);		/* even: the new leader is not in a handler */
#else
		seq = seen;
#endif
		standby = NONE;
#ifndef BUG_9
		if
		:: reserve[0] -> standby = 0; reserve[0] = 0
		:: reserve[1] -> standby = 1; reserve[1] = 0
		:: reserve[2] -> standby = 2; reserve[2] = 0
		:: else
		fi;
#endif
		seen = 0; s = 0;
		UNLOCK;
		goto lead
	:: else ->
		UNLOCK;
		goto tick
	fi;
end_stuck:
	false
}

active proctype client()
{
	byte i;

	do
	:: i < REQUESTS -> waiting++; i++
	:: else -> break
	od
}

active proctype monitor()
{
	timeout -> assert(waiting == 0 || stuck == NT)
}

init
{
	atomic {
		run worker(0);
		run worker(1);
		run worker(2)
	}
}

active proctype memory()
{
	byte w, v;
end:
	do
	FLUSH(0)
	FLUSH(1)
	FLUSH(2)
	od
}
