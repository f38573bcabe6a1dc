"""``python -m shmrpc.cli`` is the ``shmrpc`` command."""

from . import main

main()
