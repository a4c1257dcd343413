"""Training: setup, step, resample, loop, evaluate, state, resume."""

from jaxrft.train.loop import StopTraining as StopTraining
from jaxrft.train.loop import train as train
