/*
 * space.pml - both directions at once: waiting for data and for ring space on one arm word and one doorbell.
 *
 * Mirrors  lead.c  poll_conn() (drain, then conn_flush), arm_all(), look()
 *          conn.c    push_waiting() and want_room(), link_release()
 *          wake.c    wake_arm(), wake_arm_fence(), wake_disarm(), wake_want_space(), wake_got_space(),
 *                    wake_peer_for_data(), wake_peer_for_space()
 *
 * Two sides, one thread each (outbox.pml has several). Side s owns one segment and is the only writer of:
 *     TAIL(s)  slots it published            HEAD(s)   its position in the peer's ring
 *     ARM(s)   epoch << 1 | asleep           SPACE(s)  1 = "my frames did not fit: tell me when you free some"
 *     SLOT(s, i)  the ring that it sends through, SLOTS slots
 * It sends what fits and keeps the rest in its outbox (`left` messages, private). It sleeps on one doorbell bell[s]
 * (EPOLLET, never read), and is rung when it is armed, not yet rung in this epoch, and
 *     (a) the peer published data        tail, fence E, arm            against  arm, fence F, tail
 *     (b) the peer freed space and SPACE is set
 *                                        head, fence G, space and arm  against  space, fence H, head
 *                                                                      and      arm, fence F, head
 * One fence F after arming serves (a) and (b), but BOTH words have to be looked at again after it: the peer that freed
 * space between our look at its head and our arming found us awake and rang nobody (BUG_4).
 *
 * Abstracted: slots instead of bytes; SPACE is a flag instead of a position (space_step.pml checks that arithmetic);
 * nobody dies (close.pml). A side that has sent and received everything leaves.
 * Nondeterministic: the peer's SPACE is looked at after each message or only at the end of a drain.
 * The cached copies of the peer's head and tail are modelled.
 *
 * Checked: no invalid end state (no lost wake-up for data or space, no deadlock of two full rings); payloads
 * complete, in order, and not overwritten while unread (assert). With -DNP: every execution ends.
 *
 * Configurations that must hold:
 *   (none)   side 0 sends M0 = 5 messages, side 1 none: plain back-pressure
 *   SIZES    messages of 1 and 2 slots in turn: freed space may still not be enough
 *   DUPLEX   both sides send
 *   PSO      stores drain out of order
 *
 * Variants that must fail:
 *   BUG_1  no fence E (wake_peer_for_data)            BUG_2  no fence F (wake_arm_fence)
 *   BUG_3  no fence G (wake_peer_for_space)
 *   BUG_4  arms, looks at the peer's tail again, but not at its head (flush only before arming)
 *   BUG_5  flush after arming, but by the cached head
 *   BUG_6  head stored after arming, without looking at SPACE
 *   BUG_7  head stored before the slot was read
 *   BUG_8  freed space never rings
 *   BUG_9  SPACE never set
 *   BUG_10 a side with an outbox does not read (DUPLEX): two full rings, nobody drains
 *   BUG_11 SPACE set after the last look at the peer's head
 *   BUG_12 no look at the peer's tail after arming
 *   BUG_13 wake_peer_for_space notes the epoch as rung although SPACE was not set (DUPLEX)
 *   BUG_14 `rung` is a flag, reset when the peer is seen awake, instead of an epoch
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
#define SPACE(s)	(SIDE(s) + 3)
#define SLOT(s, i)	(SIDE(s) + 4 + (i) % SLOTS)
#define WORDS		(2 * (4 + SLOTS))
#define CPUS		2
#define CPU		me
#include "store_buffer.h"

bit bell[2];

#define PEER	(1 - me)

inline ring_if_asleep()
{
	arm = LOAD(ARM(PEER));
#ifdef BUG_14
	if
	:: (arm & 1) && !rung -> rung = 1; bell[PEER] = 1
	:: !(arm & 1) -> rung = 0
	:: else
	fi;
#else
	if
	:: (arm & 1) && arm != rung -> rung = arm; bell[PEER] = 1
	:: else
	fi;
#endif
	arm = 0
}

inline wake_peer_for_space()
{
#ifndef BUG_3
	FENCE;				/* G, pairs with H and F */
#endif
#if defined(BUG_13)
	arm = LOAD(ARM(PEER));
	if
	:: (arm & 1) && arm != rung ->
		rung = arm;
		if
		:: LOAD(SPACE(PEER)) -> bell[PEER] = 1
		:: else
		fi
	:: else
	fi;
	arm = 0
#elif !defined(BUG_8)
	if
	:: LOAD(SPACE(PEER)) -> ring_if_asleep()
	:: else
	fi
#else
	skip
#endif
}

#define FITS	(tail + SIZE(sent) - peer_head <= SLOTS)

/* outbox_push(): until the outbox is empty or the ring is full. */
inline outbox_push()
{
	do
	:: left ->
#ifdef BUG_5
		if
		:: !FITS && !armed -> peer_head = LOAD(HEAD(PEER))
		:: else
		fi;
#else
		if
		:: !FITS -> peer_head = LOAD(HEAD(PEER))	/* refresh_head */
		:: else
		fi;
#endif
		if
		:: !FITS -> break
		:: else
		fi;
		do
		:: k < SIZE(sent) -> STORE(SLOT(me, tail), sent + 1); tail++; k++
		:: else -> k = 0; break
		od;
		STORE_REL(TAIL(me), tail);	/* B */
		sent++; left--;
		pushed = 1
	:: else -> break
	od
}

/* conn_flush(), push_waiting() */
inline flush()
{
	outbox_push();
#if !defined(BUG_9)
	do
	:: left ->
		h = peer_head;
#ifndef BUG_11
		want = 1;
		STORE(SPACE(me), 1);	/* wake_want_space */
		FENCE;			/* H, pairs with G */
		outbox_push();
#endif
		if
		:: left && peer_head == h -> break
		:: else
		fi
	:: else -> break
	od;
	h = 0;
	if
	:: !left && want -> want = 0; STORE(SPACE(me), 0)	/* wake_got_space */
	:: else
	fi;
#endif
	if
	:: pushed ->			/* wake_peer_for_data */
		pushed = 0;
#ifndef BUG_1
		FENCE;			/* E, pairs with F */
#endif
		ring_if_asleep()
	:: else
	fi
}

proctype side(bit me; byte left; byte expect)
{
	byte head, tail;		/* own indices: private twins of HEAD(me), TAIL(me) */
	byte peer_head, peer_tail;	/* cached */
	byte taken, sent;		/* messages */
	byte k, h, arm, rung, epoch;
	bit want, pushed;
#ifdef BUG_5
	bit armed;
#endif

turn:					/* poll_conn() */
#ifdef BUG_10
	if
	:: left -> goto no_read
	:: else
	fi;
#endif
	peer_tail = LOAD(TAIL(PEER));	/* C */
	do
	:: head != peer_tail ->
#ifdef BUG_7
		STORE_REL(HEAD(me), head + SIZE(taken));
		FENCE;
#endif
		do
		:: k < SIZE(taken) ->
			assert(LOAD(SLOT(PEER, head)) == taken + 1);
			head++; k++
		:: else -> k = 0; break
		od;
		taken++;
#ifndef BUG_6
		STORE_REL(HEAD(me), head);	/* ring_release, D */
		if
		:: wake_peer_for_space()
		:: head != peer_tail	/* later */
		fi
#endif
	:: else -> break
	od;
#ifdef BUG_10
no_read:
#endif
	if
	:: left -> flush()
	:: else
	fi;
	if
	:: left == 0 && taken == expect -> goto done
	:: else
	fi;

	/* arm_all() */
	epoch++;
	STORE(ARM(me), epoch << 1 | 1);	/* wake_arm */
#ifndef BUG_2
	FENCE;				/* F, pairs with E and G */
#endif
#ifdef BUG_6
	STORE_REL(HEAD(me), head);
#endif
#ifdef BUG_11
	want = 1;
	STORE(SPACE(me), 1);
#endif
#ifdef BUG_5
	armed = 1;
#endif
#ifndef BUG_4
	if
	:: left -> flush()
	:: else
	fi;
	if
	:: left == 0 && taken == expect -> goto done
	:: else
	fi;
#endif
#ifdef BUG_5
	armed = 0;
#endif
#if defined(BUG_10)
	if
	:: left == 0 && LOAD(TAIL(PEER)) != head -> goto disarm
	:: else
	fi;
#elif !defined(BUG_12)
	if
	:: LOAD(TAIL(PEER)) != head -> goto disarm	/* has_input() */
	:: else
	fi;
#endif
	atomic { bell[me] -> bell[me] = 0 }	/* epoll_wait takes the edge */
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
		run side(1, M1, M0)
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
	REORDER(0, SPACE(0))
	REORDER(0, SLOT(0, 0))
	REORDER(0, SLOT(0, 1))
	REORDER(1, HEAD(1))
	REORDER(1, TAIL(1))
	REORDER(1, ARM(1))
	REORDER(1, SPACE(1))
	REORDER(1, SLOT(1, 0))
	REORDER(1, SLOT(1, 1))
	od
}
