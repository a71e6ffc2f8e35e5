"""A main-training step in bf16 autocast, compared with float32: same model, same batch, same process.

    python benchmarks/precision.py

bf16 is faster where the hardware multiplies it: a GPU, a CPU with AMX or AVX512-BF16.
"""

import torch
import torch.nn.functional as F

from robustok.precision import autocast, has_fast_bf16
from robustok.tokenizers.quantizer import QuantizerConfig
from robustok.tokenizers.robustok import RobusTok, RobusTokConfig, ViTConfig
from timing import Cost, arguments, median

REPEATS = 3
# (name, image size, patch size, width, depth, heads, images)
SIZES = [("ImageNet shape", 256, 16, 384, 6, 6, 4), ("digits shape", 16, 2, 96, 4, 4, 64)]


def step_cost(model: RobusTok, images: torch.Tensor, device: torch.device, precision: str) -> tuple[Cost, float]:
    """The median cost of a step, and the loss of the first one."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True), []

    def step() -> None:
        with autocast(device, precision):
            output = model(images)
        loss = F.mse_loss(output.reconstructions.float(), images) + output.codebook_loss + 0.25 * output.commitment_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    return median(step, REPEATS, device.type), losses[0].item()


def main() -> None:
    device = torch.device(arguments(__doc__).parse_args().device)
    print(f"{device.type}, {torch.get_num_threads()} threads, bf16 in hardware: {has_fast_bf16(device)}")
    for name, size, patch, width, depth, heads, count in SIZES:
        torch.manual_seed(0)
        vit = ViTConfig(width=width, depth=depth, heads=heads)
        config = RobusTokConfig(
            image_size=size, patch_size=patch, encoder=vit, decoder=vit, quantizer=QuantizerConfig(size=1024, dim=32)
        )
        model, images = RobusTok(config).to(device), torch.rand(count, 3, size, size, device=device) * 2 - 1
        found = {precision: step_cost(model, images, device, precision) for precision in ("float32", "bf16")}
        print(f"{name}: {size}x{size}, {config.length} tokens, width {width}, depth {depth}, {count} images")
        for precision, (cost, loss) in found.items():
            print(f"  {precision:<8} {cost}, loss {loss:.4f}")
        single, half = (found[precision][0] for precision in ("float32", "bf16"))
        print(f"  ratio {single.seconds / half.seconds:.2f}, {single.wall / half.wall:.2f} by wall time")


if __name__ == "__main__":
    main()
