"""Every error that dgkit raises on purpose: one sentence with the argument, its value and what is allowed."""


class DgkitError(ValueError):
    """Base of all errors that bad input causes."""


class DataError(DgkitError):
    """A data set or a file of one is missing, incomplete or altered."""


class LoadError(DgkitError):
    """A model cannot be loaded: unknown name, incomplete folder, broken weights."""


class ModelError(DgkitError):
    """The pipeline or transformer is of a class, or in a state, that dgkit cannot work with."""


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, or what it is if it says nothing."""
    return (repr(error) if isinstance(error, LookupError) else str(error).strip() or repr(error)).splitlines()[0]
