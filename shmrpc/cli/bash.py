"""Completion in bash of words with a colon, as addresses have: click's own takes them apart.

bash hands over the line also as words that end at each colon, and puts what we answer behind the
last one. So the line itself is read here, and of an answer goes back what follows that colon.
"""

from __future__ import annotations

import os
from typing import ClassVar

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    split_arg_string,
)

__all__ = ["AddressBash"]

_SOURCE = """\
%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=',' read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" \\
        COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1")
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class AddressBash(BashComplete):
    """Takes the place of click's."""

    source_template: ClassVar[str] = _SOURCE

    def get_completion_args(self) -> tuple[list[str], str]:
        """The whole words before the one to be completed, and what there is of that."""
        line = os.environ.get("COMP_LINE", "")
        if not line:
            return super().get_completion_args()
        words = split_arg_string(line)[1:]
        incomplete = "" if line[-1].isspace() or not words else words.pop()
        return words, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """What bash is to put in the place of what it takes for the word."""
        value = item.value
        line = os.environ.get("COMP_LINE", "")
        if item.type == "plain" and line and ":" in os.environ.get("COMP_WORDBREAKS", ""):
            _, incomplete = self.get_completion_args()
            value = value[incomplete.rfind(":") + 1 :]
        return f"{item.type},{value}"


add_completion_class(AddressBash, "bash")
