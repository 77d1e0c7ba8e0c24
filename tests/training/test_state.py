"""Choice of the parameters that are trained."""

import pytest

from llava_cot_jax.errors import UserError
from llava_cot_jax.model.parameters import parameters
from llava_cot_jax.training.state import frozen_paths


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["("], "no regular expression"),
        (["nothing_like_it"], "matches no parameter"),
        (["."], "every parameter is frozen"),
    ],
)
def test_frozen_patterns_that_cannot_be_meant(small, patterns, message):
    with pytest.raises(UserError, match=message):
        frozen_paths(parameters(small, "stacked"), patterns)
