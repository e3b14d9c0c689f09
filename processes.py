"""What the processes of torchrun do together inside a forward pass; alone, each is the identity.

    torchrun --nproc_per_node=4 train.py ...    process 0  rows 0, 1   ─┐
                                                process 1  rows 2, 3    ├─ a forward pass of 8 rows
                                                process 2  rows 4, 5    │
                                                process 3  rows 6, 7   ─┘

A mean over positions, the codebooks of an RVQ and the balancer's norms are of all rows of a pass,
so that a training is the same for any number of processes.
"""
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def rank():
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(tensor):
    """The sum of a tensor over all processes, without gradient; in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def whole(tensor):
    """A tensor that may be sharded (FSDP2), whole; all processes ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def masked_mean(values, mask):
    """Mean of the values where the mask is true, or 0; both of one shape, the mask of any dtype.

    In training, where the values have a gradient, it is divided by the mean count of all processes
    instead: the mean of these results over the processes is then the mean over all positions, which
    count equally wherever they are computed.
    """
    count = mask.sum().clamp(min=1).to(values.dtype)
    if values.requires_grad and world() > 1:
        count = (add_up(mask.sum().to(values.dtype)) / world()).clamp(min=1 / world())
    return (values * mask).sum() / count


if __name__ == "__main__":
    print("processes.py is a library, used by train.py")
