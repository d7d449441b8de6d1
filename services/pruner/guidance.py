"""What a caller's own tokens are compared with, where the caller brings it: a vector, or similarities.

A question is the text model's to turn into a vector; see `services.pruner.text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from hiprune import tensors
from hiprune.errors import InvalidInput
from hiprune.v1 import encoder_service_pb2, pruner_service_pb2
from services.pruner.pruning import Guidance, similarities


def of_vector(request: pruner_service_pb2.PruneTokensRequest) -> Guidance:
    """The caller's own text vector, (A,) or (1, A)."""
    shape = (None,) if len(request.text_vector.shape) != 2 else (1, None)
    vector = tensors.from_proto(request.text_vector, field="text_vector", shape=shape, finite=True).flatten()
    has_aligned = all(view.HasField("aligned") for view in request.views)
    space: Literal["aligned", "features"] = "aligned" if has_aligned else "features"
    require(request.views, space)
    return Guidance(similarities(request.views, vector, space=space), "the caller's text vector")


def of_similarity(request: pruner_service_pb2.PruneTokensRequest) -> Guidance:
    """The caller's own similarities, one vector (N,) a view."""
    given = request.similarity.views
    if len(given) != len(request.views):
        raise InvalidInput(f"{len(given)} vectors for {len(request.views)} views", field="similarity.views")
    vectors = [
        tensors.from_proto(
            message,
            field=f"similarity.views[{number}]",
            shape=(view.grid_height * view.grid_width,),
            dtypes=(torch.float32,),
            finite=True,
        ).numpy()
        for number, (message, view) in enumerate(zip(given, request.views, strict=True))
    ]
    return Guidance(vectors, "the caller's similarity")


def require(views: Sequence[encoder_service_pb2.View], name: Literal["aligned", "features"]) -> None:
    """Raises InvalidInput for the first view without the tensor `name`."""
    for number, view in enumerate(views):
        if not view.HasField(name):
            raise InvalidInput(
                "is missing, and text guidance compares with it",
                field=f"views[{number}].{name}",
                reason="MISSING_FIELD",
            )
