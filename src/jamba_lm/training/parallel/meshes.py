"""The processes of a layout as torch's meshes. All processes make them together."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jamba_lm.parallel_layout import AXES, EXPERT_AXES, ParallelLayout


def process_mesh(layout: ParallelLayout, device_type: str) -> DeviceMesh:
    """Return the processes as a mesh of the four `AXES`."""
    sizes = tuple(getattr(layout, axis) for axis in AXES)
    return init_device_mesh(device_type, sizes, mesh_dim_names=AXES)


def expert_process_mesh(layout: ParallelLayout, device_type: str) -> DeviceMesh:
    """Return the same processes as a mesh of the `EXPERT_AXES`.

    A process holds the experts of its place along "expert"; those at the same place along "expert"
    and "tensor" hold the same, so their gradients are added over "replicate" and "expert_shard",
    and "expert_shard" is what FSDP cuts them over.
    """
    sizes = tuple(getattr(layout, axis) for axis in EXPERT_AXES)
    return init_device_mesh(device_type, sizes, mesh_dim_names=EXPERT_AXES)
