"""What a user did wrong, said in one line."""


class InputError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do.

    Entry points print it to stderr and exit with status 2; nothing else catches it.
    """


class UnreachableError(InputError):
    """An object store does not answer: as bad input, but with status 1, for a restart may do."""
