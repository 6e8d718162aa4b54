"""What `flux-poke train` is asked for: a YAML file, checked key by key.

    config = read_config(Path("config.yaml"))        # or the name of a recipe in `training/configs`: read_config("tiny")
    config.flux.layout(config.latents)

docs/training.md shows every key; what is left out has the value that made the tiny FLUX that ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from ..errors import UserError
from ..flux.layout import ROTARY, Layout
from ..parsing import from_yaml, read_text

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
except ImportError as error:
    raise UserError("Training needs pydantic: pip install 'flux-poke[train]'.") from error

CONFIGS = Path(__file__).parent / "configs"

Count = Annotated[int, Field(gt=0, lt=10**9)]
Share = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, lt=10**9)]
Config_ = TypeVar("Config_", bound="Config")


class Section(BaseModel):
    """Keys that are not known are refused; 3 is no text, "3" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Data(Section):
    """What is drawn, and what it is called."""

    kind: Literal["digits", "arrays", "folder"] = "digits"
    path: str | None = None
    labels: str | None = None
    names: list[str] | None = None
    templates: list[str] | None = None
    side: Annotated[int, Field(ge=8, le=4096)] = 64
    channels: Literal[1, 3] = 3
    per_picture: Annotated[int, Field(ge=1, le=16)] = 1

    @model_validator(mode="after")
    def _fits(self) -> Data:
        if self.kind != "digits" and not self.path:
            raise ValueError(f"path must be given for data of the kind {self.kind}")
        if self.kind == "folder" and (self.labels or self.names or self.per_picture > 1):
            raise ValueError("labels, names and per_picture are for digits and arrays; a folder has captions")
        if any(template.count("{}") != 1 for template in self.templates or ()):
            raise ValueError("each of templates must hold {} once, where the name goes")
        return self


class AutoencoderTraining(Section):
    """An autoencoder of TAESD's shape, trained before the transformer."""

    steps: Count = 1000
    batch: Count = 8
    learning_rate: Rate = 8e-4
    latent_noise: Annotated[float, Field(ge=0, lt=10)] = 0.05
    moment_weight: Annotated[float, Field(ge=0, lt=10)] = 0.02
    from_tiny: bool = False


class Pixels(Section):
    """No autoencoder: `patch` x `patch` pixels make a token."""

    patch: Annotated[int, Field(ge=1, le=64)]


class Transformer(Section):
    """The transformer's sizes, and how it is trained."""

    family: Literal["flux1", "flux2"] = "flux1"
    hidden: Count
    heads: Count | None = None
    axes: list[Annotated[int, Field(ge=2, multiple_of=2)]] | None = None
    depth: Annotated[int, Field(ge=1, le=1000)]
    depth_single: Annotated[int, Field(ge=0, le=1000)]
    mlp_ratio: Annotated[int, Field(ge=1, le=64)] = 4
    text_width: Count = 64
    steps: Count
    batch: Count
    learning_rate: Rate
    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    warmup: Annotated[int, Field(ge=0)] = 0
    times: Literal["logit-normal", "uniform", "shifted"] = "logit-normal"
    noise_mean: Annotated[float, Field(ge=-20, le=20)] = 0.0
    shift: Rate = 3.0
    guidance_dropout: Share = 0.0
    ema: Share = 0.0
    reference_every: Annotated[int, Field(ge=0)] = 0
    padded_every: Annotated[int, Field(ge=0)] = 0
    padded_batch: Count = 8

    @model_validator(mode="after")
    def _fits(self) -> Transformer:
        number = len(ROTARY[self.family][0])
        if self.axes is not None and len(self.axes) != number:
            raise ValueError(f"axes must be {number} numbers for {self.family}; found {self.axes}")
        head = sum(self.axes) if self.axes else self.hidden // self.heads if self.heads else sum(ROTARY[self.family][0])
        if self.hidden % head:
            raise ValueError(
                f"hidden must be a multiple of {head}, the width of an attention head by its axes; found {self.hidden}"
            )
        if self.heads is not None and self.heads * head != self.hidden:
            raise ValueError(f"heads must be hidden / {head} = {self.hidden // head} with these axes; found {self.heads}")
        if self.axes is None and head != sum(ROTARY[self.family][0]):
            raise ValueError(
                f"axes must be given where a head is not {sum(ROTARY[self.family][0])} wide: {number} even numbers that "
                f"add up to hidden / heads = {head}"
            )
        if self.family == "flux1" and (self.reference_every or self.padded_every):
            raise ValueError("reference_every and padded_every are for family: flux2, which takes reference pictures")
        if self.warmup and self.schedule == "one-cycle":
            raise ValueError("warmup goes with schedule: constant; one-cycle has its own")
        return self

    def layout(self, latents: tuple[int, int, int]) -> Layout:
        """The transformer on latents of this shape (channels, height, width)."""
        patch = 1 if self.family == "flux2" else 2
        return Layout.of(
            self.family, self.hidden, self.depth, self.depth_single, context=self.text_width, vector=self.text_width,
            ratio=self.mlp_ratio, channels=latents[0] * patch**2, axes=tuple(self.axes) if self.axes else None,
        )  # fmt: skip


class Samples(Section):
    """Pictures that are drawn while it trains."""

    every: Count = 1000
    prompts: Annotated[list[str], Field(min_length=1, max_length=64)] | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance: Annotated[float, Field(ge=0, le=100)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0


class Saving(Section):
    """What is written while it trains."""

    every: Count = 1000
    keep: Annotated[int, Field(ge=0, le=100_000)] = 0
    tensorboard: bool = False


class Computing(Section):
    """Where it computes; None is what `accelerate` finds."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?|mps)$")] | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None


class Config(Section):
    """A whole training. Latents come from an autoencoder that is trained first, or with `pixels` there are none."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data = Data()
    autoencoder: AutoencoderTraining | None = None
    pixels: Pixels | None = None
    flux: Transformer
    samples: Samples | None = None
    saving: Saving = Saving()
    computing: Computing = Computing()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if (self.autoencoder is None) == (self.pixels is None):
            raise ValueError("one of the sections autoencoder and pixels must be given, and not both")
        if self.pixels:
            patch, by = self.pixels.patch, 2 if self.flux.family == "flux1" else 1
            if patch % by or self.data.side % patch:
                raise ValueError(
                    f"patch in section pixels must be {'an even' if by == 2 else 'a'} divisor of side in section data, "
                    f"{self.data.side}; found {patch}"
                )
        elif self.data.side % 16:
            raise ValueError(f"side in section data must be a multiple of 16 for an autoencoder; found {self.data.side}")
        return self

    @classmethod
    def of(cls: type[Config_], values: Any, source: str = "The configuration") -> Config_:
        """The configuration of a mapping of keys; raises `UserError`, naming `source`, where it cannot be used."""
        if not isinstance(values, Mapping):
            raise UserError(f"{source} is expected to hold {', '.join(cls.model_fields)}; found {values!r:.60}.")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{source}: {_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong."""
    found, others = error.errors()[0], error.error_count() - 1
    key = ".".join(map(str, found["loc"]))
    more = f" ({others} more)" if others else ""
    if found["type"] == "missing":
        said = f"{key} is missing: docs/training.md shows every key."
    elif found["type"] == "extra_forbidden":
        said = f"{key} is not known: docs/training.md shows every key."
    elif found["type"] == "value_error":
        said = f"{key + ': ' if key else ''}{found['msg'].removeprefix('Value error, ')}."
    else:
        said = f"{key} is wrong: {found['msg'].replace('Input should be', 'it must be')}; found {found['input']!r:.60}."
    return said[:-1] + more + "."


def read_config(source: Path | str) -> Config:
    """The configuration in a YAML file, or the recipe of that name in `training/configs`.

    Raises `UserError` where it cannot be used.
    """
    path = Path(source)
    recipes = {recipe.stem: recipe for recipe in CONFIGS.glob("*.yaml")}
    if str(source) in recipes:
        path = recipes[str(source)]
    try:
        values = from_yaml(read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: expected a YAML file, or one of {', '.join(sorted(recipes))}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}).") from error
    return Config.of(values, str(path))
