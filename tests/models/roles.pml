/*
 * roles.pml - callers and workers on one poller: a thread that waits for a reply takes the reading over from a worker
 * that only waits for requests, and leaves it to whoever waits, or to the standby.
 *
 * Mirrors  callers.c  enter(), follow(), wait_goal(), leave(), hand_on(), callers_promote(), callers_inherit(),
 *                     callers_stop()
 *          workers.c  find_work(), lead(), stand_by(), take_request(), find_runner(), start_queued(),
 *                     workers_go_away()
 *          lead.c     poller_lead(), finished();  poller.c shmrpc_poller_stop()
 *
 * NW worker threads, of which WORKERS may run requests at a time, and NC callers with one call each. Under the lock a
 * caller takes the role if nobody has it, or its worker is out in Python ("away"). A worker that reads is asked for
 * it (role_wanted, and a kick out of epoll), and promotes a caller that still waits. A caller that leads queues requests for
 * workers, and hands on to another caller, or to nobody: then the standby takes the role after two ticks.
 *
 * Reduced as in leader.pml (futexes; `edge`: the doorbell, EPOLLET) and takeover.pml (ticks end at any moment; all threads
 * exist; handlers return or block for ever). With NESTED the reply to caller 0 comes when all requests have
 * begun, as if these were calls that it has caused. With STOPS somebody stops the poller at any moment: workers and waits end. With
 * RETIRES the workers end and the callers go on, as on a client whose connection has ended. All is decided under one lock,
 * so the model is sequentially consistent on purpose.
 *
 * Checked: no invalid end state, i.e. every call ends; one thread reads at a time (assert); when
 * nothing moves any more, nothing is left to read, and no request is queued unless WORKERS handlers are stuck (assert at
 * `timeout`). -DNP: no endless ticking or asking for the role.
 *
 * Variants that must fail:
 *   BUG_1  caller that leaves with nobody inside does not say that the role is free: the standby stays parked
 *   BUG_2  worker that is asked for the role reads on after it has promoted a caller
 *   BUG_3  worker that is asked for the role gives it up, although the caller that asked has its reply by now
 *   BUG_4  caller takes the role from a worker that reads
 *   BUG_5  caller takes the role of one that is away, and leaves it marked so: the standby takes it as well
 *   BUG_6  caller promoted but not woken
 *   BUG_7  role handed to a caller that is done
 *   BUG_8  worker that ends gives the role to nobody (RETIRES; this one was in the code)
 *   BUG_9  who starts a queued request clears the sign for those behind it (this one was in the code)
 *   BUG_10 caller that leads queues a request and wakes nobody
 *   BUG_11 worker that goes to run a request keeps the role from a caller that has asked for it (RETIRES: nobody stands by)
 *   BUG_12 role_wanted is never taken back: the worker promotes, or looks for whom to promote, for ever (-DNP)
 *   BUG_13 worker leads although nobody stands by and others idle: it relieved a standby that went to run a request, and
 *          found the role free (this one was in the code)
 */
#ifndef NW
#define NW 2
#endif
#ifndef WORKERS
#define WORKERS 1
#endif
#ifndef NC
#define NC 2
#endif
#ifndef REQUESTS
#define REQUESTS 1
#endif
#ifdef NESTED
#define MAY_REPLY (begun == REQUESTS)
#else
#define MAY_REPLY true
#endif
#define NONE 99
#define REQUEST 88
#define IS_CALLER(id) ((id) < NC)	/* callers come first, then workers */
#define IS_WORKER(id) ((id) != NONE && (id) >= NC)

mtype = { WAITING, SLEEPING, PROMOTED, DONE };

bit lock;
byte leader = NONE;		/* all of these: under the lock */
bit away;
byte away_count;
byte standby = NONE;
bit parked;
bit idling[NC + NW];
bit asleep[NC + NW];		/* on a futex */
mtype state[NC] = WAITING;
bit inside[NC];
byte running, queued;
bit role_wanted, startable;	/* set under the lock, looked at by who leads */
bit stopping, retired;

chan ring = [NC + REQUESTS] of { byte };
bit edge, kick;			/* what wakes epoll_wait */
bit requested[NC];
byte stuck, reading, begun;	/* ghosts */

#define LOCK	atomic { lock == 0 -> lock = 1 }
#define UNLOCK	lock = 0
#define UNDONE(i)	(inside[i] && state[i] != DONE)

inline wake_caller(i, new)
{
	atomic {
		if
		:: state[i] == SLEEPING -> state[i] = new; asleep[i] = 0
		:: else -> state[i] = new
		fi
	}
}

inline wake_idle()
{
	if
	:: idling[NC] -> idling[NC] = 0; asleep[NC] = 0
	:: idling[NC + 1] -> idling[NC + 1] = 0; asleep[NC + 1] = 0
#if NW > 2
	:: idling[NC + 2] -> idling[NC + 2] = 0; asleep[NC + 2] = 0
#endif
	:: else
	fi
}

inline go_away()
{
	away = 1;
	away_count++;
	if
	:: parked -> asleep[standby] = 0
	:: else
	fi
}

/* With the lock held: to a caller that waits, if there is one. */
inline hand_on()
{
#ifdef BUG_7
#define CANDIDATE(i) inside[i]
#else
#define CANDIDATE(i) UNDONE(i)
#endif
	if
	:: CANDIDATE(0) -> leader = 0; promote(0)
#if NC > 1
	:: CANDIDATE(1) -> leader = 1; promote(1)
#endif
	:: else
	fi
}

inline promote(i)
{
#ifdef BUG_6
	state[i] = PROMOTED
#else
	wake_caller(i, PROMOTED)
#endif
}

/* With the lock held: a leading worker goes out to run a request. */
inline step_out()
{
	if
	:: role_wanted -> role_wanted = 0; hand_on()
	:: else
	fi;
	if
	:: leader == me -> go_away()
	:: else
	fi
}

/* With the lock held; the sign for a leader that is no worker goes by a futex. */
inline find_runner()
{
	if
	:: queued && running < WORKERS ->
		startable = 1;
		if
		:: IS_WORKER(leader) && !away -> kick = 1
#ifndef BUG_10
		:: !(IS_WORKER(leader) && !away) && standby != NONE -> asleep[standby] = 0
		:: !(IS_WORKER(leader) && !away) && standby == NONE -> wake_idle()
#endif
		:: else
		fi
	:: else
	fi
}

/* callers_reply() */
inline deliver(id)
{
	LOCK;
	if
	:: UNDONE(id) -> wake_caller(id, DONE)
	:: else
	fi;
	UNLOCK
}

proctype caller(byte me)
{
	byte id;
	bit leads;

	LOCK;					/* enter() */
	inside[me] = 1;
	if
#ifdef BUG_4
	:: leader == NONE || away || IS_WORKER(leader) -> leader = me; leads = 1; away = 0
#elif defined(BUG_5)
	:: leader == NONE || away -> leader = me; leads = 1
#else
	:: leader == NONE || away -> leader = me; leads = 1; away = 0
#endif
	:: else ->
		if
		:: IS_WORKER(leader) && !role_wanted -> role_wanted = 1; kick = 1
		:: else
		fi
	fi;
	UNLOCK;
	requested[me] = 1;
	if
	:: leads -> goto lead
	:: else
	fi;

follow:
	atomic {				/* compare_exchange, futex_wait */
		if
		:: state[me] == WAITING -> state[me] = SLEEPING; asleep[me] = 1
		:: else
		fi
	};
	!asleep[me];
	if
	:: state[me] == PROMOTED -> state[me] = WAITING
	:: state[me] == DONE -> goto leaving
	fi;

lead:						/* poller_lead() */
	atomic { reading++; assert(reading == 1) };
drain:
	do
	:: ring?id ->
		if
		:: id == me -> atomic { id = 0; state[me] = DONE; reading-- }; goto leaving
		:: id == REQUEST ->		/* take_request() */
			LOCK;
			queued++;
			find_runner();
			UNLOCK
		:: else -> deliver(id)
		fi;
		id = 0
	:: empty(ring) -> break
	od;
	if
	:: state[me] == DONE || stopping -> reading--; goto leaving
	:: else
	fi;
	atomic { edge || kick -> edge = 0; kick = 0 };	/* look() */
	goto drain;

leaving:
	LOCK;
	inside[me] = 0;				/* leave() */
	if
	:: leader == me ->
		leader = NONE;
		hand_on();
#ifndef BUG_1
		if
		:: leader == NONE -> go_away()
		:: else
		fi
#endif
	:: else
	fi;
	UNLOCK
}

proctype worker(byte me)
{
	byte id, seen;
	bit was_away;

	LOCK;
find_work:					/* with the lock held */
	if
	:: stopping || retired ->
		if
		:: leader == me ->		/* callers_inherit() */
			leader = NONE;
#ifndef BUG_8
			hand_on()
#endif
		:: else
		fi;
		UNLOCK;
		goto ended
	:: else
	fi;
	startable = 0;				/* start_queued() */
	if
	:: queued && running < WORKERS ->
		queued--;
		running++; begun++;
#ifndef BUG_9
		find_runner();
#endif
		if
		:: leader == me -> step_out()
		:: else
		fi;
		goto handler
	:: else
	fi;
	if
	:: leader == me || leader == NONE ->
		leader = me;
		away = 0;
#ifndef BUG_13
		if				/* lacks_standby() */
		:: standby == NONE -> wake_idle()
		:: else
		fi;
#endif
		UNLOCK;
		goto lead
	:: leader != me && leader != NONE && standby == NONE -> goto stand_by
	:: else
	fi;
	idling[me] = 1;
	asleep[me] = 1;
	UNLOCK;
end_idle:
	!asleep[me];
	LOCK;
	goto find_work;

stand_by:
	standby = me;
	seen = away_count;
watch:
	if
	:: stopping || retired || startable -> goto relieved
	:: else
	fi;
	if
	:: !away && away_count == seen ->
		parked = 1;
		asleep[me] = 1;
		UNLOCK;
end_parked:
		!asleep[me];
		LOCK;
		parked = 0;
		seen = away_count;
		goto watch
	:: else
	fi;
	was_away = away;
	seen = away_count;
	asleep[me] = 1;
	UNLOCK;					/* doze() for a tick, which may end at any moment */
	asleep[me] = 0;
	LOCK;
	if
	:: was_away && away && away_count == seen -> leader = me; away = 0
	:: else -> goto watch
	fi;
relieved:
	standby = NONE;
	was_away = 0;
	seen = 0;
	wake_idle();
	goto find_work;

lead:						/* poller_lead() */
	atomic { reading++; assert(reading == 1) };
drain:
	do
	:: ring?id ->
		if
		:: id == REQUEST ->		/* take_request() */
			id = 0;
			LOCK;
			if
			:: running < WORKERS && !queued ->
				running++; begun++;
				UNLOCK;
				reading--;
				LOCK;		/* back in lead() of workers.c */
#ifdef BUG_11
				go_away();
#else
				step_out();
#endif
				goto handler
			:: else ->
				queued++;
				find_runner();
				UNLOCK
			fi
		:: else -> deliver(id); id = 0
		fi
	:: empty(ring) -> break
	od;
	if					/* finished() */
	:: stopping || retired -> reading--; LOCK; goto find_work
	:: !stopping && !retired && role_wanted ->
		reading--;
		LOCK;				/* callers_promote() */
#ifndef BUG_12
		role_wanted = 0;
#endif
#ifdef BUG_3
		leader = NONE;
#endif
		hand_on();
#ifdef BUG_2
		UNLOCK;
		goto lead;
#elif defined(BUG_3)
		goto stand_by_or_idle;
#else
		goto find_work;
#endif
	:: !stopping && !retired && !role_wanted && startable -> reading--; LOCK; goto find_work
	:: else
	fi;
end_epoll:
	atomic { edge || kick -> edge = 0; kick = 0 };	/* look() */
	goto drain;

#ifdef BUG_3
stand_by_or_idle:
	if
	:: standby == NONE -> goto stand_by
	:: else
	fi;
	idling[me] = 1;
	asleep[me] = 1;
	UNLOCK;
	goto end_idle;
#endif

handler:					/* with the lock held */
	UNLOCK;
	if
	:: true
	:: stuck++; goto end_stuck
	fi;
	LOCK;					/* shmrpc_next() */
	running--;
	goto find_work;
end_stuck:
	false;
ended:
	skip
}

active proctype peer()
{
	byte requests;

end:
	do
	:: atomic { requested[0] && MAY_REPLY -> requested[0] = 0; ring!0; edge = 1 }
#if NC > 1
	:: atomic { requested[1] -> requested[1] = 0; ring!1; edge = 1 }
#endif
	:: atomic { requests < REQUESTS -> requests++; ring!REQUEST; edge = 1 }
	od
}

#if defined(STOPS) || defined(RETIRES)
active proctype stopper()			/* shmrpc_poller_stop(), workers_retire() */
{
	LOCK;
#ifdef STOPS
	stopping = 1;
#else
	retired = 1;
#endif
	do
	:: idling[NC] || idling[NC + 1] || idling[NC + NW - 1] -> wake_idle()
	:: else -> break
	od;
	if
	:: standby != NONE -> asleep[standby] = 0
	:: else
	fi;
#ifdef STOPS
	if
	:: UNDONE(0) && leader != 0 -> wake_caller(0, DONE)
	:: else
	fi;
#if NC > 1
	if
	:: UNDONE(1) && leader != 1 -> wake_caller(1, DONE)
	:: else
	fi;
#endif
#endif
	UNLOCK;
	kick = 1
}
#endif

active proctype monitor()
{
	timeout ->
		assert(!inside[0] && !inside[NC - 1]);
		assert(stopping || retired || (empty(ring) && (queued == 0 || stuck >= WORKERS)))
}

init
{
	atomic {
		run caller(0);
#if NC > 1
		run caller(1);
#endif
		run worker(NC);
		run worker(NC + 1);
#if NW > 2
		run worker(NC + 2)
#endif
	}
}
