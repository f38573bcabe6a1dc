"""A contract in a process of its own, and the chain whose state it reads and writes meanwhile.

    python -m examples.contract_vm [SEED]

    chain  -------- invoke -------->  contract      As in XuperChain's XuperBridge; the chain is the
           <----- get, put, get ----                server. The contract connects and calls
           -- result, or an error ->                ``ready``, whose caller the chain then calls.

What an invocation writes is kept aside, and goes into SQLite in one transaction when it returns. So
nothing is left of one that fails, or is killed (-9) halfway; the chain starts the contract anew.
The story kills it at any moment (SEED says which), and checks the state. Then it times the same
over tcp, and over gRPC, whose servers don't call: there the contract has to be one, too.
"""
