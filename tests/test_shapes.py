import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft.shapes import REAL, check_dtypes, check_same_shape, check_shapes
from jaxrft.types import InputError


def test_letters_have_one_size_in_all_arguments():
    sizes = check_shapes(
        prompts=(np.zeros((2, 5)), "BP"), lengths=(jnp.zeros(2), "B"), weights=(None, "BG")
    )
    assert sizes == {"B": 2, "P": 5}
    with pytest.raises(
        InputError,
        match=r"^lengths has shape \(3,\): it must be \[B\], here "
        r"\[2\]$",
    ):
        check_shapes(prompts=(np.zeros((2, 5)), "BP"), lengths=(np.zeros(3), "B"))
    with pytest.raises(InputError, match=r"^rewards has shape \(3,\): it must be \[B, G\]$"):
        check_shapes(rewards=(np.zeros(3), "BG"))
    with pytest.raises(
        InputError,
        match=r"^mask has shape \(2, 5\): it must be \[P, T\], here "
        r"\[5, T\]$",
    ):
        check_shapes(prompts=(np.zeros((2, 5)), "BP"), mask=(np.zeros((2, 5)), "PT"))


def test_digits_are_sizes():
    assert check_shapes(moments=(jnp.zeros(3), "3"), x=(jnp.zeros((2, 1)), "R1"))["R"] == 2
    with pytest.raises(InputError, match=r"^x has shape \(2, 4\): it must be \[R, 1\]$"):
        check_shapes(x=(jnp.zeros((2, 4)), "R1"))


def test_same_shape_is_that_of_the_first_array():
    check_same_shape(x=None, y=jnp.zeros((2, 3)), z=np.ones((2, 3)))
    with pytest.raises(
        InputError,
        match=r"^mask has shape \(3,\): it must be \(2, 3\), as "
        r"that of x$",
    ):
        check_same_shape(x=jnp.zeros((2, 3)), weights=None, mask=jnp.zeros(3))
    with pytest.raises(InputError, match=r"^mask is \[1\]: it must be an array$"):
        check_same_shape(x=jnp.zeros(1), mask=[1])


def test_argument_that_is_no_array_is_an_error():
    with pytest.raises(
        InputError,
        match=r"^rewards is \[1.0, 0.0\]: it must be an array \[B, "
        r"G\]$",
    ):
        check_shapes(rewards=([1.0, 0.0], "BG"))


def test_tracers_are_checked_when_the_program_is_traced():
    @jax.jit
    def double(x):
        check_shapes(x=(x, "RT"))
        check_dtypes(float, x=x)
        return 2 * x

    assert double(jnp.ones((1, 1))).shape == (1, 1)
    with pytest.raises(InputError, match="x has shape"):
        double(jnp.ones(1))
    with pytest.raises(InputError, match="x is int32: its dtype must be float"):
        double(jnp.ones((1, 1), jnp.int32))


@pytest.mark.parametrize(
    "kinds, fits",
    [
        (int, {"int8", "int32", "uint8"}),
        (float, {"bfloat16", "float32"}),
        (bool, {"bool"}),
        (jnp.int32, {"int32"}),
        (REAL, {"int8", "int32", "uint8", "bfloat16", "float32", "bool"}),
    ],
)
def test_kinds_of_dtypes(kinds, fits):
    for dtype in ("int8", "int32", "uint8", "bfloat16", "float32", "bool", "complex64"):
        array = jnp.zeros(2, dtype)
        if dtype in fits:
            check_dtypes(kinds, x=array, y=None)
        else:
            with pytest.raises(InputError, match=f"^x is {dtype}: its dtype must be "):
                check_dtypes(kinds, x=array)


def test_dtype_of_an_argument_is_checked_after_the_shapes_of_all():
    tokens = jnp.zeros((2, 5), jnp.int32)
    assert check_shapes(tokens=(tokens, "BP", int), mask=(None, "BP", float)) == {"B": 2, "P": 5}
    with pytest.raises(InputError, match="^tokens is int32: its dtype must be float$"):
        check_shapes(tokens=(tokens, "BP", float), lengths=(jnp.zeros(2), "B"))
    with pytest.raises(InputError, match=r"^lengths has shape \(3,\)"):
        check_shapes(tokens=(tokens, "BP", float), lengths=(jnp.zeros(3), "B"))
