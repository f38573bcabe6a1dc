/*
 * takeover.pml - server workers: the thread that reads a request also runs its handler; if that takes long,
 * the standby takes the reading over.
 *
 * Mirrors  workers.c  find_work(), stand_by(), doze(), go_away(), idle(), wake_idle(), take_request(), start_queued(),
 *                     shmrpc_next();  lead.c  poller_lead()
 *
 * NT = workers + 1 threads, of which WORKERS may run requests at a time. A thread that comes for work:
 *     queued requests, and fewer than WORKERS running?  run the first
 *     it leads, or nobody does?                         lead: read; the first request that may run is its own
 *     no standby?                                       stand by: tick while the leader is away with a request; the same
 *                                                       away_count on two ticks = stuck: take the role, wake an idle thread
 *     else                                              idle until woken
 * The standby parks while the leader is not away; a leader that goes away with a request wakes it (go_away). All of it is
 * decided under the poller's lock, and the states that threads sleep on change under it, so this model is
 * sequentially consistent on purpose.
 *
 * Abstracted: time (a tick may end at any moment, so also a takeover that was not needed must be harmless); the ring is a
 * counter (wake.pml has its wake-ups); creating threads (SHMRPC_SPAWN): all NT exist. A handler returns or blocks for ever;
 * requests are read also while WORKERS run (they are queued).
 *
 * Checked: one thread at a time in poller_lead (assert); when nothing moves any more, no request is in the ring, and none is
 * queued unless WORKERS handlers are stuck (assert at `timeout`); at each unlock: idle threads only if there is a
 * standby or one of them was just woken; no thread waits for anything else (invalid end states); -DNP: no endless
 * ticking: every execution ends.
 *
 * Variants that must fail:
 *   BUG_1  nobody stands by
 *   BUG_2  go_away does not wake the parked standby
 *   BUG_3  standby decides to take over, then takes the lock
 *   BUG_4  old leader comes back and reads on without looking who leads
 *   BUG_5  old leader looks who leads before it takes the lock
 *   BUG_6  takeover wakes no idle thread
 *   BUG_7  a thread that comes back idles although nobody stands by
 *   BUG_8  away stays set when the leader comes back to read: the standby believes it stuck
 *   BUG_9  go_away wakes the standby after the handler, not before
 *   BUG_10 standby gives up the lock before it says that it sleeps
 *   BUG_11 leader says "away" when it has taken a request, while it is still in poller_lead: if it loses the CPU there for two
 *          ticks, two threads lead
 *   BUG_12 a thread that comes back does not look at the queue
 *   BUG_13 standby forgets between two ticks what it saw: ticks for ever (found with -DNP only)
 */
#ifndef WORKERS
#define WORKERS 2
#endif
#define NT (WORKERS + 1)
#ifndef REQUESTS
#define REQUESTS 4
#endif
#define NONE NT

bit lock;
byte leader = NONE;		/* all of these: under the lock */
bit away;
byte away_count;
byte standby = NONE;
bit parked;			/* standby_parked */
bit idling[NT];			/* in poller->idle */
bit sleeping[NT];		/* slot.state == SLOT_SLEEPING (the futex) */
byte running, queued;

byte waiting;			/* requests in the rings */
byte stuck, leading;		/* ghosts */

#define LOCK	atomic { lock == 0 -> lock = 1 }
#define UNLOCK	lock = 0

inline go_away()
{
	away = 1;
	away_count++;
#if !defined(BUG_2) && !defined(BUG_9)
	if
	:: parked -> sleeping[standby] = 0		/* slot_wake */
	:: else
	fi
#endif
}

inline wake_idle()
{
	if
	:: idling[0] -> idling[0] = 0; sleeping[0] = 0
	:: idling[1] -> idling[1] = 0; sleeping[1] = 0
	:: idling[2] -> idling[2] = 0; sleeping[2] = 0
	:: else
	fi
}

proctype worker(byte me)
{
	byte seen;
	bit was_away;

	LOCK;
find_work:					/* with the lock held */
#ifndef BUG_12
	if
	:: queued && running < WORKERS ->	/* start_queued() */
		assert(leader != me);		/* it would have to go_away() */
		queued--;
		running++;
		goto handler
	:: else
	fi;
#endif
	if
	:: leader == me || leader == NONE ->
		leader = me;
#ifndef BUG_8
		away = 0;
#endif
		UNLOCK;
		goto lead
#ifndef BUG_1
#ifdef BUG_7
	:: leader != me && leader != NONE && standby == NONE && seen == 0 -> goto stand_by
#else
	:: leader != me && leader != NONE && standby == NONE -> goto stand_by
#endif
#endif
	:: else
	fi;
	idling[me] = 1;				/* idle() */
	sleeping[me] = 1;
	UNLOCK;
end_idle:
	!sleeping[me];
	LOCK;
	goto find_work;

stand_by:
	standby = me;
	seen = away_count;
watch:
	if
	:: !away && away_count == seen ->
		parked = 1;			/* doze() */
#ifdef BUG_10
		UNLOCK;
		sleeping[me] = 1;
#else
		sleeping[me] = 1;
		UNLOCK;
#endif
end_parked:
		!sleeping[me];
		LOCK;
		parked = 0;
		seen = away_count;
		goto watch
	:: else
	fi;
	was_away = away;
	seen = away_count;
	UNLOCK;					/* doze() for a tick, which may end at any moment */
#ifdef BUG_3
	if
	:: was_away && away && away_count == seen -> LOCK; goto take_over
	:: else
	fi;
#endif
	LOCK;
	if
#ifdef BUG_13
	:: was_away && away && away_count != seen -> goto take_over
#else
	:: was_away && away && away_count == seen -> goto take_over
#endif
	:: else -> goto watch
	fi;
take_over:
	standby = NONE;
	was_away = 0;
	seen = 0;
	leader = me;
	away = 0;
#ifndef BUG_6
	wake_idle();
#endif
	goto find_work;

lead:						/* poller_lead() */
	atomic { leading++; assert(leading == 1) };
end_epoll:
	atomic { waiting > 0 -> waiting-- };
	LOCK;					/* take_request() */
	if
	:: running < WORKERS && !queued -> running++
	:: else ->
		queued++;
		UNLOCK;
		leading--;
		goto lead
	fi;
#ifdef BUG_11
	go_away();
#endif
	UNLOCK;
	leading--;				/* back from poller_lead() in find_work() */
	LOCK;
#ifndef BUG_11
	go_away();
#endif
handler:					/* with the lock held */
	UNLOCK;
	if
	:: true					/* the handler */
	:: stuck++; goto end_stuck
	fi;
#ifdef BUG_9
	LOCK;
	if
	:: parked && standby != NONE -> sleeping[standby] = 0
	:: else
	fi;
	UNLOCK;
#endif
#ifdef BUG_4
	LOCK;
	running--;
	away = 0;
	UNLOCK;
	goto lead;
#endif
#ifdef BUG_5
	was_away = (leader == me);
	LOCK;
	running--;
	if
	:: was_away -> was_away = 0; away = 0; UNLOCK; goto lead
	:: else
	fi;
#else
	LOCK;					/* shmrpc_next() */
	running--;
#endif
#ifdef BUG_7
	seen = 1;
#endif
	goto find_work;
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
	timeout -> assert(waiting == 0 && (queued == 0 || stuck >= WORKERS))
}

init
{
	atomic {
		run worker(0);
		run worker(1);
		run worker(2)
	}
}
