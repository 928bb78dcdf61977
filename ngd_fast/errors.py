"""The one exception for faults that the user can mend."""


class UserError(ValueError):
    """Something in the user's files, options or machine is wrong.

    The message is one or two lines: what is wrong, where, and what would be right. The command line prints it after
    ``error:`` and exits with 2; a library caller catches it as a ValueError.
    """
