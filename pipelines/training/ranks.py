"""Which process of a training this is; a training alone has no process group."""

import torch.distributed as dist


def rank() -> int:
    """This process's number in its group; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes of the group; 1 alone."""
    return dist.get_world_size() if dist.is_initialized() else 1
