"""What exported files are made of."""

from __future__ import annotations

from pathlib import Path

import onnx


def convolved_dimensions(path: Path) -> set[int]:
    """Of the convolutions of a file: a weight has two more, its channels."""
    graph = onnx.load(path).graph
    weights = {value.name: len(value.dims) for value in graph.initializer}
    return {weights[node.input[1]] - 2 for node in graph.node if node.op_type == "Conv"}
