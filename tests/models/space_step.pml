/*
 * space_step.pml - asking for space by position, and looking for that only once in a while.
 *
 * Mirrors  conn.c  link_release() (SPACE_STEP), want_room();  wake.c  wake_peer_for_space(head, slack);
 *          ring.h  ring_frame_max()
 *
 * space.pml shows that the handshake loses no wake-up if the consumer looks at SPACE after it freed some. To save that
 * look's fence, the consumer looks only when it has freed a STEP (an eighth of the ring) since it looked last, and
 * rings if the position asked for is reached, or not more than a STEP further. The sender asks for two STEPs from the
 * head that it saw. Checked here: whatever the frames' sizes, a sleeping sender is rung before the ring is empty (no
 * invalid end state). That needs frames of at most a quarter of the ring (BUG_1) and a modest demand (BUG_2).
 *
 * Abstracted: sequentially consistent, each step atomic (the fences are space.pml's); a unit is a sixteenth of the ring.
 * All counts are relative to the consumer's head, so that the search is finite though the sender never stops.
 *
 * Variants that must fail:
 *   BUG_1  a frame may be as long as the ring
 *   BUG_2  sender asks for the whole ring
 *   BUG_3  consumer looks once in a whole ring
 */
#define RING	16
#define STEP	(RING / 8)
#ifdef BUG_1
#define FRAME_MAX	RING
#else
#define FRAME_MAX	(RING / 4)
#endif
#ifdef BUG_2
#define DEMAND	RING
#else
#define DEMAND	(2 * STEP)
#endif
#ifdef BUG_3
#define LOOK	RING
#else
#define LOOK	STEP
#endif

chan frames = [RING] of { byte };	/* their spans */
byte used;				/* tail - head */
byte unlooked;				/* head - space_checked */
short ask;				/* position asked for - head */
bit wanted, asleep;

active proctype sender()
{
	byte span = 1;

	do
	:: atomic { span < FRAME_MAX -> span++ }	/* any size */
	:: atomic {
		used + span <= RING ->
			frames!span;
			used = used + span;
			wanted = 0; ask = 0;		/* wake_got_space */
			span = 1
		}
	:: atomic {
		used + span > RING ->
			wanted = 1;
			ask = DEMAND;			/* wake_want_space, head looked at again */
			asleep = 1
		};
		!asleep
	od
}

active proctype consumer()
{
	byte span;

	do
	:: atomic {
		frames?span ->
			used = used - span;
			unlooked = unlooked + span;
			ask = (wanted -> ask - span : 0);
			span = 0;
			if
			:: unlooked >= LOOK ->
				unlooked = 0;
				if
				:: wanted && ask <= STEP -> asleep = 0
				:: else
				fi
			:: else
			fi
		}
	od
}
