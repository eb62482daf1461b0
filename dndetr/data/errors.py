"""The errors of everything that is wrong with a data set, and not with the program."""


class DataError(ValueError):
    """A data set that cannot be used; the message names the file, the entry and what to do."""


class UnreadableImage(DataError):
    """An image file that is there but cannot be decoded."""
