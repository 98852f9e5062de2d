"""Opens the memory that `load(..., memory=...)` names, and checks that it belongs to the model's tokenizer."""

from __future__ import annotations

from mtp_mlx.drafters.memory.memory_file import Header, MemoryFile, append, check_vocabulary
from mtp_mlx.drafters.memory.ngrams import Table
from mtp_mlx.drafters.memory.options import DEFAULT_SIZE, OFF, MemoryLearning, MemoryLoading
from mtp_mlx.drafters.memory.source import Memory
from mtp_mlx.drafters.memory.vocabulary import vocabulary_fingerprint
from mtp_mlx.drafters.registry import LoadContext
from mtp_mlx.errors import MTPError
from mtp_mlx.files import user_path
from mtp_mlx.model.seams import embedding_shape, find_seams
from mtp_mlx.train.memory import parsed_size


def open_texts(options: MemoryLoading, learning: MemoryLearning, context: LoadContext) -> Memory | None:
    """The memory that the options name, or that comes with the model; None if there is none.

    One that is to learn is made if there is no such file.

    Raises:
        MTPError: if the file cannot be read, belongs to another tokenizer, or is to learn and cannot be written, or
            if nothing is named that could learn.
    """
    named = options.memory not in (None, OFF)
    if learning.memory_learn and not named:
        raise MTPError("`memory_learn` needs a file to learn into: name it with `memory`")
    path = user_path(str(options.memory)) if named else context.texts
    if path is None or options.memory == OFF:
        return None
    vocabulary = vocabulary_fingerprint(context.tokenizer)
    if (
        learning.memory_learn
    ):  # now, so that a file that cannot be written is refused before there are answers
        append(path, Table.empty(), Header(vocabulary, 0, parsed_size(DEFAULT_SIZE)))
    file = MemoryFile(path)
    check_vocabulary(file, vocabulary)
    rows, _ = embedding_shape(find_seams(context.model).embedding)
    return Memory(file, rows, named=named, learns=learning.memory_learn)
