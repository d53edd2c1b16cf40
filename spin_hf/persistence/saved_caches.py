"""The methods of `SpinCache` that write it to files and read it back."""

from __future__ import annotations

from contextlib import closing
from os import PathLike
from typing import Any, TypeVar

from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from ..attention.methods.base import Method
from ..backends.state_checks import held_batch
from ..graph.model_calls import model_of
from ..inference_mode import outside_inference_mode
from ..integration.rank_agreement import meeting
from ..integration.tensor_parallel import ranks_of
from .fingerprint import ModelFacts
from .joined import open_saved
from .rank_folders import save_ranks, saved_parts
from .writer import save

Saved = TypeVar("Saved", bound="SavedCaches")


class SavedCaches:
    """The methods of `SpinCache` about files."""

    _state: Any
    _log: Any
    _config: Any
    layers: Any
    calls: Any
    get_seq_length: Any

    @outside_inference_mode
    def save_pretrained(
        self, directory: str | PathLike[str], tokens: Any = None, *, max_shard_bytes: int | str = "1GiB"
    ) -> None:
        """Write the contents to a folder, as safetensors files and JSON. A crash leaves the saved cache before it, or this one.

        The ranks of a tensor-parallel model call this together, with a folder that all of them see.

        Args:
            directory: a folder. It is made if there is none. A saved cache in it is replaced.
            tokens: ids of the tokens held, [B, tokens] or longer, to be saved too. None for those that the model was given.
            max_shard_bytes: most bytes of tensors in a file, such as "4GiB"; "auto" for no limit.
        Raises:
            OptionError, SavedCacheError: a layer or argument cannot be saved, or a file could not be written.
        """
        self._log.settle(self.layers)
        length = self.get_seq_length()
        tokens = self._state.tokens.ids(length) if tokens is None else tokens
        held = length, held_batch(self._state, self.layers), tokens, max_shard_bytes
        facts = ModelFacts.of(self.calls.model())

        def write(folder: Any) -> None:
            save(folder, self._state, self.layers, self._config, facts, *held)

        save_ranks(directory, self._state.ranks, write)

    @classmethod
    @outside_inference_mode
    def from_pretrained(
        cls: type[Saved], directory: str | PathLike[str], model: PreTrainedModel | PreTrainedConfig,
        method: str | Method | None = None, *, verify: bool = True, **options: Any,
    ) -> Saved:  # fmt: skip
        """A SpinCache with the contents that `save_pretrained` wrote, which goes on as the saved one would.

        A tensor-parallel model may have another number of ranks than the one that saved it.

        Args:
            model: as for `SpinCache`. A config gives no weights to compare, and its cache is on torch's default device.
            method: as for `SpinCache`; None for the saved one. Its parameters must be those of the saved one.
            verify: compare checksums of all that is read, which finds damage. False saves that time, and trusts the files.
            options: as for `SpinCache`. By default those of the saved cache, and the caps are "auto".
        Raises:
            SavedCacheError: the files are damaged, or do not fit model, method or options.
            OptionError, BudgetError, CapacityError: as for `SpinCache` and its first batch.
        """
        target = model_of(model)
        ranks = ranks_of(model if target is None else target)
        own = (0, 1) if ranks is None else (ranks.number, ranks.size)
        with meeting(ranks, "load a saved cache"), closing(open_saved(saved_parts(directory), verify, *own)) as saved:
            method, options = saved.arguments(method, options)
            made: Any = cls(model, method, **options)  # type: ignore[call-arg]
            found = made.calls.model()
            saved.restore(made._state, made.layers, made._config, found, ModelFacts.of(found))
            made._state.tokens = made._state.tokens.recorded(0, saved.tokens())
        return made
