"""Finds the model that a user named: a Hugging Face folder, a hub id, or a .gguf file."""

from __future__ import annotations

import re
from pathlib import Path

from sslc_common.errors import InputError
from sslc_common.files import atomic_path, require_space, sha256
from sslc_export import console
from sslc_export.cache import cache_folder

# Bytes of float32 over bytes of the smallest usual GGUF type: what a converted model may take on disk.
_GGUF_EXPANSION = 8


def resolve(model: str) -> Path:
    """Returns the Hugging Face folder of a model.

    Args:
        model: A folder with `config.json`; a `.gguf` file, which is converted once to a float32 folder in the
            cache (the whole model passes through memory); or a hub id, which is downloaded.

    Raises:
        InputError: there is no such model, or it cannot be read.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"{model} is not a model folder",
                got="no config.json in it",
                allowed="a Hugging Face folder: config.json, tokenizer, .safetensors",
                do="Check the path",
            )
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"{model} is not a model", got=f"a {path.suffix or 'plain'} file", allowed="a folder or a .gguf file"
            )
        return _convert_gguf(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        return _download(model)
    raise InputError(
        f"There is no model {model}",
        allowed="a Hugging Face folder, a hub id such as HuggingFaceTB/SmolLM2-135M, or a .gguf file",
        do="Check the path",
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        files = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except RepositoryNotFoundError as error:
        raise InputError(
            f"There is no model {hub_id}",
            got="neither a local folder nor a repository of the Hugging Face hub",
            do="Check the name; log in with `hf auth login` if it is private",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"Model {hub_id} is not in the local cache, and the Hugging Face hub cannot be reached",
            got=str(error).splitlines()[0],
            do="Check the network, or pass a local folder",
        ) from error


def _convert_gguf(path: Path) -> Path:
    folder = cache_folder() / "gguf" / sha256(path)[:16]
    if folder.is_dir():
        return folder
    require_space(folder, _GGUF_EXPANSION * path.stat().st_size)

    console.quiet_transformers()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location, name = str(path.parent), path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(location, gguf_file=name, dtype=torch.float32)
    except Exception as error:  # the readers below raise anything from IndexError to numpy's ValueError
        raise InputError(
            f"{path} cannot be read as GGUF",
            got=f"{type(error).__name__}: {error}",
            allowed="a whole .gguf file of an architecture that transformers can load",
            do="Fetch the file again, or pass the Hugging Face folder that it was made from",
        ) from error
    # transformers still takes the model for a quantized one and would refuse to save it.
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.update(hf_quantizer=None, is_quantized=False)
    with atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def longest_sequence(checkpoint: Path) -> int:
    """Most tokens that the model can take."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(checkpoint).max_position_embeddings)
