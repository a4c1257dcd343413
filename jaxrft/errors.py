"""Defines the errors that are shown to users as one sentence. Imports nothing."""


class InputError(ValueError):
    """Reports a mistake of the user's: one sentence that names the thing, its value and the remedy."""


class Missing(InputError):
    """Reports something that has to be brought here first, such as a file or a download; the sentence says how."""
