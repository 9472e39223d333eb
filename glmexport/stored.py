"""Where the tensors of a bundle's graphs lie, believed only after it is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import onnx

from glmexport.bundle import Bundle
from glmexport.errors import BundleError
from glmexport.onnx_files import ExternalTensor, external_tensors, hidden_data, load_graph, stored_bytes


def stored_tensors(bundle: Bundle, model: onnx.ModelProto, entry: Mapping[str, Any]) -> dict[str, ExternalTensor]:
    """Name -> place of every external tensor of a loaded graph, all of them inside the graph's own data file.

    entry: the manifest's, of that graph in that flavor. Locations are relative to the bundle. Raises BundleError for a
    place that is elsewhere or of another size, and where the data file is not what the manifest says.
    """
    hidden = hidden_data(model)
    if hidden is not None:
        raise BundleError(f"{entry['file']} has {hidden}, expected data in initializers alone; split the bundle again.")
    places = {}
    data = entry["data"]
    bundle.whole_path(data)
    for place in external_tensors(model, entry["file"]):
        end, expected = place.offset + place.length, stored_bytes(place.dtype, place.shape)
        inside = place.location == PurePosixPath(data).name  # beside the graph
        if not inside or place.length != expected or end > bundle.files[data].bytes:
            raise BundleError(
                f"{entry['file']}: {place.name} lies at bytes {place.offset} to {end} of {place.location!r:.60}, "
                f"expected {expected} bytes inside {data}; split the bundle again."
            )
        places[place.name] = dataclasses.replace(place, location=data)
    return places


def stored_tensors_of(bundle: Bundle, graph: str) -> dict[str, ExternalTensor]:
    """The same of the graph of that name. Raises BundleError."""
    entry = bundle.graph(graph)
    return stored_tensors(bundle, load_graph(bundle.whole_path(entry["file"])), entry)
