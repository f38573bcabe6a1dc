/*
 * leader.pml - many threads, one connection: whoever waits reads the ring for all (no reader thread).
 *
 * Mirrors  poller.c  poller_lead() (read, deliver, hand on), poller_wait() (register, lead or follow)
 *          conn.c    conn_send(); the table call id -> waiter
 *
 * NT threads make one call each over one connection. A call: register a waiter (under the mutex), send, then
 * wait: the first to find nobody leading leads; the others sleep on a futex, their own state word:
 *     WAITING -> DONE   the leader delivered the reply, or the loss of the connection
 *     WAITING -> LEAD   the leader got its own reply (or gave up) and handed the role on
 * The leader reads the ring until its own reply is there, then hands the role on to one follower that is
 * waiting, if any. All of that under the mutex; the futex wake may come after it was left.
 *
 * The ring's arm / doorbell protocol is that of wake.pml, here reduced to `edge`: an event is pending (EPOLLET)
 * since a reply was published; epoll_wait takes it. That makes it matter that a new leader drains before it
 * sleeps: the edge may have been taken by the old one. The control socket is in the epoll set level-triggered:
 * its hang-up stays for the next leader when this one took the event, found its own reply and left (BUG_13).
 * futex_wait(word, WAITING) is atomic in the kernel: sleeps only if the word still has that value;
 * futex_wake reaches only a thread that sleeps. Both contain full barriers and everything else is under the
 * mutex, so this model is sequentially consistent on purpose.
 *
 * Nondeterministic: the order of the replies; thread 0 may have a deadline and give up at any moment (only it, and
 * only sometimes: a timeout would hide the lost wake-ups of the others); with DETACHED thread 0 submits and
 * never waits (a Future that nobody asks); with DIES the peer may die at any moment: hang-up on the control socket.
 *
 * Checked: no invalid end state, i.e. every call ends; -DNP: on every schedule. At every unlock: if some thread
 * follows, somebody leads (so: never a reply, a waiting thread, and no leader). One reader at a time. A thread
 * gets its own reply. After a thread has returned nobody touches its waiter's state.
 *
 * Variants that must fail:
 *   BUG_1  leader leaves without handing on
 *   BUG_2  successor chosen under the mutex, "nobody leads" stored after it was left
 *   BUG_3  successor marked but not woken
 *   BUG_4  a follower gives up although the role was handed to it meanwhile
 *   BUG_5  call registered after it was sent
 *   BUG_6  futex wake before the state word is stored
 *   BUG_7  follower sleeps without comparing the state word
 *   BUG_8  role handed to a follower whose reply was already delivered
 *   BUG_9  reply delivered to a waiter looked up before (mutex left in between)
 *   BUG_10 a leader that gives up leaves without handing on
 *   BUG_11 new leader sleeps before it drains
 *   BUG_12 role handed to a call that nobody waits for (DETACHED)
 *   BUG_13 control socket registered EPOLLET: the hang-up is seen by one leader only, who hands on (DIES)
 *   BUG_14 on hang-up the leader ends its own call and leaves, "nobody leads" (DIES)
 *   BUG_15 on hang-up the ring is not drained once more before calls are failed (DIES; a reply is lost)
 * (Not bugs, thanks to the level-triggered hang-up: a leader that ends only its own call and hands on, and calls
 * registered after the hang-up. Each next leader sees it again. Calls that nobody waits for need `dead`.)
 */
#ifndef NT
#define NT 3
#endif
#define NONE NT

mtype = { IDLE, WAITING, LEAD, DONE };

mtype state[NT] = IDLE;		/* the futex words */
bit registered[NT];		/* under the mutex: id is in the table */
bit following[NT];		/* under the mutex: in poller_wait, may be handed the role */
bit asleep[NT];			/* kernel: queued on the futex */
bit ok[NT];			/* DONE with a reply (else: connection lost) */
bit gone[NT];			/* ghost: the call has returned */
bit answered[NT];		/* ghost: its reply became visible in the ring */
byte leader = NONE;
bit mutex;
bit dead;			/* under the mutex: connection lost */
byte readers;			/* ghost */

bit requested[NT];		/* on their way to the peer */
chan ring = [NT] of { byte };	/* replies */
bit edge;
#ifdef DIES
bit hup;
#endif

#define LOCK	atomic { mutex == 0 -> mutex = 1 }
#define FOLLOWS(i)	(following[i] && state[i] == WAITING)
#define SOMEBODY_FOLLOWS	(FOLLOWS(0) || FOLLOWS(1) || FOLLOWS(2))
#define UNLOCK	atomic { assert(leader != NONE || !SOMEBODY_FOLLOWS); mutex = 0 }

inline futex_wake(i)
{
	asleep[i] = 0
}

inline set_state(i, s)
{
	d_step { assert(!gone[i]); state[i] = s }
}

/* With the mutex held and the role ours: give it to a follower, or to nobody. Sets `next`. */
inline hand_on()
{
#if defined(BUG_8)
#define CANDIDATE(i) (i != me && following[i])
#elif defined(BUG_12)
#define CANDIDATE(i) (i != me && registered[i] && state[i] == WAITING)
#else
#define CANDIDATE(i) (i != me && FOLLOWS(i))
#endif
	if
	:: CANDIDATE(0) -> next = 0
	:: CANDIDATE(1) -> next = 1
	:: CANDIDATE(2) -> next = 2
	:: else -> next = NONE
	fi;
#ifdef BUG_2
	if
	:: next != NONE -> leader = next; set_state(next, LEAD)
	:: else
	fi;
	mutex = 0;
	if
	:: next == NONE -> leader = NONE
	:: else
	fi;
#else
	leader = next;
	if
	:: next != NONE -> set_state(next, LEAD)
	:: else
	fi;
	UNLOCK;
#endif
#ifndef BUG_3
	if
	:: next != NONE -> futex_wake(next)
	:: else
	fi;
#endif
	next = NONE
}

/* Deliver a reply or (good = 0) the loss of the connection to waiter `id`. Not to ourselves: we are awake. */
inline deliver(id, good)
{
#ifdef BUG_9
	LOCK;
	found = registered[id];
	UNLOCK;
	if
	:: found -> registered[id] = 0; ok[id] = good; set_state(id, DONE)
	:: else
	fi;
	futex_wake(id)
#else
	LOCK;
#ifdef BUG_6
	futex_wake(id);
#endif
	if
	:: registered[id] ->
		registered[id] = 0;
		ok[id] = good;
		set_state(id, DONE)
	:: else				/* given up: dropped */
	fi;
	UNLOCK;
#ifndef BUG_6
	futex_wake(id)
#endif
#endif
}

proctype thread(byte me)
{
	byte id, next = NONE;
	bit deadline;
#ifdef DIES
	bit final;
#endif
#ifdef BUG_9
	bit found;
#endif

	if
	:: me == 0 -> deadline = 1
	:: true
	fi;

	/* conn_send() */
#ifndef BUG_5
	LOCK;
#ifdef DIES
	if
	:: dead -> UNLOCK; goto returned	/* ConnectionLost: not_sent */
	:: else
	fi;
#endif
	registered[me] = 1;
	state[me] = WAITING;
	UNLOCK;
	requested[me] = 1;
#else
	requested[me] = 1;
	LOCK;
	registered[me] = 1;
	state[me] = WAITING;
	UNLOCK;
#endif
#ifdef DETACHED
	if
	:: me == 0 -> goto detached
	:: else
	fi;
#endif

	/* poller_wait() */
	LOCK;
	if
	:: state[me] == DONE -> goto unlock	/* another thread led and got it */
	:: else
	fi;
	if
	:: leader == NONE -> leader = me; state[me] = LEAD
	:: else -> following[me] = 1
	fi;
	UNLOCK;

follow:
	if
	:: state[me] == LEAD -> goto lead
	:: state[me] == DONE -> goto taken
#ifdef BUG_7
	:: state[me] == WAITING -> asleep[me] = 1
#else
	:: atomic { state[me] == WAITING -> asleep[me] = 1 }	/* futex_wait */
#endif
	fi;
	if
	:: !asleep[me] -> goto follow
	:: deadline -> asleep[me] = 0		/* ETIMEDOUT */
	fi;
	LOCK;
	following[me] = 0;
	registered[me] = 0;
#ifndef BUG_4
	if
	:: state[me] == LEAD -> state[me] = IDLE; hand_on(); goto returned
	:: else
	fi;
#endif
	goto unlock;

lead:						/* poller_lead() */
	atomic { readers++; assert(readers == 1); assert(leader == me) };
#ifdef BUG_11
	goto sleep;
#endif
drain:
	do
	:: ring?id ->
		deliver(id, 1);
		if
		:: id == me -> id = 0; goto leave
		:: else -> id = 0
		fi
	:: empty(ring) -> break
	od;
#ifdef DIES
#ifndef BUG_15
	if
	:: final ->
#else
	if
	:: hup ->
#endif
#ifdef BUG_14
		ok[me] = 0; goto abandon;
#else
		LOCK;
		dead = 1;
		UNLOCK;
		do
		:: id < NT -> deliver(id, 0); id++
		:: else -> id = 0; break
		od;
		goto leave;
#endif
	:: else
	fi;
#endif
sleep:
	if
#if !defined(DIES)
	:: atomic { edge -> edge = 0 }; goto drain
#elif defined(BUG_13)
	:: atomic { edge -> edge = 0; final = hup }; goto drain
#else
	:: atomic { edge || hup -> edge = 0; final = hup }; goto drain
#endif
	:: deadline -> skip
	fi;
leave:
	readers--;
	LOCK;
	registered[me] = 0;
	following[me] = 0;
	state[me] = IDLE;
#if defined(BUG_1)
	leader = NONE; mutex = 0;
#elif defined(BUG_10)
	if
	:: !ok[me] && deadline -> leader = NONE; mutex = 0
	:: else -> hand_on()
	fi;
#else
	hand_on();
#endif
	goto returned;
#ifdef BUG_14
abandon:
	readers--;
	LOCK;
	registered[me] = 0;
	leader = NONE; mutex = 0;
	goto returned;
#endif

taken:
	LOCK;
	following[me] = 0;
unlock:	UNLOCK;
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
