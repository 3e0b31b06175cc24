"""What ends a run besides its being done."""


class UserError(Exception):
    """Bad input, told in one clear sentence. The command line prints it without a traceback and exits with 2."""


class Stopped(Exception):
    """Somebody asked the run to stop, and it has saved where it is."""
