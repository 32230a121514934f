"""The one exception that reaches a user as a single line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: a bad file, a bad setting, a missing program.

    The message is one line that names what is wrong, where, and the way out. The command line
    prints it as ``jlora: error: MESSAGE`` and exits with code 2; library users can catch it.
    """
