"""Try, Confirm, Cancel: money moves between two banks, or does not, whoever is killed meanwhile.

    python -m examples.tcc [SEED]

Three processes, each with its own SQLite database: the coordinator and two banks. Try reserves:
it takes money away from one account, and announces it at the other. When all banks have agreed the
coordinator decides, and phase two follows: Confirm makes it real, or Cancel undoes it.

    client ----- withdraw, deposit (Try) ----->  bank  --- attend, register -->  coordinator
           ----- begin, decide --------------------------------------------->
                                                       <-- confirm, cancel ----

Two things of shmrpc do the work. Interceptors (interceptors.py) carry the transaction's id in the
metadata of a call: the client's adds it, the bank's reads it and opens its branch. And a bank is
a client of the coordinator whose methods the coordinator calls, over the connection that the bank
has made: so nobody has to find a bank, and one that comes back is known by its call ``attend``.

The decision is in the coordinator's log before anybody hears of it; from there phase two is
repeated until each bank has answered. A transaction that is found undecided there after the
coordinator was killed is cancelled. The story kills (-9) a bank and the coordinator between Try
and Confirm, and then anybody at any moment (SEED says which), and checks that the sums hold.
"""
