"""The only module that imports `tensorrt` or `tensorrt_rtx`: it turns a graph into a plan, in a process of its own.

Run as a program (`python -m sslc_export.engines.tensorrt_builder`) in a folder with `job.json` and the graph, it writes
`engine.plan` and `built.json` there, or `error.json`. TensorRT orders parts of a plan by the addresses of its objects,
so the same bytes come out only if memory is laid out the same: hence a fresh process that does nothing else, started
without address randomisation (`sslc_export.engines.tensorrt`). It also keeps an abort inside TensorRT from taking the
tool with it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
from pathlib import Path
from types import ModuleType
from typing import Any

from plugins_trt import library
from sslc_common.errors import InputError, MissingError, UserError
from sslc_common.files import atomic_path

_MODULES = ("tensorrt_rtx", "tensorrt")
_INSTALL = (
    "Install TensorRT-RTX (`pip install tensorrt-rtx-cu13`), or TensorRT (`pip install tensorrt`) where the GPU is"
)


def tensorrt(name: str | None = None) -> ModuleType:
    """The TensorRT that is installed; TensorRT-RTX first, unless `name` (or SSLC_TENSORRT) says which.

    Raises:
        MissingError: none is.
        InputError: `name` is unknown.
    """
    name = name or os.environ.get("SSLC_TENSORRT")
    if name is not None and name not in _MODULES:
        raise InputError("There is no such TensorRT", got=name, allowed=" or ".join(_MODULES))
    reasons = []
    for candidate in (name,) if name else _MODULES:
        try:
            return importlib.import_module(candidate)
        except ImportError as error:
            reasons.append(f"{candidate}: {error}")
    raise MissingError("TensorRT is not installed", got="; ".join(reasons), do=_INSTALL)


def build_plan(job: dict[str, Any], model: Path) -> tuple[memoryview, list[Any]]:
    """The plan of a graph, and its optimization profiles. The job is what `sslc_export.engines.tensorrt.build` wrote.

    Raises:
        MissingError: TensorRT or the plugin is missing, or another plugin has its name.
        InputError: a target is not supported.
        RuntimeError: TensorRT refused the graph.
    """
    trt = tensorrt()
    plugin = library.register(trt, Path(job["plugin"]))
    log = _logger(trt)
    builder = trt.Builder(log)
    builder.max_threads = 1  # threads would race for addresses
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind since TensorRT 11
    network = builder.create_network(0 if strong is None else 1 << int(strong))
    parser = trt.OnnxParser(network, log)
    parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(str(model)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise RuntimeError(f"{trt.__name__} {trt.__version__} does not take the graph: {errors or log.text()}")
    require_plugin_layers(trt, network, job["nodes"], job["type"])

    config = builder.create_builder_config()
    profiles = _profiles(trt, network, job["shapes"])
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        config.add_optimization_profile(profile)
    if job["targets"]:
        chosen = capabilities(trt, job["targets"])
        config.num_compute_capabilities = len(chosen)
        for i, capability in enumerate(chosen):
            config.set_compute_capability(capability, i)
    if job["nodes"]:
        config.plugins_to_serialize = [str(plugin)]
    if trt.__name__ == "tensorrt":  # in TensorRT-RTX, which times nothing, timing caches do nothing
        take_timing_cache(config, Path(job["timing_cache"]))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"{trt.__name__} {trt.__version__} built no engine: {log.text()}")
    if trt.__name__ == "tensorrt":
        keep_timing_cache(config, Path(job["timing_cache"]))
    return memoryview(plan), profiles


def require_plugin_layers(trt: ModuleType, network: Any, nodes: dict[str, list[int]], type: str) -> None:
    """Checks that every node of ours (name → out_features of its layers) became our plugin, with the right outputs.

    TensorRT itself notices neither a plugin of another namespace nor an output of the wrong type.
    """
    creators = [c for c in trt.get_plugin_registry().all_creators if c.name == library.NAME]
    if [(c.plugin_version, c.plugin_namespace) for c in creators] != [(library.VERSION, library.NAMESPACE)]:
        found = ", ".join(f"{c.plugin_namespace or '(none)'}::{c.name} {c.plugin_version}" for c in creators)
        raise MissingError(
            f"TensorRT has other plugins called {library.NAME}, and would not say which it takes",
            got=found,
            allowed=f"only {library.NAMESPACE}::{library.NAME} {library.VERSION}",
            do="Load no other plugin library in this process",
        )
    found_layers = {network.get_layer(i).name: network.get_layer(i) for i in range(network.num_layers)}
    wanted = trt.DataType.HALF if type == "f16" else trt.DataType.BF16
    for name, out_features in nodes.items():
        layer = found_layers.get(name)
        if layer is None or layer.type != trt.LayerType.PLUGIN_V3:
            kind = "nothing" if layer is None else layer.type
            raise RuntimeError(f"layer {name} became {kind}, not the plugin")
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        if [(o.dtype, o.shape[-1]) for o in outputs] != [(wanted, N) for N in out_features]:
            got = ", ".join(f"{o.dtype} {tuple(o.shape)}" for o in outputs)
            raise RuntimeError(f"layer {name} gives {got}; {wanted} and {out_features} columns expected")


def take_timing_cache(config: Any, path: Path) -> None:
    """Gives a builder the times of kernels that earlier builds measured, if they were of this GPU and TensorRT."""
    measured = path.read_bytes() if path.is_file() else b""
    for content in (measured, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def keep_timing_cache(config: Any, path: Path) -> None:
    """Keeps the times for the next build."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))


def _profiles(trt: ModuleType, network: Any, shapes: dict[str, int]) -> list[dict[str, list[list[int]]]]:
    """Least, usual and largest shape of each input: for decoding and prefill together, or (mainline TensorRT) for each.

    TensorRT-RTX keeps the dense weights once per profile: 432 MB instead of 275 for SmolLM2-135M in float16. It
    specialises its kernels at run time, for the shapes that then come, so one profile should lose nothing there.
    """
    context, most = shapes["context"], shapes["prefill"]
    # (past, new) at least, usually and at most; the attention mask covers both.
    both = ((0, 1), (context // 2, 1), (context - 1, most))
    decode = ((0, 1), (context // 2, 1), (context - 1, 1))
    prefill = ((0, 1), (0, most), (context - most, most))
    profiles = []
    for ranges in (both,) if trt.__name__ == "tensorrt_rtx" else (decode, prefill):
        profile = {}
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            sizes = []
            for batch, (past, new) in zip((1, 1, shapes["batch"]), ranges, strict=True):
                size = [batch, *list(tensor.shape)[1:]]
                if tensor.name.startswith("past_key_values."):
                    size[2] = past
                else:
                    size[1] = past + new if tensor.name == "attention_mask" else new
                sizes.append(size)
            profile[tensor.name] = sizes
        profiles.append(profile)
    return profiles


def capabilities(trt: ModuleType, targets: list[str]) -> list[Any]:
    """The compute capabilities of the targets, checked before any work is done."""
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        if targets:
            raise InputError(
                f"{trt.__name__} builds for the GPU of its machine only",
                got=", ".join(targets),
                do="Leave out --target",
            )
        return []
    if not targets:
        return []
    allowed = sorted(
        (name.lower().replace("sm", "sm_") for name in known.__members__ if re.fullmatch(r"SM\d+", name)),
        key=lambda name: int(name[3:]),
    )
    for target in targets:
        if target not in allowed:
            raise InputError(
                f"{trt.__name__} {trt.__version__} cannot build for this GPU architecture",
                got=target,
                allowed=", ".join(allowed),
                do="Choose others; for H100, H200 and B200 (sm_90, sm_100) build on that GPU with TensorRT",
            )
    return [known.__members__[target.replace("_", "").upper()] for target in targets]


def _logger(trt: ModuleType) -> Any:
    """TensorRT's errors, kept for the exception that follows them, instead of printed."""

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.lines.append(message)

        def text(self) -> str:
            return "; ".join(self.lines[-6:])

    return Log()


def main() -> None:
    """Builds what `job.json` in the current folder says; writes `engine.plan` and `built.json`, or `error.json`."""
    job = json.loads(Path("job.json").read_bytes())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one processor: TensorRT starts fewer threads
    try:
        plan, profiles = build_plan(job, Path("model.onnx"))
        with Path("engine.plan").open("wb") as file:
            file.write(plan)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path("built.json").write_text(json.dumps({"peak_bytes": peak, "profiles": profiles}))
    except (UserError, RuntimeError, OSError) as error:
        Path("error.json").write_text(json.dumps(_described(error)))


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, UserError):
        fields = {name: getattr(error, name) for name in ("fact", "allowed", "do")}
        return {"kind": type(error).__name__, "got": None if error.got is None else str(error.got), **fields}
    if isinstance(error, OSError) and error.errno is not None:
        return {"kind": "OSError", "errno": error.errno, "text": str(error)}
    return {"kind": "RuntimeError", "text": str(error)}


if __name__ == "__main__":
    main()
