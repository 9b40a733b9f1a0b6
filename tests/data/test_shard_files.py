from pathlib import Path

import pytest

from ecar_dist.data.image_shards import ImageShards
from ecar_dist.data.shard_files import local_folder
from ecar_dist.errors import DataError


def test_local_folders_and_urls():
    assert local_folder("file:///a/b") == local_folder(Path("/a/b")) == Path("/a/b")
    with pytest.raises(DataError, match="must be on a local or mounted file system, got s3://bucket/x"):
        ImageShards("s3://bucket/x")
