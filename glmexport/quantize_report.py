"""What quantizing did, matrix by matrix and part by part: from manifests alone, as plain JSON values, and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glmexport import names
from glmexport.bundle import Bundle
from glmexport.plotting import save_png, two_parts

PARTS = ("embedding", "blocks", "LM head", "other")


def quantize_report(before: Bundle | None, after: Bundle) -> dict[str, Any]:
    """The report. before: the bundle it was made from, None where it came straight from a checkpoint."""
    quantization = after.form.quantization
    matrices = [
        {"graph": entry["name"], "block_id": entry.get("block_id"), "name": name, **record}
        for entry in after.graphs
        for name, record in entry["matrices"].items()
    ]
    return {
        "bundle": str(after.directory),
        "format": quantization.format if quantization else None,
        "matrices": matrices,
        "bytes": after.total_bytes,
        "bytes_before": before.total_bytes if before else None,
        "parts": part_sizes(after),
        "parts_before": part_sizes(before) if before else None,
    }


def part_sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes of the embedding, all blocks, the LM head, and everything else but the manifest."""
    sizes = dict.fromkeys(PARTS, 0)
    table = bundle.form.embedding_file
    for name, count in bundle.distinct_sizes.items():
        graph = name.removeprefix(f"{names.ORT}/").removesuffix(".data").removesuffix(".onnx")
        if name == table or graph == names.EMBEDDING:
            part = "embedding"
        elif names.block_id_of(graph) is not None:
            part = "blocks"
        else:
            part = "LM head" if graph == names.HEAD else "other"
        sizes[part] += count
    return sizes


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Draw the errors by block and matrix, and the sizes by part, into a PNG file. Raises GlmExportError."""
    figure, errors, sizes = two_parts()
    _plot_errors(errors, report["matrices"])
    _plot_sizes(sizes, report)
    save_png(figure, path)


def _plot_errors(axes: Any, matrices: list[dict[str, Any]]) -> None:
    kinds: dict[str, list[tuple[int, float]]] = {}
    for matrix in matrices:
        if matrix["relative_error"] is None:
            continue
        if matrix["block_id"] is None:
            label = f"{matrix['name'].removesuffix('.weight')} (int{matrix['bits']})"
            axes.axhline(matrix["relative_error"], color="0.5", linestyle="--", linewidth=1, label=label)
        else:
            kind = matrix["name"].removesuffix(".weight").partition(f".{matrix['block_id']}.")[2]
            kinds.setdefault(kind, []).append((matrix["block_id"], matrix["relative_error"]))
    for kind, points in kinds.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1, label=kind)
    axes.set(title="Weight error of each matrix", xlabel="block", ylabel="relative error  ‖w − ŵ‖ / ‖w‖")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _plot_sizes(axes: Any, report: dict[str, Any]) -> None:
    bars = [("after", report["parts"], report["bytes"])]
    if report["parts_before"]:
        bars.insert(0, ("before", report["parts_before"], report["bytes_before"]))
    unit, word = (1e9, "GB") if bars[0][2] >= 1e9 else (1e6, "MB")
    bottom = [0.0] * len(bars)
    for part in PARTS:
        heights = [parts[part] / unit for _, parts, _ in bars]
        axes.bar([label for label, _, _ in bars], heights, 0.55, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for position, (_, _, total) in enumerate(bars):
        axes.annotate(f"{total / unit:.2f} {word}", (position, bottom[position]), ha="center", va="bottom")
    axes.set(title="Size by part", ylabel=word)
    axes.set_ylim(top=max(bottom) * 1.12)
    axes.legend(fontsize=8)
