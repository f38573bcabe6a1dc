/*
 * outbox.pml - a full ring in a process with several threads: who sends what waits in the outbox?
 *
 * Mirrors  conn.c    conn_send() from any thread, push_waiting(), conn_flush() from the leader
 *          lead.c  poll_conn(), arm_all(), look()
 *          wake.c    wake_arm(), wake_want_space(), wake_peer_for_data(), wake_peer_for_space()
 *
 * Three CPUs: S = a thread that sends M messages and waits for nothing (a worker's replies, notify), P = the leader of the
 * same process, which drains and sleeps for all (it alone arms), R = the peer, which takes S's messages and sends D
 * of its own. Words:
 *     W_TAIL, W_SLOT  the ring that S and P fill             W: holder of send_lock
 *     W_SPACE         "tell me when you free some"           W: holder of send_lock
 *     W_BYTES         conn.outbox_bytes: outbox not empty    W: holder of send_lock.  P reads it without, as a hint
 *     W_ARM           epoch << 1 | asleep                    W: P
 *     R_HEAD, R_TAIL, R_ARM                                  W: R
 * send_lock is a word too: taking it drains the taker's store buffer (lock cmpxchg), leaving it is a release store.
 * `pub`, `queued`, `want` are plain data under the lock. `rung` is not: wake_peer_for_data runs after the lock was left (no
 * system call under it), unsynchronised between S and P. That is fine: the worst case is one ring too many.
 *
 * The point that space.pml can't show: S asks for space while P may be anywhere - about to arm, asleep with this
 * epoch already rung, between epoll_wait and wake_disarm. Two store-buffering pairs meet, and P's is within the process:
 *     S: W_BYTES, W_SPACE stored; fence H; R's head looked at again
 *     P: W_ARM stored; fence F; W_BYTES looked at again (and if set, R's head), and R's tail
 * Either S sees the freed space, or R (or P) sees what S asked for. It needs W_BYTES stored BEFORE fence H (BUG_3).
 *
 * Abstracted: the reverse ring is never full; one sending thread (P's flush is the second producer). R spins, so
 * that nobody rings it, unless R_SLEEPS.
 * Checked: no invalid end state, order and content of messages (assert); with -DNP: every execution ends.
 *
 * Configurations that must hold: (none); PSO; R_SLEEPS.
 *
 * Variants that must fail:
 *   BUG_1  S: no fence H between SPACE and the last look at R's head
 *   BUG_2  S: no look at R's head after SPACE
 *   BUG_3  S: W_BYTES stored after the last look at R's head, when push_waiting is done
 *   BUG_4  P: W_BYTES looked at before arming only (a cooling that looks at the peer's tail only)
 *   BUG_5  P: SPACE withdrawn after the lock was left
 *   BUG_6  P: flushes without the lock
 *   BUG_7  S: publishes directly although the outbox is not empty (overtakes it)
 *   BUG_8  P: no fence F
 *   BUG_9  R: no fence G
 *   BUG_10 nobody leads while a message is in the outbox (P leaves as soon as it has its own data)
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
#define W_SPACE		2
#define W_BYTES		3
#define W_ARM		4
#define R_HEAD		5
#define R_TAIL		6
#define R_ARM		7
#define W_SLOT(i)	(8 + (i) % SLOTS)
#define WORDS		(8 + SLOTS)
#define CPUS		3
#define CPU		_pid	/* active processes are numbered in the order of the text */
#include "store_buffer.h"

bit bell_p, bell_r;
byte pub, queued;		/* under the lock: messages published, and sent by S */
bit want;			/* under the lock: conn.wants_room */
byte rung;			/* wake.rung of our process */
byte received;			/* ghost */

#define LOCK	atomic { FENCE && mem[W_LOCK] == 0 -> mem[W_LOCK] = 1 }
#define UNLOCK	STORE_REL(W_LOCK, 0)
#define ROOM	(pub - LOAD(R_HEAD) < SLOTS)

inline wake_r()
{
#ifdef R_SLEEPS
	if
	:: pushed ->
		pushed = 0;
		FENCE;			/* E */
		arm = LOAD(R_ARM);
		if
		:: (arm & 1) && arm != rung -> rung = arm; bell_r = 1
		:: else
		fi;
		arm = 0
	:: else
	fi
#else
	pushed = 0
#endif
}

inline publish(number)
{
	STORE(W_SLOT(pub), number);
	pub++;
	STORE_REL(W_TAIL, pub);
	pushed = 1
}

inline outbox_push()
{
	do
	:: pub != queued && ROOM -> publish(pub + 1)
	:: else -> break
	od
}

/* With the lock held and something in the outbox. */
inline push_waiting()
{
	outbox_push();
	if
	:: pub != queued ->		/* -EAGAIN */
#ifndef BUG_3
		STORE(W_BYTES, 1);
#endif
		want = 1;
		STORE(W_SPACE, 1);	/* wake_want_space */
#ifndef BUG_1
		FENCE;			/* H, pairs with G and F */
#endif
#ifndef BUG_2
		outbox_push()
#endif
	:: else
	fi;
#ifndef BUG_5
	if
	:: pub == queued && want -> want = 0; STORE(W_SPACE, 0)	/* wake_got_space */
	:: else
	fi;
#endif
	STORE(W_BYTES, pub != queued)
}

active proctype S()
{
	byte arm, i;
	bit pushed;

	do
	:: i < M ->			/* conn_send() */
		LOCK;
		queued++;
		if
#ifdef BUG_7
		:: ROOM -> publish(queued)
#else
		:: pub + 1 == queued && ROOM -> publish(queued)
#endif
		:: else -> push_waiting()
		fi;
		UNLOCK;
		wake_r();
		i++
	:: else -> break
	od
}

inline conn_flush()
{
	if
	:: LOAD(W_BYTES) ->		/* the hint */
#ifndef BUG_6
		LOCK;
#endif
		if
		:: pub != queued -> push_waiting()
		:: else
		fi;
#ifndef BUG_6
		UNLOCK;
#endif
#ifdef BUG_5
		if
		:: pub == queued && want -> want = 0; STORE(W_SPACE, 0)
		:: else
		fi;
#endif
		wake_r()
	:: else
	fi
}

active proctype P()
{
	byte arm, head, epoch;
	bit pushed;

turn:
	head = LOAD(R_TAIL);		/* poll_conn(): deliver everything */
	conn_flush();
#ifdef BUG_10
	if
	:: head == D -> goto done
	:: else
	fi;
#endif
	epoch++;
	STORE(W_ARM, epoch << 1 | 1);	/* wake_arm */
#ifndef BUG_8
	FENCE;				/* F, pairs with E, G and H */
#endif
#ifndef BUG_4
	conn_flush();
#endif
	if
	:: LOAD(R_TAIL) != head -> goto disarm
	:: else
	fi;
	if
	:: atomic { bell_p -> bell_p = 0 }
	:: received == M && head == D -> goto done	/* ghost: nothing will ever come */
	fi;
disarm:
	STORE(W_ARM, epoch << 1);	/* wake_disarm */
	goto turn;
done:
	skip
}

inline wake_p()
{
	arm = LOAD(W_ARM);
	if
	:: (arm & 1) && arm != r_rung -> r_rung = arm; bell_p = 1
	:: else
	fi;
	arm = 0
}

active proctype R()
{
	byte arm, head, sent, epoch, r_rung;

drain:
	do
	:: LOAD(W_TAIL) != head ->
		assert(LOAD(W_SLOT(head)) == head + 1);
		head++;
		received = head;
		STORE_REL(R_HEAD, head);
#ifndef BUG_9
		FENCE;				/* G, pairs with H and F */
#endif
		if
		:: LOAD(W_SPACE) -> wake_p()
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
#if D > 0
	:: sent < D -> STORE(R_ARM, epoch << 1); goto own	/* another thread of the peer sends */
#endif
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
	REORDER(0, W_BYTES)
	REORDER(0, W_SPACE)
	REORDER(1, W_SLOT(0))
	REORDER(1, W_BYTES)
	REORDER(1, W_SPACE)
	REORDER(1, W_ARM)
	REORDER(2, R_ARM)
	od
}
