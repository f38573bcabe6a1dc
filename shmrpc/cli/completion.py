"""``shmrpc completion``: the script that makes a shell complete our arguments."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from . import bash as _  # noqa: F401 - click finds it by its name, also when a shell asks

__all__ = ["completion"]

_SHELLS = ("bash", "zsh", "fish")


@click.command(name="completion")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(context: click.Context, *, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options, services and methods.

    \b
    bash, in ~/.bashrc:          eval "$(shmrpc completion bash)"
    zsh, in ~/.zshrc:            eval "$(shmrpc completion zsh)"
    fish, in ~/.config/fish/config.fish:
                                 shmrpc completion fish | source

    Methods are those of the server that runs: shmrpc call calc <Tab>.
    """  # noqa: D301 - click wants the character \b itself
    found = get_completion_class(shell)
    assert found is not None  # noqa: S101 - click has these three
    command = context.find_root().command
    click.echo(found(command, {}, "shmrpc", "_SHMRPC_COMPLETE").source())
