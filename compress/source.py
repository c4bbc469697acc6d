"""The dense model to compress: its skeleton, with parameters on the meta device, and the files that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from compress.architectures import block_names, skeleton
from compress.format import Checkpoint, Progress, no_progress, require_finite
from compress.shards import TensorRef
from sslc_common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Source:
    """A dense model on disk.

    Attributes:
        model: The skeleton; blocks are loaded into it one at a time.
        checkpoint: Where the tensors lie.
        blocks: Module names of the decoder blocks.
    """

    model: PreTrainedModel
    checkpoint: Checkpoint
    blocks: list[str]

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Opens a folder.

        Raises:
            InputError: it is not a dense model of a supported architecture in safetensors.
        """
        model, checkpoint = skeleton(folder), Checkpoint.open(folder)
        if checkpoint.config.get("quantization_config") is not None:
            raise InputError(
                f"{folder} is compressed already", allowed="a dense model", do="Start from the dense model"
            )
        return cls(model, checkpoint, block_names(model))

    def find(self, parameter: str) -> str | None:
        """The name in the files of a parameter of the model, or None.

        Files saved from the model without its head leave out the prefix: "h.0..." for "transformer.h.0...". A tied
        parameter may be there under the name of the one that it is tied to.
        """
        return self._stored(parameter) or self._stored(self._tied().get(parameter, parameter))

    def _stored(self, parameter: str) -> str | None:
        for name in (parameter, parameter.removeprefix(f"{self.model.base_model_prefix}.")):
            if name in self.checkpoint.tensors:
                return name
        return None

    def _tied(self) -> dict[str, str]:
        """For a parameter that is another one in truth, that other one."""
        return dict(self.model.all_tied_weights_keys) if self.model.config.tie_word_embeddings else {}

    def ref(self, parameter: str) -> TensorRef:
        """Where a parameter lies.

        Raises:
            InputError: it is missing, or has another shape than in the architecture.
        """
        name = self.find(parameter)
        if name is None:
            raise InputError(
                f"Tensor {parameter} is missing from {self.checkpoint.folder}",
                got=f"{len(self.checkpoint.tensors)} other tensors",
                do="Copy or download the folder again",
            )
        ref, expected = self.checkpoint.tensors[name], tuple(self.model.get_parameter(parameter).shape)
        if ref.shape != expected:
            raise InputError(
                f"Tensor {name} in {ref.file} has a shape that contradicts config.json",
                got=list(ref.shape),
                allowed=str(list(expected)),
                do="Copy or download the folder again",
            )
        return ref

    def read(self, parameter: str) -> Tensor:
        """A parameter in its stored dtype.

        Raises:
            InputError: see `ref`.
        """
        self.ref(parameter)
        return self.checkpoint.read(str(self.find(parameter)))

    def outside_blocks(self) -> list[str]:
        """The parameters outside the blocks that the files hold; tied ones may be left out of them."""
        inside = tuple(f"{name}." for name in self.blocks)
        tied = self._tied()
        names = [name for name, _ in self.model.named_parameters() if not name.startswith(inside)]
        return [name for name in names if name not in tied or self._stored(name)]

    def verify(self, progress: Progress = no_progress) -> None:
        """Reads every parameter once, so that a bad one is told before hours of work.

        Raises:
            InputError: one is missing, has another shape than in the architecture, or holds NaN or infinity.
        """
        inside = [
            f"{block}.{name}" for block in self.blocks for name, _ in self.model.get_submodule(block).named_parameters()
        ]
        for name in progress([*inside, *self.outside_blocks()], "Checking weights"):
            require_finite(self.read(name), str(self.find(name)), self.ref(name).file)

    def load_block(self, name: str) -> dict[str, Tensor]:
        """Loads the dense parameters of one block, as float32, into the skeleton.

        Returns:
            The same parameters by their full names in their stored dtype.
        """
        parameters = [f"{name}.{parameter}" for parameter, _ in self.model.get_submodule(name).named_parameters()]
        stored = {parameter: self.read(parameter) for parameter in parameters}
        for parameter, tensor in stored.items():
            assign(self.model, parameter, tensor.float())
        return stored


def assign(module: nn.Module, parameter: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of a parameter of a module, whatever device that was on."""
    owner, _, name = parameter.rpartition(".")
    setattr(module.get_submodule(owner), name, nn.Parameter(tensor, requires_grad=False))
