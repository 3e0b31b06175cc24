"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Bad input, told in one clear sentence. The command line prints it without a traceback and exits with 2."""
