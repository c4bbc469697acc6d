"""Calibration text: from files, folders or datasets to sequences of tokens, the same ones for the same seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sslc_common.errors import InputError, MissingError

# Every 13th sequence measures errors and is not seen by the solvers. A prime, as sources take turns: with 8 all of them
# were of the second of two.
HELD_OUT_EVERY = 13

# Text is drawn in pieces of about this many sequences (English has about four characters per token), so that a few
# sequences out of a large corpus come from many places without tokenizing all of it.
_SEQUENCES_PER_PIECE = 4
_CHARACTERS_PER_TOKEN = 4


def read_tokens(
    sources: Sequence[str],
    model: Path,
    *,
    tokens: int,
    length: int,
    seed: int,
    what: str = "calibration",
    less: bool = False,
) -> Tensor:
    """Draws sequences of tokens from texts, the same number from each source, in turns.

    Args:
        sources: Text files, folders of .txt files, or dataset names ("name", "name:configuration" or
            "name:configuration:split"; the text is the column "text").
        model: Folder with the tokenizer.
        tokens: How many tokens are wanted; rounded down to whole sequences.
        length: L, tokens per sequence.
        seed: Of the draw.
        what: How errors call the text; held-out text is drawn in the same way.
        less: Whether fewer sequences will do where a source has too little text.

    Returns:
        int64 [tokens // length, length].

    Raises:
        InputError: a source does not exist or has too little text, or the model has no tokenizer.
        MissingError: a dataset is wanted and `datasets` is not installed.
    """
    if not sources:
        raise InputError(
            f"There is no {what} text",
            allowed="text files, folders of .txt files, or names of Hugging Face datasets",
            do="Pass text of the kind the model will see, or use the method magnitude, which needs none",
        )
    tokenizer = _tokenizer(model)
    wanted = [tokens // length // len(sources)] * len(sources)
    for index in range(tokens // length - sum(wanted)):
        wanted[index] += 1
    drawn = [
        _draw(source, _text(source, what), tokenizer, count, length, seed, what, less)
        for source, count in zip(sources, wanted, strict=True)
        if count
    ]
    return torch.stack([sequences[turn] for turn in range(max(wanted)) for sequences in drawn if turn < len(sequences)])


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 of token sequences [n, L], which stands for the calibration text in manifests and configs."""
    digest = hashlib.sha256(str(list(tokens.shape)).encode())
    digest.update(tokens.to(torch.int64).contiguous().numpy().data)
    return digest.hexdigest()


def hold_out(tokens: Tensor) -> tuple[Tensor, int]:
    """Moves every 13th sequence, at least one, to the end: those measure errors and no solver sees them.

    Args:
        tokens: int64 [n, L], n ≥ 2.

    Returns:
        The sequences in their new order, and how many of them, the first ones, are for solving.
    """
    held_out = torch.arange(len(tokens)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    held_out[-1] |= not held_out.any()
    return torch.cat([tokens[~held_out], tokens[held_out]]), int((~held_out).sum())


def _draw(
    source: str, text: str, tokenizer: object, count: int, length: int, seed: int, what: str, less: bool
) -> Tensor:
    size = _SEQUENCES_PER_PIECE * length * _CHARACTERS_PER_TOKEN
    pieces = list(_pieces(text, size))
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    for index in order:
        ids += tokenizer(pieces[index], add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[operator]
        if len(ids) >= count * length:
            break
    if less:
        count = min(count, max(1, len(ids) // length))
    if len(ids) < count * length:
        raise InputError(
            f"The {what} text {source} is {'too short' if ids else 'empty'}",
            got=f"{len(ids)} tokens",
            allowed=f"at least {count * length} tokens ({count} sequences of {length})",
            do=f"Give more text, or ask for fewer {what} tokens",
        )
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def _pieces(text: str, size: int) -> Iterator[str]:
    """Cuts a text into pieces of about `size` characters, between words where there are spaces."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            middle = start + size // 2
            end = max(text.rfind(" ", middle, end), text.rfind("\n", middle, end)) + 1 or end
        yield text[start:end]
        start = end


def _tokenizer(model: Path) -> object:
    from transformers import AutoTokenizer

    if not any(model.glob("tokenizer*")) and not any(model.glob("vocab*")):
        raise InputError(
            f"{model} has no tokenizer, so text cannot be turned into tokens",
            got=", ".join(sorted(path.name for path in model.iterdir())[:8]),
            do="Copy the tokenizer files of the original model into the folder",
        )
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The tokenizer in {model} cannot be read", got=error, do="Copy or download its files again"
        ) from error


def _text(source: str, what: str) -> str:
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise InputError(f"The {what} folder {path} has no .txt files", do="Give a folder with text files")
        return "\n\n".join(_read(file) for file in files)
    if path.is_file():
        return _read(path)
    if path.suffix or source.startswith((".", "/", "~")):
        raise InputError(f"There is no {what} text {source}", do="Check the path")
    return "\n\n".join(_dataset(source))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text", got=error, do="Convert it, or give the text itself rather than an archive"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read", got=error, do="Check its permissions") from error


def _dataset(source: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise MissingError(
            f"{source} is neither a file nor a folder, and the package for datasets is not installed",
            do="Check the path, or install it: pip install 'sslc-export[datasets]'",
        ) from error
    name, configuration, split = (*source.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"The dataset {source} cannot be loaded", got=error, allowed="name, name:configuration:split"
        ) from error
    if "text" not in rows.column_names:
        raise InputError(f"The dataset {source} has no column text", got=", ".join(rows.column_names))
    yield from rows["text"]
