"""What must hold for any directory: a refusal in our words, or an acceptance that the real library shares."""

from pathlib import Path

from safetensors import safe_open

from qerl_compile.checkpoint_dir import CheckpointDirectory, open_checkpoint
from qerl_compile.errors import CheckpointError


def judged(root: Path) -> CheckpointError | CheckpointDirectory:
    """The outcome of `open_checkpoint`, after checking what must hold of it.

    Raises:
        AssertionError: an outcome that breaks the promise. Any other exception is a fault of ours, too.
    """
    try:
        checkpoint = open_checkpoint(root)
    except CheckpointError as refusal:
        assert refusal.where and refusal.expected and refusal.got and refusal.do
        assert str(refusal).isprintable() and len(str(refusal)) < 1500
        return refusal
    for shard in checkpoint.shards:
        assert shard.parent == root
        with safe_open(shard, framework="pt") as reader:
            ours = {name: entry for name, entry in checkpoint.tensors.items() if entry.file == shard}
            assert set(reader.keys()) == set(ours)
            for name, entry in ours.items():
                view = reader.get_slice(name)
                assert (tuple(view.get_shape()), view.get_dtype()) == (entry.shape, entry.dtype)
    return checkpoint
