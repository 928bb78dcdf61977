"""The one exception for faults that the user can mend."""


class UserError(ValueError):
    """Something in the user's files, options or machine is wrong.

    The message is one or two lines: what is wrong, where, and what would be right. The command line prints it after
    ``error:`` and exits with 2; a library caller catches it as a ValueError.
    """


# PyTorch's allocator, oneDNN, C++ and the loader have no class of their own for it on a CPU.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "could not create a primitive",
    "failed to map segment",
    "bad_alloc",
    "can't start new thread",
)


def lacks_memory(error: BaseException) -> bool:
    """True where ``error`` says that the machine or the device has no memory left."""
    # torch.OutOfMemoryError by its name: help must not wait for torch
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    kinds = (RuntimeError, OSError, ImportError, SystemError)
    return isinstance(error, kinds) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, 200 characters of it; its class where it says nothing."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
