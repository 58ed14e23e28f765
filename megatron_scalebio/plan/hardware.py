"""The GPUs that a plan can be made for: memory, peak arithmetic and bandwidths.

Makers' data sheets: NVIDIA H100 (SXM5), H200, B200 (HGX), A100 (SXM4). Bandwidths of links are per
direction.
"""

from dataclasses import dataclass

from megatron_scalebio.config import Config
from megatron_scalebio.errors import UserError

GB = 1e9

# Beside torch's tensors: CUDA context and kernels, NCCL's buffers, cuBLAS' workspace, and what
# the allocator cannot hand out. An assumption, not a measurement.
RESERVED_BYTES = int(2.5 * GB)


@dataclass(frozen=True)
class Gpu:
    """One kind of device.

    Attributes:
        memory_bytes: that a plan may use: the nameplate's decimal gigabytes. (An H100-80G reports
            81,559 MiB, 85.5e9 bytes: what is above the nameplate stays unplanned.)
        peak_flops: dense bf16 FLOP/s.
        fp32_flops: FLOP/s of fp32 products, without TF32.
        memory_bandwidth: bytes/s of the device's memory.
        node_bandwidth: bytes/s to the other GPUs of a node, in one direction.
        network_bandwidth: bytes/s to other nodes, in one direction, per GPU.
        node_gpus: GPUs of a node.
        capability: CUDA's compute capability.
        cuda: whether the layers use CUDA's fused kernels.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    fp32_flops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    node_gpus: int = 8
    capability: float = 9.0
    cuda: bool = True

    @property
    def reserved_bytes(self) -> int:
        return RESERVED_BYTES if self.cuda else 0

    def require_recipe(self, config: Config) -> None:
        """Raises UserError where it can't compute in the low precision that is asked for."""
        if not config.parallel.low_precision:
            return
        option, recipe = config.parallel.low_precision
        if self.capability < _CAPABILITIES[recipe]:
            able = [gpu.name for gpu in GPUS.values() if gpu.capability >= _CAPABILITIES[recipe]]
            raise UserError(
                f"--gpu: {self.name} can't compute in parallel.{option} with recipe {recipe} "
                f"(drop it, or plan for {' or '.join(able)})"
            )


# That Transformer Engine's recipes need.
_CAPABILITIES = {"tensorwise": 8.9, "delayed": 8.9, "blockwise": 9.0, "mxfp8": 10.0, "nvfp4": 10.0}

_INFINIBAND = 50 * GB  # one 400 Gb/s port per GPU
_HDR = 25 * GB  # one 200 Gb/s port per GPU
GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVLink 4: 900 GB/s in both directions together.
        Gpu("h100-80g", int(80 * GB), 989e12, 67e12, 3350 * GB, 450 * GB, _INFINIBAND),
        Gpu("h200", int(141 * GB), 989e12, 67e12, 4800 * GB, 450 * GB, _INFINIBAND),
        # NVLink 5: 1,800 GB/s.
        Gpu("b200", int(180 * GB), 2250e12, 75e12, 7700 * GB, 900 * GB, _INFINIBAND, capability=10),
        # NVLink 3: 600 GB/s in both directions together.
        Gpu("a100-80g", int(80 * GB), 312e12, 19.5e12, 2039 * GB, 300 * GB, _HDR, capability=8.0),
        Gpu("a100-40g", int(40 * GB), 312e12, 19.5e12, 1555 * GB, 300 * GB, _HDR, capability=8.0),
        # A core or two of this package's test machines; only the memory is of interest.
        Gpu("cpu", int(16 * GB), 0.2e12, 0.1e12, 20 * GB, 5 * GB, 1 * GB, 64, 0.0, cuda=False),
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises UserError where there is none of that name."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: {name!r} is not known (one of {', '.join(GPUS)})")
    return GPUS[name.lower()]
