"""Compare: numbers and a picture of how far images or latents are from a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..analysis.metrics import check_comparisons, compare, comparison_table, pictures, side_by_side, write_comparisons
from . import host, inputs, stopwatch
from .graph import nearest_above


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def images(name: str, tooltip: str, optional: bool = False) -> io.Input:
            return io.MultiType.Input(name, [io.Image, io.Latent], optional=optional, tooltip=tooltip)

        def model(name: str, what: str) -> io.Input:
            return io.Model.Input(name, optional=True, tooltip=f"What drew {what}: its size is told beside the numbers.")

        file = "Write the table under this name in output/flux_poke, as .csv or .json; empty = do not."
        return inputs.schema(
            cls,
            "Compare (Flux Poke)",
            "Relative MSE, PSNR and SSIM of images or latents against a reference, and where they differ.",
            [
                images("reference", "What to compare with: the dense model's images or latents."),
                images("variant", "What to compare, of the same kind, size and number."),
                *(images(f"variant_{n}", "One more, to compare with the same.", optional=True) for n in (2, 3, 4)),
                inputs.text("names", "", "What to call the variants, separated by commas."),
                inputs.text("file", "", file),
                model("reference_model", "the reference"),
                model("variant_model", "the variant"),
            ],
            [io.String.Output(display_name="text"), io.Image.Output(display_name="image")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        stopwatch.watch_steps()  # of the samplers that run before it
        return ""

    @classmethod
    def execute(cls, reference, names: str, file: str, reference_model=None, variant_model=None, **variants) -> io.NodeOutput:
        path = host.output_path(file) if file.strip() else None
        if path is not None:
            check_comparisons(path)
        goal = host.batch_of(reference)
        given = {name: host.batch_of(variant) for name, variant in sorted(variants.items()) if variant is not None}
        titles = [title.strip() for title in names.split(",")] if names.strip() else []
        titles += [name.replace("_", " ") for name in given][len(titles) :]
        rows = [compare(images, goal, title) for title, images in zip(titles, given.values(), strict=False)]
        if path is not None:
            write_comparisons(path, rows)
        seconds = stopwatch.step_seconds(cls.hidden.prompt)
        models = {"reference": reference_model, "variant": variant_model}
        known = [cls.known_of(name, models, seconds) for name in ("reference", *given)]
        results = []
        for row, of_variant in zip(rows, known[1:], strict=True):
            if any(of_variant):
                results.append(f"{row.name}: " * (len(rows) > 1) + row.result(known[0], of_variant))
        text = "\n".join([*results, *(f"{row.name}: {row.text}" for row in rows)])
        image = host.to_images([side_by_side(rows, list(given.values()), goal)])
        view = {
            "kind": "comparison",
            "reference": "reference",
            "names": [row.name for row in rows],
            "measures": [row.text for row in rows],
            "a_images": host.temporary_pictures(pictures(goal), cls),
            "b_images": [host.temporary_pictures(pictures(images), cls) for images in given.values()],
        }
        return io.NodeOutput(
            comparison_table(rows), image, ui=host.shown(cls, text, image, view) | stopwatch.as_output(seconds)
        )

    @classmethod
    def known_of(cls, name: str, models: Mapping[str, Any], seconds: Mapping[str, float]) -> tuple[float | None, float | None]:
        """Bytes of the model that drew what an input got, and seconds a step of the sampler."""
        model, samplers = models.get(name), nearest_above(cls.hidden.prompt, cls.hidden.unique_id, name, seconds)
        time = seconds[samplers.pop()] if len(samplers) == 1 else None
        return None if model is None else model.model_size(), time
