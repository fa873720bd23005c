"""The list of parameters is the decoder's own."""

from __future__ import annotations

import torch
from hypothesis import given, settings

from jamba_lm.model.decoder import Decoder
from jamba_lm.model.parameters import parameter_shapes
from tests.config_strategies import configs


@settings(max_examples=60)
@given(configs(largest=24))
def test_names_shapes_and_order_are_those_of_the_decoder(config):
    with torch.device("meta"):
        decoder = Decoder(config)
    found = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    assert parameter_shapes(config) == found
