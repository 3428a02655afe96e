"""The one exception for input that a user can mend."""


class InputError(ValueError):
    """Bad data, config, mesh or file: says what was got, what was wanted and what to change.

    The command line prints it as one line and exits 65; every other exception is a defect of ours and keeps its
    traceback.
    """
