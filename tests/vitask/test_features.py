"""Cached features: the same values in memory and on disk."""

import numpy as np
import torch

from vitask.features import Features, Joined
from vitask.vlm import VLM


def test_features_on_disk_equal_those_in_memory(tiny_checkpoint, tiny_datasets, tmp_path):
    vlm = VLM.load(str(tiny_checkpoint))
    memory = Features(tiny_datasets, vlm.image_features)
    disk = Features(tiny_datasets, vlm.image_features, memory_mib=0.02, folder=tmp_path)
    for name in tiny_datasets:
        for split in ("train", "val", "test"):
            assert torch.equal(memory(name, split), disk(name, split))
            assert disk(name, split) is disk(name, split)
    (place,) = tmp_path.iterdir()
    sizes = [path.stat().st_size for path in place.iterdir()]
    assert 0 < len(sizes) < 9  # some fit into memory
    del disk
    assert list(tmp_path.iterdir()) == []


def test_joined_tensors_read_as_one():
    tensors = [torch.randn(3, 2), torch.randn(1, 2), torch.randn(4, 2)]
    joined, whole = Joined(tensors), torch.cat(tensors)
    rows = np.array([7, 0, 3, 3, 2, 4])
    assert len(joined) == 8
    assert torch.equal(joined[rows], whole[rows])
    assert torch.equal(joined[[5]], whole[[5]])
