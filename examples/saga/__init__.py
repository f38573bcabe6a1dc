"""A saga: a trip of a car, a hotel and a payment is booked as a whole, or not at all.

    python -m examples.saga [SEED]

Four processes, each with its own SQLite database: the coordinator and three services. No database
spans them, so each step is committed at once, and what was done is undone, the last first, when a
later step fails. The story kills (-9) services and the coordinator at the worst moments, then
anybody at any moment (SEED says which), and checks in the end that nothing was lost or sold twice.

A call may end because its service died. ``ConnectionLost.outcome`` says what to do then:

    not_sent, not_started   the step has not run: ask again (what connect(retries=...) does too)
    unknown                 it may have run: give up, and cancel it with the others

So a service has to stand (service.py) a cancellation of what never happened, one that comes twice,
and a booking that comes after its cancellation. The coordinator (coordinator.py) writes a step into
its log before it calls. When it is started again it cancels what the log says is unfinished.
"""
