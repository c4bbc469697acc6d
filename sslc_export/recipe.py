"""What to build and how: one model of it, filled from flags, from a YAML recipe, or from both.

Every field is a flag of the same name (`budget_in` is `--budget-in`), so a recipe says all that the flags say.
The resolved recipe is written beside every engine; passing it back with `--recipe` repeats the build.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from compress.options import METHODS, CompressOptions
from sslc_common.errors import InputError
from sslc_common.files import atomic_path

_DEFAULT = CompressOptions()

R = TypeVar("R", bound=BaseModel)


class _Recipe(BaseModel):
    # defer_build: --help reads the fields and validates nothing; building the validators takes a fifth of its time.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


def _split(given: object) -> object:
    """A list whose texts may be lists themselves, as in --target sm_86,sm_89."""
    if not isinstance(given, list):
        return given
    return [part.strip() for item in given for part in (item.split(",") if isinstance(item, str) else [str(item)])]


class CompressRecipe(_Recipe):
    """How a dense model becomes sparse + low-rank."""

    method: str = Field(
        _DEFAULT.method,
        description=f"solver of each layer's S + U·V: {', '.join(METHODS)}; sslc is a reconstruction of the paper's, "
        "see docs/methods.md",
    )
    budget: float = Field(
        _DEFAULT.budget,
        gt=0,
        le=1,
        description="size of the compressed layers over their dense size, 0 < budget ≤ 1; what it counts, "
        "--budget-in says",
    )
    budget_in: Literal["bytes", "params"] = Field(
        "bytes",
        description="bytes: values, bitmap, U and V as stored; params: the papers' count, non-zeros + r(N + K)",
    )
    allocation: Literal["fisher", "uniform", "owl", "farms", "welore", "knapsack", "cap", "cap_reinforce"] = Field(
        "fisher",
        description="fisher: layers share the budget by how much the model's output depends on them; uniform: the "
        "same for each; the others are published ways, see docs/methods.md",
    )
    values_dtype: Literal["f32", "bf16", "int8", "int4"] = Field(
        "f32",
        description="type of the stored values, U and V; with int8 and int4 values, which have a scale per row and 64 "
        "columns, U and V are bf16",
    )
    values_of: list[str] = Field(
        default_factory=list,
        description="type of the values of some layers, by a glob on their names, as in '*.mlp.down_proj=bf16'; may be "
        "repeated, the first that matches holds; layers of a type share their budget among them",
    )
    head: Literal["keep", "int8"] = Field(
        "keep",
        description="the output head and the embedding tied to it, often the largest matrix: as it is, or rounded to "
        "int8; not counted by the budget, and for ONNX Runtime only",
    )
    rank_share: float | None = Field(
        _DEFAULT.rank_share,
        ge=0,
        le=1,
        description="share of a layer's budget that goes to U and V (default: 0.15 with the method joint, but none of "
        "bytes with int8 and int4 values; with other methods what pays in each layer by its singular values, often "
        "nothing)",
    )
    mask_rule: str = Field(
        _DEFAULT.mask_rule,
        description="free, or CAP:GROUP, for example 32:64: at most CAP values in each aligned GROUP columns of a row, "
        "for the fastest GPU layouts (docs/kernel-gpu.md)",
    )
    calibration: list[str] = Field(
        default_factory=list,
        description="text to calibrate on: a file, a folder of .txt, or a Hugging Face dataset name; may be "
        "repeated, sources are mixed evenly (default: public-domain speeches that come with the package)",
    )
    calibration_tokens: int = Field(_DEFAULT.calibration_tokens, gt=0, description="tokens of calibration text")
    sequence_length: int = Field(_DEFAULT.sequence_length, gt=0, description="tokens of one calibration sequence")
    refinement: int = Field(
        _DEFAULT.refinement,
        ge=0,
        description="how many times each block is fitted as a whole to the dense model's hidden states on the "
        "calibration text",
    )
    tuning_minutes: float = Field(
        _DEFAULT.tuning_minutes,
        ge=0,
        description="minutes of tuning the compressed model towards the dense one's predictions; needs both in memory",
    )
    tuning_of: Literal["all", "factors"] = Field(
        "all", description="what is tuned: values, U, V, biases and norms; or U and V alone, as in the paper"
    )
    exclude: list[str] = Field(
        default_factory=list, description="layers to leave dense, by a glob on their names; may be repeated"
    )
    seed: int = Field(0, description="seed of the choice and order of calibration text, and of importance")
    overwrite: bool = Field(False, description="replace outputs that exist")


class ValidateRecipe(_Recipe):
    """How the engine is compared with the dense one, and which limits it must keep."""

    held_out: list[str] = Field(
        default_factory=list,
        description="text to measure perplexity on, as for --calibration; never the text that was calibrated on "
        "(default: other speeches that come with the package)",
    )
    held_out_tokens: int = Field(16384, gt=0, description="tokens of held-out text")
    threads: int | None = Field(None, gt=0, description="threads of the engines (default: all cores)")
    prefill_tokens: int | None = Field(
        None, gt=0, description="prompt length of the prefill measurement (default: 512, or what the model takes)"
    )
    latency_seconds: float = Field(
        40.0,
        gt=0,
        description="time for the samples of prefill and decode; noise may double it, the batch sizes add a fifth",
    )
    batches: list[int] = Field(
        default_factory=lambda: [2, 4, 8],
        description="batch sizes to measure decoding with beside 1, briefly and without a limit; 2,4,8 if not given",
    )
    harness_tasks: list[str] = Field(
        default_factory=list,
        description="tasks of lm-evaluation-harness to score both engines with, by name or as YAML files; needs "
        'pip install "sslc-export[harness]"',
    )
    harness_samples: int | None = Field(None, gt=0, description="samples of each harness task (default: all)")
    limits: str | None = Field(None, description="YAML file of limits; flags win over it, see docs/verdict.md")
    max_perplexity_ratio: float | None = Field(None, gt=0, description="held-out perplexity over the dense model's")
    min_harness_recovery: float | None = Field(
        None, gt=0, description="harness score over the dense engine's, for the worst task and metric"
    )
    min_decode_speedup: float | None = Field(None, gt=0, description="decode speed over the dense engine's")
    min_prefill_speedup: float | None = Field(None, gt=0, description="prefill speed over the dense engine's")
    max_size_ratio: float | None = Field(None, gt=0, description="engine bytes over the dense engine's")
    baseline: str | None = Field(
        None, description="verdict.json of an accepted build; the report says what changed since"
    )
    report: str | None = Field(None, description="folder of the report (default: report/ beside the engine)")

    @field_validator("batches", "harness_tasks", mode="before")
    @classmethod
    def _split_lists(cls, given: object) -> object:
        return _split(given)


class PlanRecipe(_Recipe):
    """How engine.plan is built for TensorRT; engine.onnx takes none of these."""

    target: list[str] = Field(
        default_factory=list,
        description="GPU architectures to build for, for example sm_86,sm_89; may be repeated (default: those that "
        "TensorRT-RTX chooses, or with TensorRT the GPU of this machine)",
    )
    activations: Literal["f16", "bf16"] = Field("f16", description="type of activations and of dense weights")
    max_batch: int = Field(1, gt=0, description="most sequences at a time")
    max_prompt: int = Field(512, gt=0, description="most new tokens of a sequence in one call")
    max_context: int | None = Field(
        None, gt=0, description="most tokens of a sequence, past and new (default: 2048, or what the model takes)"
    )
    triton: str | None = Field(None, description="folder to write a Triton Inference Server repository to")

    @field_validator("target", mode="before")
    @classmethod
    def _split_targets(cls, given: object) -> object:
        return _split(given)


class ExportRecipe(CompressRecipe, ValidateRecipe, PlanRecipe):
    """Everything that `sslc-export` needs."""

    model: str = Field(description="a Hugging Face folder, a hub id, a .gguf file, or a folder that sslc-compress made")
    out: str = Field(
        description="the engine to write; its suffix chooses the runtime: .onnx for ONNX Runtime on CPUs, "
        ".plan for TensorRT"
    )
    reference: str | None = Field(
        None, description="the dense model to compare with, where --model is compressed already"
    )
    predict_only: bool = Field(
        False, description="for .onnx: print the bytes and the speed that this build would bring here, and stop"
    )
    int8_activations: bool = Field(
        False,
        description="for .onnx with int8 or int4 values: allow the kernel to round activations to 8 bits, 64 columns "
        "at a time, from two tokens on, where the processor has AVX-512 VNNI; an error of 0.6 % in a layer",
    )
    compress_slower: bool = Field(
        False,
        description="for .onnx: compress layers, too, that are predicted to decode slower than dense ones; they are "
        "still smaller",
    )
    skip_validation: bool = Field(False, description="only build; nothing is proven about the engine")


class CompressCommand(CompressRecipe):
    """Everything that `sslc-compress` needs."""

    model: str = Field(description="a Hugging Face folder, a hub id, or a .gguf file")
    out: str = Field(description="the compressed Hugging Face folder to write")


class ValidateCommand(ValidateRecipe):
    """Everything that `sslc-validate` needs."""

    engine: str = Field(description="the engine.onnx or engine.plan that sslc-export wrote")
    reference: str | None = Field(
        None,
        description="the dense model: a Hugging Face folder, a hub id or a .gguf file; without it the engine is "
        "only compared with its own PyTorch model",
    )
    explain: str | None = Field(
        None,
        description="name of a compressed layer: instead of validating, write it as a small ONNX model with inputs and "
        "a script to report/explain/",
    )


def load_recipe(kind: type[R], file: str | None, flags: dict[str, object]) -> R:
    """Fills a recipe from a YAML file, then from the flags that were given, which win.

    Raises:
        InputError: the file is missing or not YAML, a field is unknown, missing, or has a wrong value.
    """
    import yaml  # here, as --help needs none of it

    values: dict[str, object] = {}
    if file is not None:
        path = Path(file)
        if not path.is_file():
            raise InputError(f"There is no recipe {file}", do="Check the path given to --recipe")
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"Recipe {file} is not valid YAML", got=error) from error
        if not isinstance(values, dict):
            raise InputError(f"Recipe {file} holds no fields", got=type(values).__name__, allowed="field: value")
    try:
        return kind(**{**values, **flags})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        flag = "--" + name.replace("_", "-")
        if first["type"] == "extra_forbidden":
            fields = ", ".join(kind.model_fields)
            raise InputError(f"Recipe {file} has an unknown field {name}", allowed=fields) from error
        meaning = kind.model_fields[name].description
        if first["type"] == "missing":
            raise InputError(f"{flag} is missing", do=f"Pass {flag}: {meaning}") from error
        rule = first["msg"].removeprefix("Input should be ")
        raise InputError(
            f"{flag} has a value that is not allowed", got=first["input"], allowed=rule, do=f"{flag} is the {meaning}"
        ) from error


def save_recipe(recipe: BaseModel, path: Path) -> None:
    """Writes the resolved recipe; `load_recipe` reads it back to an equal one."""
    import yaml

    with atomic_path(path) as temporary:
        temporary.write_text(
            "# The resolved recipe of this build; repeat it with --recipe.\n"
            + yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
        )
