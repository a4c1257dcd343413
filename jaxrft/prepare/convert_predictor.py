"""Converts a predictor from a published torch checkpoint: python -m
jaxrft.prepare.convert_predictor CHECKPOINT FILE [flags].
"""

import argparse
import pickle
from pathlib import Path

import numpy as np

from jaxrft.fields import path_argument
from jaxrft.host.installation import install_command
from jaxrft.select.dots import attention
from jaxrft.select.dots.attention import Calibration, Params
from jaxrft.select.dots.predictor import Origin, Predictor, save_predictor
from jaxrft.types import InputError


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a torch checkpoint as float32 arrays by name.

    The checkpoint is a state_dict or holds one as `model_state_dict`. Only tensors and plain values
    are unpickled. Raises InputError for a file that is missing or no such checkpoint, and without
    torch.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise InputError(f"torch is needed to read {path}: {install_command('parity')}") from error
    if not path.is_file():
        raise InputError(f"no file {path}: give a published checkpoint of the predictor")
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is no torch checkpoint that holds tensors and plain values only: save it so"
        ) from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise InputError(
            f"{path} holds no state_dict: give a published checkpoint of the predictor"
        )
    return {
        str(name): x.float().numpy() for name, x in state.items() if isinstance(x, torch.Tensor)
    }


def calibration_of(params: Params) -> Calibration:
    """Infers the calibration of a predictor from which calibration parameters it has."""
    if params.group is not None:
        return "group_logit_temp"
    if params.scale is not None:
        return "temperature" if params.shift is None else "platt"
    return "plain"


def convert(
    checkpoint: Path, out: Path, model: str, *, temperature: float = 1.0, top_k: int | None = None
) -> None:
    """Writes the predictor of a torch `checkpoint` to `out`; `model` computed the embeddings
    that it was trained on.
    """
    params = attention.params_from_torch(read(checkpoint))
    origin = Origin(model, params.query.norm_in.bias.size)
    save_predictor(out, Predictor(params, calibration_of(params), temperature, top_k, origin))


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and converts the checkpoint that it names."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxrft.prepare.convert_predictor", description=__doc__
    )
    parser.add_argument("checkpoint", type=path_argument, help="the published checkpoint")
    parser.add_argument("out", type=path_argument, help="safetensors file to write")
    parser.add_argument(
        "--model",
        required=True,
        help="model that computed the embeddings that it was trained on, such as a hub id",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="divides the attention's scores"
    )
    parser.add_argument(
        "--top-k", type=int, help="attend to the TOP_K most similar references only"
    )
    options = parser.parse_args(arguments)
    try:
        convert(
            options.checkpoint,
            options.out,
            options.model,
            temperature=options.temperature,
            top_k=options.top_k,
        )
    except InputError as error:
        parser.error(str(error))
    print(f"the predictor is in {options.out}")


if __name__ == "__main__":
    main()
