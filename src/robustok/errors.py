"""The error for problems that the user can fix."""


class UserError(Exception):
    """Something the user can fix. The command line prints it as one line and exits with code 2.

    The message gives what was found, what is accepted and what to do.
    """
