"""Selectors at work without a language model: synthetic students, and response matrices replayed as
a policy.
"""

from .trials import run as run
from .worlds import Responses as Responses
from .worlds import StudentConfig as StudentConfig
from .worlds import World as World
from .worlds import load as load
from .worlds import replay as replay
from .worlds import students as students
