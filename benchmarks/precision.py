"""A main-training step in bf16 autocast, compared with float32: same model, same batch, same process.

    python benchmarks/precision.py

bf16 is faster where the hardware multiplies it: a GPU, a CPU with AMX or AVX512-BF16.
"""

import time

import torch
import torch.nn.functional as F

from robustok.precision import autocast, has_fast_bf16
from robustok.tokenizers.quantizer import QuantizerConfig
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig, ViTConfig

REPEATS = 3
# (name, image size, patch size, width, depth, heads, images)
SIZES = [("ImageNet shape", 256, 16, 384, 6, 6, 4), ("digits shape", 16, 2, 96, 4, 4, 64)]


def measure(model: RobusTok, images: torch.Tensor, device: torch.device, precision: str) -> tuple[float, float, float]:
    """Smallest process CPU time and wall time of a step, and the loss of the first one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    cpu, wall, losses = [], [], []
    for _ in range(1 + REPEATS):
        start = time.process_time(), time.perf_counter()
        with autocast(device, precision):
            output = model(images)
        loss = F.mse_loss(output.reconstructions.float(), images) + output.codebook_loss + 0.25 * output.commitment_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for a GPU
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    return min(cpu[1:]), min(wall[1:]), losses[0]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device.type}, {torch.get_num_threads()} threads, bf16 in hardware: {has_fast_bf16(device)}")
    for name, size, patch, width, depth, heads, count in SIZES:
        torch.manual_seed(0)
        vit = ViTConfig(width=width, depth=depth, heads=heads)
        config = RobusTokConfig(
            image_size=size, patch_size=patch, encoder=vit, decoder=vit, quantizer=QuantizerConfig(size=1024, dim=32)
        )
        model, images = RobusTok(config).to(device), torch.rand(count, 3, size, size, device=device) * 2 - 1
        found = {precision: measure(model, images, device, precision) for precision in ("float32", "bf16")}
        print(f"{name}: {size}x{size}, {config.length} tokens, width {width}, depth {depth}, {count} images")
        for precision, (cpu, wall, loss) in found.items():
            print(f"  {precision:<8} {1e3 * cpu:9.1f} ms CPU {1e3 * wall:9.1f} ms wall, loss {loss:.4f}")
        cpu, wall = (found["float32"][i] / found["bf16"][i] for i in (0, 1))
        print(f"  ratio {cpu:.2f} by CPU time, {wall:.2f} by wall time")


if __name__ == "__main__":
    main()
