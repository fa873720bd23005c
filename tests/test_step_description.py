"""A description asks for every parameter of a model, once, and for nothing else."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from jamba_lm.kernels.native_layers import Floats
from jamba_lm.kernels.native_structs import F32_KIND, Matrix, MatrixStruct
from jamba_lm.model.layout import plan_layers
from jamba_lm.model.parameters import parameter_shapes
from jamba_lm.step_description import LayerShape, describe_model
from tests.arms import ARMS


class Asked:
    """Weights of zeros that write down what was asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.names: Counter[str] = Counter()

    def matrix(self, name: str) -> Matrix:
        self.names[f"{name}.weight"] += 1
        bias = f"{name}.bias"
        if bias in self.shapes:
            self.names[bias] += 1
        outputs, inputs = self.shapes[f"{name}.weight"]
        return Matrix(MatrixStruct(F32_KIND, outputs, inputs), ())

    def vector(self, name: str) -> Floats | None:
        if name not in self.shapes:
            return None
        self.names[name] += 1
        return np.zeros(self.shapes[name], dtype=np.float32)


@pytest.mark.parametrize("arm", [arm for arm, one in ARMS.items() if one.position == "none"])
def test_every_parameter_is_asked_for_once(arm: str):
    config = ARMS[arm]
    weights = Asked(parameter_shapes(config))
    layers = [
        LayerShape(
            attends=layer.mixer == "attention",
            experts=config.num_experts if layer.feed_forward == "moe" else 0,
        )
        for layer in plan_layers(config)
    ]
    describe_model(config, layers, weights, tied=config.tie_embeddings, bfloat16=False)
    assert weights.names == Counter(weights.shapes.keys())
