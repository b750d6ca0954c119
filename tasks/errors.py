"""The public error types of the stages, and the exit statuses of the programs."""

TRANSIENT_STATUS = 75  # EX_TEMPFAIL in sysexits.h: a retry may help
MEMORY_STATUS = 71  # EX_OSERR in sysexits.h; here: out of memory


class TaskError(Exception):
    """An error that the user can fix: the message says what was found, what was expected and what to do."""


class TransientError(TaskError):
    """A failure of the network or of a remote server: a retry may help."""


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line; its type if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
