/*
 * leader.pml - many threads, one connection: whoever waits reads the ring for all (no reader thread).
 *
 * Mirrors  callers.c  shmrpc_call_with() (begin, enter, send), wait_inside(), follow(), slot_sleep(), wait_goal(), leave(),
 *                     slot_wake(), slot_finish(), callers_reply(), callers_lost()
 *          lead.c   poller_lead(), look(), fail_conn()
 *
 * NT threads make one call each. Under the poller's lock a thread registers its slot, goes inside, and takes the role if
 * nobody leads; then it sends; then it leads or follows. A follower sleeps on a futex, its slot's state:
 *     WAITING -> SLEEPING (its thread) -> DONE by the leader: reply, or connection lost
 *                                      -> PROMOTED by a leader that leaves
 * The leader reads until its own reply is there, then hands the role to one thread inside that is not DONE, if any.
 *
 * The ring's arm / doorbell protocol is that of wake.pml, here reduced to `edge`: an event is pending (EPOLLET) since a
 * reply was published; epoll_wait takes it. That makes it matter that a new leader drains before it sleeps: the edge
 * may have been taken by the old one. The control socket is level-triggered in the epoll set, and a hang-up that was
 * seen is noted where the next leader finds it (conn.hung_up).
 * futex_wait(word, SLEEPING) is atomic in the kernel: it sleeps only if the word still has that value; futex_wake reaches
 * only a thread that sleeps. Both contain full barriers, all else is under the lock, states change by exchange and
 * compare-exchange: so this model is sequentially consistent on purpose.
 *
 * Nondeterministic: the order of the replies; thread 0 may have a deadline and give up at any moment (only it, and only
 * sometimes: a timeout would hide the lost wake-ups of the others); with DETACHED thread 0 is out in Python, registered,
 * and never comes back (a Future that nobody asks); with DIES the peer may die at any moment.
 *
 * Checked: no invalid end state, i.e. every call ends; -DNP: on every schedule. At each unlock: if some thread inside is
 * not DONE, somebody leads (so: never a reply, a waiting thread, and no leader). One reader at a time. A reply that
 * became visible in the ring is not lost. After a call has returned nobody touches its slot.
 *
 * Variants that must fail:
 *   BUG_1  leader leaves without handing on
 *   BUG_2  successor chosen under the lock, "nobody leads" stored after it was left
 *   BUG_3  successor promoted but not woken
 *   BUG_4  a follower that times out goes although it was promoted meanwhile
 *   BUG_5  call registered after it was sent
 *   BUG_6  futex wake before the state is stored
 *   BUG_7  follower sleeps without comparing the state
 *   BUG_8  role handed to a thread that is DONE already
 *   BUG_9  reply delivered to a slot looked up before (lock left in between)
 *   BUG_10 a leader that times out leaves without handing on
 *   BUG_11 new leader sleeps before it drains
 *   BUG_12 role handed to a slot whose thread is not inside (DETACHED)
 *   BUG_13 control socket registered EPOLLET, and the hang-up noted in a local variable of the leader (DIES)
 *   BUG_14 on hang-up the leader ends its own call and leaves, "nobody leads" (DIES)
 *   BUG_15 on hang-up the ring is not drained once more before calls are failed (DIES; a reply is lost)
 *   BUG_16 follower stores SLEEPING instead of compare-exchanging it
 */
#ifndef NT
#define NT 3
#endif
#define NONE NT

mtype = { IDLE, WAITING, SLEEPING, PROMOTED, DONE };

mtype state[NT] = IDLE;		/* the futex words */
bit registered[NT];		/* lock: slot.goal == GOAL_REPLY and slot.call_id set */
bit inside[NT];			/* lock */
bit asleep[NT];			/* kernel: queued on the futex */
bit ok[NT];			/* slot.result: a reply (else: connection lost) */
bit gone[NT];			/* ghost: the call has returned */
bit answered[NT];		/* ghost: its reply became visible in the ring */
byte leader = NONE;		/* lock */
bit lock;
byte readers;			/* ghost */

bit requested[NT];		/* on their way to the peer */
chan ring = [NT] of { byte };	/* replies */
bit edge;
#ifdef DIES
bit hup;			/* control socket */
bit error;			/* conn.error */
#ifndef BUG_13
bit hung_up;			/* conn.hung_up; leader's */
#endif
#endif

#define LOCK	atomic { lock == 0 -> lock = 1 }
#define UNDONE(i)	(inside[i] && state[i] != DONE)
#define UNLOCK	atomic { assert(leader != NONE || !(UNDONE(0) || UNDONE(1) || UNDONE(2))); lock = 0 }

inline slot_wake(i, new)
{
#ifdef BUG_6
	if
	:: state[i] == SLEEPING -> asleep[i] = 0
	:: else
	fi;
	state[i] = new
#else
	atomic {
		assert(!gone[i]);
		if
		:: state[i] == SLEEPING -> state[i] = new; was_asleep = 1
		:: else -> state[i] = new
		fi
	};
	if
#ifdef BUG_3
	:: was_asleep && new != PROMOTED -> was_asleep = 0; asleep[i] = 0
	:: was_asleep && new == PROMOTED -> was_asleep = 0
#else
	:: was_asleep -> was_asleep = 0; asleep[i] = 0		/* futex_wake */
#endif
	:: else
	fi
#endif
}

/* With the lock held; gives it up. */
inline leave()
{
#if defined(BUG_8)
#define CANDIDATE(i) (inside[i])
#elif defined(BUG_12)
#define CANDIDATE(i) (i != me && registered[i] && state[i] != DONE)
#else
#define CANDIDATE(i) UNDONE(i)
#endif
	inside[me] = 0;
	if
	:: leader == me ->
#ifdef BUG_2
		if
		:: CANDIDATE(0) -> leader = 0; slot_wake(0, PROMOTED); UNLOCK
		:: CANDIDATE(1) -> leader = 1; slot_wake(1, PROMOTED); UNLOCK
		:: CANDIDATE(2) -> leader = 2; slot_wake(2, PROMOTED); UNLOCK
		:: else -> lock = 0; leader = NONE
		fi
#else
		if
		:: CANDIDATE(0) -> leader = 0; slot_wake(0, PROMOTED)
		:: CANDIDATE(1) -> leader = 1; slot_wake(1, PROMOTED)
		:: CANDIDATE(2) -> leader = 2; slot_wake(2, PROMOTED)
		:: else -> leader = NONE
		fi;
		UNLOCK
#endif
	:: else -> UNLOCK
	fi
}

/* callers_reply(), callers_lost(): for one slot. */
inline deliver(id, good)
{
#ifdef BUG_9
	LOCK;
	found = registered[id];
	UNLOCK;
	if
	:: found -> registered[id] = 0; ok[id] = good; slot_wake(id, DONE)
	:: else
	fi
#else
	LOCK;
	if
	:: registered[id] -> registered[id] = 0; ok[id] = good; slot_wake(id, DONE)
	:: else				/* late reply: dropped */
	fi;
	UNLOCK
#endif
}

proctype thread(byte me)
{
	byte id;
	bit deadline, leads, was_asleep;
#ifdef BUG_9
	bit found;
#endif
#ifdef BUG_13
	bit hung_up;
#endif

	if
	:: me == 0 -> deadline = 1
	:: true
	fi;

	/* shmrpc_call_with() */
#ifdef BUG_5
	requested[me] = 1;
#endif
	LOCK;
	registered[me] = 1;			/* begin() */
	state[me] = WAITING;
#ifdef DETACHED
	if
	:: me == 0 -> UNLOCK; requested[me] = 1; goto detached
	:: else
	fi;
#endif
	inside[me] = 1;				/* enter() */
	if
	:: leader == NONE -> leader = me; leads = 1
	:: else
	fi;
	UNLOCK;
#ifdef DIES
	if
	:: error -> goto leaving		/* conn_send() refuses */
	:: else
	fi;
#endif
#ifndef BUG_5
	requested[me] = 1;			/* conn_send() */
#endif
	if
	:: leads -> goto lead			/* wait_inside() */
	:: else
	fi;

follow:
#ifdef BUG_16
	if
	:: state[me] == WAITING -> state[me] = SLEEPING
	:: else
	fi;
#else
	atomic {				/* compare_exchange */
		if
		:: state[me] == WAITING -> state[me] = SLEEPING
		:: else
		fi
	};
#endif
slot_sleep:
	if
	:: state[me] == PROMOTED -> goto promoted
	:: state[me] == DONE -> goto leaving
#ifdef BUG_7
	:: state[me] == SLEEPING -> asleep[me] = 1
#else
	:: atomic { state[me] == SLEEPING -> asleep[me] = 1 }	/* futex_wait */
#endif
	fi;
	if
	:: !asleep[me] -> goto slot_sleep
	:: deadline -> asleep[me] = 0		/* ETIMEDOUT */
	fi;
	atomic {				/* compare_exchange */
		if
		:: state[me] == SLEEPING -> state[me] = WAITING
		:: else -> goto slot_sleep
		fi
	};
#ifdef BUG_4
	LOCK;
	inside[me] = 0;
	registered[me] = 0;
	UNLOCK;
	goto returned;
#else
	goto leaving;
#endif

promoted:
	state[me] = WAITING;			/* compare_exchange; only the leader promotes */
lead:						/* poller_lead() */
	atomic { readers++; assert(readers == 1); assert(leader == me) };
#ifdef BUG_11
	goto sleep;
#endif
drain:						/* poll_conn() */
	do
	:: ring?id ->
		deliver(id, 1);
		id = 0;
		if
		:: state[me] == DONE -> goto stop_leading
		:: else
		fi
	:: empty(ring) -> break
	od;
#ifdef DIES
#ifdef BUG_15
	if
	:: hup ->
#else
	if
	:: hung_up ->				/* it was set before this drain: fail_conn() */
#endif
#ifdef BUG_14
		readers--;
		LOCK;
		inside[me] = 0; registered[me] = 0;
		leader = NONE;
		lock = 0;
		goto returned;
#else
		error = 1;
		do
		:: id < NT -> deliver(id, 0); id++
		:: else -> id = 0; break
		od;
		goto stop_leading;
#endif
	:: else
	fi;
#endif
sleep:						/* look() */
	if
#if !defined(DIES)
	:: atomic { edge -> edge = 0 }; goto drain
#elif defined(BUG_13)
	:: atomic { edge -> edge = 0; hung_up = hup }; goto drain
#else
	:: atomic { edge || hup -> edge = 0; hung_up = hup }; goto drain
#endif
	:: deadline
	fi;
stop_leading:
	readers--;
leaving:					/* wait_goal() */
	LOCK;
	registered[me] = 0;
#if defined(BUG_1)
	if
	:: leader == me -> inside[me] = 0; leader = NONE; lock = 0
	:: else -> leave()
	fi;
#elif defined(BUG_10)
	if
	:: leader == me && state[me] != DONE -> inside[me] = 0; leader = NONE; lock = 0
	:: else -> leave()
	fi;
#else
	leave();
#endif
returned:
	gone[me] = 1;
	assert(!answered[me] || ok[me] || deadline);
detached:
	skip
}

active proctype peer()
{
	byte id;
end:
	if
	:: atomic { requested[0] -> requested[0] = 0 }; id = 0
	:: atomic { requested[1] -> requested[1] = 0 }; id = 1
	:: atomic { requested[2] -> requested[2] = 0 }; id = 2
#ifdef DIES
	:: true -> goto die
#endif
	fi;
	d_step { ring!id; answered[id] = registered[id]; id = 0 };
	edge = 1;
	goto end;
#ifdef DIES
die:
#ifdef BUG_13
	atomic { hup = 1; edge = 1 }
#else
	hup = 1
#endif
#endif
}

init
{
	atomic {
		run thread(0);
		run thread(1);
		run thread(2)
	}
}
