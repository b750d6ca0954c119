"""The public error types of the stages, and the exit statuses by which a program says which of them it was."""

TRANSIENT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: trying again may help
MEMORY_STATUS = 71  # EX_OSERR of sysexits.h: here, that the system gave no more memory


class TaskError(Exception):
    """Something that a person can put right: the message says what was found, what was expected, what to do."""


class TransientError(TaskError):
    """The network, or a server on it, is to blame: the same may work a moment later."""
