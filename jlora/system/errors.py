"""The one exception that reaches a user as a single line."""

from __future__ import annotations

import re


class UserError(Exception):
    """Something the user can mend: a bad file, a bad setting, a missing program.

    The message is one line that names what is wrong, where, and the way out. The command line
    prints it as ``jlora: error: MESSAGE`` and exits with code 2; library users can catch it.
    """

    def __init__(self, message: str = ""):
        # Names out of a damaged or hostile file may hold anything; it is one line all the same, and
        # moves no cursor.
        super().__init__(re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(message)))
