"""What a device could do: the yardstick of model-FLOPs utilisation."""

import time

import torch
from transformers import TrainingArguments

# Dense bfloat16 products a second, by NVIDIA's data sheets. A device has one of these names if all words of it are
# among the words of the device's own; the longest such name counts.
BFLOAT16_PEAKS = {
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40": 181e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_flops(arguments: TrainingArguments) -> tuple[float, str]:
    """FLOP/s of one device in the precision of the run, and where that number is from."""
    device = arguments.device
    if device.type == "cuda" and arguments.bf16:
        known = known_name(torch.cuda.get_device_name(device))
        if known is not None:
            return BFLOAT16_PEAKS[known], f"data sheet of {known}, dense bfloat16"
    return measured_flops(device, torch.bfloat16 if arguments.bf16 else torch.float32), "a large matrix product here"


def known_name(device_name: str) -> str | None:
    """The name in `BFLOAT16_PEAKS` of a device that calls itself this, as "NVIDIA A100-SXM4-80GB"; None: not known."""
    words = set(device_name.replace("-", " ").split())
    return max((name for name in BFLOAT16_PEAKS if words >= set(name.split())), key=len, default=None)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest of some products of square matrices."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers are not touched
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    fastest_s = float("inf")
    for _ in range(repeats + 1):
        start_s = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        fastest_s = min(fastest_s, time.perf_counter() - start_s)
    return 2 * size**3 / fastest_s
