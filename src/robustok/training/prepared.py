"""A model prepared for training: DDP or FSDP2, compilation, activation checkpointing, gradient accumulation.

All are settings of :class:`robustok.training.common.TrainingConfig`. The names of the weights do not change.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from robustok.errors import UserError
from robustok.files import one_line
from robustok.precision import autocast
from robustok.tokenizers.perturbation import PerturbationDraw
from robustok.training.common import TrainingConfig

CHUNK_PIXELS = 2**21  # of images that a loss compares at a time: 32 of 256x256
RECOMPILE_LIMIT = 256  # sizes of buckets, each with and without gradients


class Prepared:
    """A model in training.

    Args:
        model: on its device. It is wrapped by DDP, or its blocks are sharded in place.
        run: the settings.
        accelerator: devices and processes.

    Raises:
        UserError: checkpointing, compilation or sharding of a model without blocks.
    """

    def __init__(self, model: nn.Module, run: TrainingConfig, accelerator: Accelerator) -> None:
        self.model, self.run, self.accelerator = model, run, accelerator
        adapt_blocks(model, run.gradient_checkpointing, run.compile)
        self.sharded = run.fsdp and accelerator.num_processes > 1
        if self.sharded:
            shard_blocks(model, accelerator, run.precision)
        self.module = model if self.sharded else accelerator.prepare(model)
        self._exchanging = True

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass, under autocast."""
        with autocast(self.accelerator.device, self.run.precision):
            return self.module(*inputs)

    def optimizer(self, groups: Sequence[dict[str, Any]] | None = None) -> torch.optim.Optimizer:
        """AdamW with the run's settings; by default all trainable parameters are one group."""
        groups = groups or [{"params": self.parameters(), "weight_decay": self.run.weight_decay}]
        if self.run.fsdp:  # a group of a fused optimiser is sharded or not; the same with any number of processes
            inside = {id(p) for block in blocks_of(self.model) for p in block.parameters()}
            groups = [
                group | {"params": [p for p in group["params"] if (id(p) in inside) is sharded]}
                for group in groups
                for sharded in (False, True)
            ]
        family = adamw(self.run, self.accelerator.device)
        optimizer = family(groups, lr=self.run.learning_rate, betas=self.run.betas)
        return self.accelerator.prepare(optimizer)

    def train(self) -> None:
        """Set training mode."""
        self.module.train()

    def parts(self, size: int) -> Iterator[slice]:
        """Rows of each gradient accumulation part of ``size`` samples, for losses that are means over samples.

        Do the forward pass and :meth:`backward` of a part before the next; gradients are averaged over the processes
        in the last one.
        """
        count = self.run.gradient_accumulation
        for i in range(count):
            with self._exchange(i == count - 1):
                yield slice(i * size // count, (i + 1) * size // count)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss of a part, a mean over its samples, to those of the weights."""
        self.accelerator.backward(loss / self.run.gradient_accumulation)
        self._exchange_unsharded()

    def clip(self, norm: float) -> Tensor:
        """Clip the gradient to this norm; returns the norm before."""
        if not self.sharded:
            return self.accelerator.clip_grad_norm_(self.parameters(), norm)
        # torch does not mix sharded and other parameters.
        groups = [[p for p in self.parameters() if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
        norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
        total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        for group in groups:
            clip_grads_with_norm_(group, norm, total)
        return total

    @contextmanager
    def _exchange(self, wanted: bool) -> Iterator[None]:
        """Context: whether backward passes average gradients over the processes."""
        self._exchanging = wanted
        try:
            if self.sharded:
                self.model.set_requires_gradient_sync(wanted)
                yield
            else:
                with nullcontext() if wanted else self.accelerator.no_sync(self.module):
                    yield
        finally:
            self._exchanging = True

    def _exchange_unsharded(self) -> None:
        """Average the gradients of parameters that are not sharded, which FSDP ignores."""
        if not (self.sharded and self._exchanging):
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(averaged.view_as(gradient))


class PreparedInParts(Prepared):
    """A model whose losses need all samples of a process at once: negatives, adaptive weight, discriminator.

    With ``gradient_accumulation`` a call runs the parts and keeps only their outputs, from which the losses are
    computed as if there were no parts. :meth:`backward` runs each part again and backpropagates the gradients of its
    outputs. The cost is a second forward pass. Source: Gao et al., "Scaling deep contrastive learning batch size under
    memory limited setup", arXiv 2101.06983.

    Args:
        model: as for :class:`Prepared`.
        run: as for :class:`Prepared`.
        accelerator: as for :class:`Prepared`.
        layer: the model's last weight, by which losses may be differentiated before :meth:`backward`.
    """

    def __init__(self, model: nn.Module, run: TrainingConfig, accelerator: Accelerator, layer: nn.Parameter) -> None:
        super().__init__(model, run, accelerator)
        self.layer = layer
        self._inputs: tuple[Any, ...] = ()
        self._seeds: list[int] = []
        self._output: Any = None

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass of all parts. Tensors and perturbation draws among the inputs have a row for each sample."""
        count = self.run.gradient_accumulation
        if count == 1:
            return super().__call__(*inputs)
        self._inputs, self._seeds = inputs, torch.randint(2**62, (count,)).tolist()
        with self._exchange(False), _frozen(p for p in self.parameters() if p is not self.layer):
            outputs = [self._part(rows, seed) for rows, seed in self._rows_and_seeds()]
        self._output = _map(_join, *outputs)
        return self._output

    def means(
        self, terms: Callable[[Tensor, Tensor], dict[str, Tensor]], images: Tensor, outputs: Tensor
    ) -> dict[str, Tensor]:
        """``terms(images, outputs)``, means over samples, :func:`differentiated`, computed for a few samples at a time.

        The network of a perceptual term keeps a quarter of a GB for each image of 256x256 pixels. It is freed before
        the next samples come: of a part, or of ``CHUNK_PIXELS`` if that is less.
        """
        pixels = images.shape[-2] * images.shape[-1]
        size = min(len(images) // self.run.gradient_accumulation, max(1, CHUNK_PIXELS // pixels))
        found = []
        for targets, part in zip(images.split(size), outputs.split(size), strict=True):
            with autocast(self.accelerator.device, self.run.precision):
                computed = terms(targets, part)
            share = len(part) / len(outputs)
            found.append({name: share * differentiated(term, part) for name, term in computed.items()})
        return {name: torch.stack([part[name] for part in found]).sum(0) for name in found[0]}

    def backward(self, loss: Tensor) -> None:
        """As :meth:`Prepared.backward`, for the loss of all parts."""
        count = self.run.gradient_accumulation
        if count == 1:
            super().backward(loss)
            return
        outputs = _tensors(self._output)
        found = iter(torch.autograd.grad(loss, [t for t in outputs if t.requires_grad], allow_unused=True))
        gradients = [next(found) if t.requires_grad else None for t in outputs]
        for i, (rows, seed) in enumerate(self._rows_and_seeds()):
            with self._exchange(i == count - 1):
                pairs = [
                    (tensor, gradient[rows] if gradient.ndim else gradient / count)
                    for tensor, gradient in zip(_tensors(self._part(rows, seed)), gradients, strict=True)
                    if gradient is not None and tensor.requires_grad
                ]
                torch.autograd.backward(*zip(*pairs, strict=True))
                self._exchange_unsharded()
        self._inputs, self._output = (), None

    def _part(self, rows: slice, seed: int) -> Any:
        torch.manual_seed(seed)  # the same dropout in both passes
        return super().__call__(*(_take(x, rows) for x in self._inputs))

    def _rows_and_seeds(self) -> Iterator[tuple[slice, int]]:
        size = len(self._inputs[0]) // len(self._seeds)
        return ((slice(i * size, (i + 1) * size), seed) for i, seed in enumerate(self._seeds))


class _Differentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None


def differentiated(term: Tensor, inputs: Tensor) -> Tensor:
    """The same scalar with its gradient by ``inputs`` already computed and its graph freed.

    The adaptive weight needs the gradients of the terms before the backward pass does. So the networks of the losses
    (VGG, the discriminator) are backpropagated once instead of twice, and their activations are freed early.
    """
    (gradient,) = torch.autograd.grad(term, inputs)
    return _Differentiated.apply(inputs, term.detach(), gradient)


def adamw(run: TrainingConfig, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """AdamW as the run has it.

    Raises:
        UserError: 8 bits without bitsandbytes or a GPU, or with shards.
    """
    if run.optimizer == "adamw":
        return partial(torch.optim.AdamW, fused=True)
    if run.fsdp:
        raise UserError("optimizer=adamw8bit does not work on shards; set fsdp=false or optimizer=adamw")
    if device.type == "cpu":
        raise UserError("optimizer=adamw8bit needs a GPU; set optimizer=adamw")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        reason = one_line(error, 100)
        raise UserError(
            f"optimizer=adamw8bit needs bitsandbytes ({reason}); pip install 'robustok[adam8bit]', or set "
            "optimizer=adamw"
        ) from None
    return AdamW8bit


# Blocks

# Names of lists of blocks; those of the second are looked for where there are none of the first.
STACKS = (("blocks", "layers", "resnets", "transformer", "transformer_blocks"), ("up_blocks",))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The trainable blocks of a model: the modules in its lists of such names (``STACKS``), outermost first."""
    for names in STACKS:
        stacks = [
            module
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in names and isinstance(module, nn.ModuleList | nn.Sequential)
        ]
        if found := [block for stack in stacks for block in stack if any(p.requires_grad for p in block.parameters())]:
            return found
    return []


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """The modules that are compiled, each with a static shape and without a break.

    Blocks of a transformer are alike and share a graph. Those of a convolutional encoder or decoder differ, in width or
    in the size of their images, so it is compiled as a whole.
    """
    whole, inside = [], set()
    for name, module in model.named_modules():
        role, learns = name.rpartition(".")[2], any(p.requires_grad for p in module.parameters())
        if role in ("encoder", "decoder") and learns and id(module) not in inside and not _alike(blocks_of(module)):
            whole.append(module)
            inside |= {id(part) for part in module.modules()}
    return whole + [block for block in blocks_of(model) if id(block) not in inside]


def _alike(blocks: list[nn.Module]) -> bool:
    if any(isinstance(part, nn.Conv2d | nn.Conv3d) for block in blocks for part in block.modules()):
        return False
    return len({(type(block), *(tuple(p.shape) for p in block.parameters())) for block in blocks}) == 1


def adapt_blocks(model: nn.Module, checkpointing: bool, compiling: bool) -> None:
    """Checkpoint the activations of the blocks, and compile :func:`compiled_parts`.

    Only the calls of modules change, not the names of their weights.

    Raises:
        UserError: the model has no blocks, or nothing to compile.
    """
    parts = _present(compiled_parts(model), "compile") if compiling else []
    if checkpointing:
        for block in _some_blocks(model, "gradient_checkpointing"):
            # A block that is compiled by itself is compiled inside.
            call = _compiled(block.forward) if block in parts else block.forward
            block.forward = partial(checkpoint, call, use_reentrant=False)
            parts = [part for part in parts if part is not block]
    decoders = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "decoder"]
    for part in parts:
        _compile(part, getattr(part, "conv_out", None) if part in decoders else None)


def _compile(part: nn.Module, last: nn.Module | None) -> None:
    """Compile a module without its last layer, if there is one to be left out: that of a convolutional decoder.

    The adaptive weight takes gradients of that layer. Autograd then need not go through what is compiled for it: that
    would be a backward pass of the whole decoder, and a compiled one can be gone through once.
    """
    if last is None:
        part.forward = _compiled(part.forward)
        return
    apply, last.forward = last.forward, lambda x: x
    before = _compiled(part.forward)
    part.forward = lambda *inputs: apply(before(*inputs))


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for each size of images; torch by itself would run the sizes after the eighth uncompiled."""
    sizes = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)
    return sizes(torch.compile(forward, dynamic=False))


def shard_blocks(model: nn.Module, accelerator: Accelerator, precision: str) -> None:
    """Shard the blocks' parameters among all processes (FSDP2), in place.

    In bf16 a block's weights are gathered in bf16, which is half the bytes; shards, sums of gradients and activations
    between the blocks stay in float32.

    The other parameters are not sharded: revival reads the codebook and the adaptive weight the last layer.

    Raises:
        UserError: the model has no blocks.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = _some_blocks(model, "fsdp")
    with autocast(accelerator.device, precision):
        half = torch.is_autocast_enabled(accelerator.device.type)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = policy if half else MixedPrecisionPolicy()
    for block in blocks:
        modulation = getattr(block, "adaLN_modulation", None)  # called outside of the block by some models
        for module in (modulation, block) if modulation is not None else (block,):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    inside = {id(p) for block in blocks for p in block.parameters()}
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if id(p) not in inside})


def _some_blocks(model: nn.Module, setting: str) -> list[nn.Module]:
    return _present(blocks_of(model), setting)


def _present(blocks: list[nn.Module], setting: str) -> list[nn.Module]:
    if not blocks:
        raise UserError(f"{setting} works on blocks, and this model has none that learn; set {setting}=false")
    return blocks


# Parts of a batch


@contextmanager
def _frozen(parameters: Iterator[nn.Parameter]) -> Iterator[None]:
    """Context: no gradients of these parameters, so no activations are kept for them."""
    frozen = [p.requires_grad_(False) for p in parameters]
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def _take(value: Any, rows: slice) -> Any:
    """Rows of a tensor or of a draw; anything else is the same for all rows."""
    if isinstance(value, PerturbationDraw):
        return value.rows(rows.start, rows.stop)
    return value[rows] if isinstance(value, Tensor) else value


def _map(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """Apply a function to the tensors of several outputs of a model: tensors, or nested dataclasses of tensors."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return function(*outputs)
    if is_dataclass(first):
        columns = {field.name: [getattr(output, field.name) for output in outputs] for field in fields(first)}
        return replace(first, **{name: _map(function, *column) for name, column in columns.items()})
    return first


def _tensors(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(lambda tensor: found.append(tensor) or tensor, output)
    return found


def _join(*parts: Tensor) -> Tensor:
    """The rows of all parts, or the mean of scalars, as a tensor that requires a gradient."""
    joined = torch.cat(parts) if parts[0].ndim else torch.stack(parts).mean()
    return joined.requires_grad_() if joined.is_floating_point() and not joined.requires_grad else joined
