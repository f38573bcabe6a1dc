/*
 * space.pml - both directions at once: waiting for data and for ring space on one arm word and one doorbell.
 *
 * Mirrors  conn.c  the drain / flush / sleep loop of one side (single-threaded; outbox.pml has the threads)
 *          ring.c  ring_publish() (tail), ring_read() / ring_release() (head)
 *          wake.c  wake_arm(), wake_disarm(), wake_peer()
 *
 * Each side s owns one segment and is the only writer of:
 *     TAIL(s)  slots it published           HEAD(s)  its position in the peer's ring
 *     ARM(s)   epoch << 1 | armed           WANT(s)  1 = "my ring (as you drain it) is full, I have an outbox"
 *     SLOT(s, i)  the ring it sends through, SLOTS slots
 * A side sends what fits and keeps the rest in its outbox (`left`, private). A side sleeps on its one
 * doorbell bell[s], armed by its one arm word, and is rung when it is armed, not yet signalled for
 * this epoch, and
 *     (a) the peer published data (after its tail store and fence E), or
 *     (b) the peer freed space (after its head store and fence G) and WANT(s) is set.
 * One fence F after arming covers both; after it BOTH the peer's tail and the peer's head are re-checked.
 *
 * Abstracted: slots instead of bytes, no wrap padding, nobody dies (close.pml), one thread a side (outbox.pml).
 * A side that has sent and received everything leaves; until then it has a reason to live.
 * Nondeterministic: head is published (and the peer woken) after each message or for a whole batch.
 * The receiver's cached copy of head (refreshed only when the ring looks full) is modelled.
 *
 * Checked: no invalid end state (= no lost wake-up, for data or space, no deadlock of two full rings), payloads
 * complete, in order and not overwritten while unread (assert). With -DNP: every execution ends.
 *
 * Configurations that must hold:
 *   (none)   side 0 sends M0 = 5, side 1 sends M1 = 0: plain back-pressure, with an empty reverse ring
 *   SIZES    the same with messages of 1 and 2 slots: freed space may still not be enough
 *   DUPLEX   both send
 *   MERGED   one fence for head and tail together, per turn of the loop instead of per publication
 *            (what a server wants: take requests, write replies, one fence, one look at the peer's words)
 *   PSO      stores drain out of order
 *
 * Variants that must fail:
 *   BUG_1  no fence E  (tail store / arm load)                 BUG_2  no fence F (arm and want store / re-check)
 *   BUG_3  no fence G  (head store / want and arm load)        BUG_4  no re-check of head after arming
 *   BUG_5  head re-checked after WANT but before arming        BUG_6  re-check uses the cached head
 *   BUG_7  head published after arming, without wake_peer      BUG_8  head published before the slot was read
 *   BUG_9  freed space never rings (WANT is not looked at)     BUG_10 WANT never set
 *   BUG_11 a side with an outbox does not read (DUPLEX)        BUG_12 WANT set only after the re-check
 *   BUG_13 no re-check of tail after arming (DUPLEX)
 *   BUG_14 publish_head notes the epoch as signalled before it knows whether it will ring (DUPLEX)
 *   BUG_15 `signalled` is a flag, reset when the peer is seen disarmed, instead of an epoch
 */
#ifndef M0
#define M0 5
#endif
#ifndef M1
#ifdef DUPLEX
#define M1 3
#else
#define M1 0
#endif
#endif
#ifndef SLOTS
#define SLOTS 2
#endif
#ifdef SIZES
#define SIZE(i) (1 + ((i) & 1))		/* 1, 2, 1, 2, ... */
#else
#define SIZE(i) 1
#endif

#define SIDE(s)		((s) * (4 + SLOTS))
#define TAIL(s)		(SIDE(s) + 0)
#define HEAD(s)		(SIDE(s) + 1)
#define ARM(s)		(SIDE(s) + 2)
#define WANT(s)		(SIDE(s) + 3)
#define SLOT(s, i)	(SIDE(s) + 4 + (i) % SLOTS)
#define WORDS		(2 * (4 + SLOTS))
#define CPUS		2
#include "store_buffer.h"

bit bell[2];

#define PEER	(1 - me)
#define CPU	me

/* wake.c: wake_peer(). One `signalled` for both reasons. */
inline wake_peer()
{
	a = LOAD(ARM(PEER));
#ifdef BUG_15
	if
	:: (a & 1) && !signalled -> signalled = 1; bell[PEER] = 1
	:: !(a & 1) -> signalled = 0
	:: else
	fi;
#else
	if
	:: (a & 1) && a != signalled -> signalled = a; bell[PEER] = 1
	:: else
	fi;
#endif
	a = 0
}

/* ring.c: ring_release(): publish head, then look whether the peer waits for space. */
inline publish_head()
{
	STORE_REL(HEAD(me), head);
	published = head;
#ifdef MERGED
	freed = 1
#else
#ifndef BUG_3
	FENCE;				/* G, matches F */
#endif
#if defined(BUG_14)
	a = LOAD(ARM(PEER));
	if
	:: (a & 1) && a != signalled ->
		signalled = a;
		if
		:: LOAD(WANT(PEER)) -> bell[PEER] = 1
		:: else
		fi
	:: else
	fi;
	a = 0
#elif !defined(BUG_9)
	if
	:: LOAD(WANT(PEER)) -> wake_peer()
	:: else
	fi
#endif
#endif
}

proctype side(bit me; byte left; byte expect)
{
	byte head, tail;		/* own indices: private twins of HEAD(me), TAIL(me) */
	byte published;			/* last head stored */
	byte peer_head;			/* cached */
	byte taken, sent;		/* messages */
	byte t, k, a, epoch, signalled;
	bit want;
#ifdef MERGED
	bit freed, wrote;
#endif

turn:
	/* ---- drain ---- */
#ifdef BUG_11
	if
	:: left -> goto flush
	:: else
	fi;
#endif
	t = LOAD(TAIL(PEER));
	do
	:: head != t ->
#ifdef BUG_8
		STORE_REL(HEAD(me), head + SIZE(taken));
		FENCE;
#endif
		k = 0;
		do
		:: k < SIZE(taken) ->
			assert(LOAD(SLOT(PEER, head)) == taken + 1);
			head++; k++
		:: else -> k = 0; break
		od;
		taken++;
#ifndef BUG_7
		if
		:: publish_head()
		:: head != t
		fi
#endif
	:: else -> break
	od;
	t = 0;

	/* ---- flush the outbox ---- */
flush:
	do
	:: left ->
		if
		:: tail + SIZE(sent) - peer_head > SLOTS -> peer_head = LOAD(HEAD(PEER))
		:: else
		fi;
		if
		:: tail + SIZE(sent) - peer_head > SLOTS -> break
		:: else
		fi;
		do
		:: k < SIZE(sent) ->
			STORE(SLOT(me, tail), sent + 1);
			tail++; k++
		:: else -> k = 0; break
		od;
		STORE_REL(TAIL(me), tail);
		sent++; left--;
#ifdef MERGED
		wrote = 1
#else
#ifndef BUG_1
		FENCE;			/* E, matches F */
#endif
		wake_peer()
#endif
	:: else -> break
	od;
#if !defined(BUG_10) && !defined(BUG_12)
	if
	:: want != (left > 0) -> want = (left > 0); STORE(WANT(me), want)
	:: else
	fi;
#endif
#ifdef MERGED
	if
	:: wrote || freed ->
#if !defined(BUG_1) && !defined(BUG_3)
		FENCE;			/* E and G in one */
#endif
		if
		:: wrote || LOAD(WANT(PEER)) -> wake_peer()
		:: else
		fi;
		wrote = 0; freed = 0
	:: else
	fi;
#endif
	if
	:: left == 0 && taken == expect -> goto done
	:: else
	fi;

	/* ---- sleep ---- */
#ifdef BUG_5
	FENCE;
	if
	:: left && tail + SIZE(sent) - LOAD(HEAD(PEER)) <= SLOTS -> goto turn
	:: else
	fi;
#endif
	epoch++;
	STORE(ARM(me), epoch << 1 | 1);	/* wake_arm */
#ifndef BUG_2
	FENCE;				/* F, matches E and G */
#endif
#ifdef BUG_7
	if
	:: published != head -> STORE_REL(HEAD(me), head); published = head
	:: else
	fi;
#endif
	if
#if defined(BUG_11)
	:: left == 0 && LOAD(TAIL(PEER)) != head -> goto disarm
#elif !defined(BUG_13)
	:: LOAD(TAIL(PEER)) != head -> goto disarm
#endif
	:: else
	fi;
	if
#if defined(BUG_6)
	:: left && tail + SIZE(sent) - peer_head <= SLOTS -> goto disarm
#elif !defined(BUG_4) && !defined(BUG_5)
	:: left && tail + SIZE(sent) - LOAD(HEAD(PEER)) <= SLOTS -> goto disarm
#endif
	:: else
	fi;
#ifdef BUG_12
	if
	:: want != (left > 0) -> want = (left > 0); STORE(WANT(me), want); FENCE
	:: else
	fi;
#endif
	atomic { bell[me] -> bell[me] = 0 }
disarm:
	STORE(ARM(me), epoch << 1);	/* wake_disarm */
	goto turn;
done:
	skip
}

init
{
	atomic {
		run side(0, M0, M1);
		run side(1, M1, M0);
	}
}

active proctype memory()
{
	byte w, v;
end:
	do
	FLUSH(0)
	FLUSH(1)
	REORDER(0, HEAD(0))
	REORDER(0, TAIL(0))
	REORDER(0, ARM(0))
	REORDER(0, WANT(0))
	REORDER(0, SLOT(0, 0))
	REORDER(0, SLOT(0, 1))
	REORDER(1, HEAD(1))
	REORDER(1, TAIL(1))
	REORDER(1, ARM(1))
	REORDER(1, WANT(1))
	REORDER(1, SLOT(1, 0))
	REORDER(1, SLOT(1, 1))
	od
}
