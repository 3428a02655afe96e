"""What ends a run with one line and no traceback: input that a user can mend, numbers that went bad."""


class InputError(ValueError):
    """Bad data, config, mesh or file: says what was got, what was wanted and what to change.

    The command line prints it as one line and exits 65; every exception but this and `NumbersError` is a defect of ours
    and keeps its traceback.
    """


class NumbersError(ArithmeticError):
    """Training's numbers went bad: too many updates skipped in a row, replicas that differ. One line, exit 70."""
