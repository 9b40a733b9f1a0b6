import pytest
import torch

from ecar_dist.runtime.peers import lost_peer

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:11931. This is"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(GLOO), "Connection closed by peer [127.0.0.1]:11931"),
        (
            RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation"),
            "Timed out waiting 15000ms for recv operation",
        ),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error\n"
                "ncclRemoteError: A call failed"
            ),
            "NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error",
        ),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), "failed to recv, got 0 bytes"),
        (
            torch.distributed.DistBackendError("NCCL error in: NCCLUtils.hpp:1, invalid usage\nDuplicate GPU detected"),
            None,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (RuntimeError("the object store said: connection reset by peer"), None),
        (ConnectionResetError(104, "Connection reset by peer"), None),
    ],
)
def test_messages_of_the_transports_about_a_lost_peer(error, words):
    assert lost_peer(error) == words


def test_the_cause_of_an_error_counts():
    wrapped = ValueError("while saving")
    wrapped.__cause__ = RuntimeError(GLOO)
    assert lost_peer(wrapped) == "Connection closed by peer [127.0.0.1]:11931"
