"""Defines the errors that are shown to users as one sentence, and how they show a value. Imports
nothing.
"""


class InputError(ValueError):
    """Reports a mistake of the user's: one sentence that names the thing, its value and the
    remedy.
    """


class Missing(InputError):
    """Reports something that has to be brought here first, such as a file or a download; the
    sentence says how.
    """


def shown(value: object) -> str:
    """Returns a value as a message shows it: on one line, cut to 80 characters."""
    try:
        text = repr(value)
    # whatever a __repr__ raises; of an int, Python refuses more than 4,300 digits
    except Exception:
        text = f"a value of type {type(value).__name__}"
    text = " ".join(line.strip() for line in text.splitlines())
    return text if len(text) <= 80 else f"{text[:77]}..."
