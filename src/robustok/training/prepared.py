"""A model made ready for training: on its devices, its blocks compiled, checkpointed or sharded, its batch in parts.

All of that is settings of :class:`robustok.training.common.TrainingConfig`; a training step reads the same with any of
them. Weights keep their names, so states and snapshots do not tell how they were trained.
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from robustok.devices import autocast
from robustok.errors import UserError
from robustok.training.common import TrainingConfig


class Prepared:
    """A model in training.

    Args:
        model: on its device. DDP wraps it, or its blocks are sharded where they are.
        run: the settings.
        accelerator: devices and processes.

    Raises:
        UserError: checkpointing or sharding of a model without blocks.
    """

    def __init__(self, model: nn.Module, run: TrainingConfig, accelerator: Accelerator) -> None:
        self.model, self.run, self.accelerator = model, run, accelerator
        adapt_blocks(model, run.gradient_checkpointing, run.compile)
        self.sharded = run.fsdp and accelerator.num_processes > 1
        if self.sharded:
            shard_blocks(model, accelerator)
        self.module = model if self.sharded else accelerator.prepare(model)
        self._exchanging = True

    def parameters(self) -> list[nn.Parameter]:
        """What learns."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass, under autocast."""
        with autocast(self.accelerator.device, self.run.precision):
            return self.module(*inputs)

    def optimizer(self, groups: Sequence[dict[str, Any]] | None = None) -> torch.optim.Optimizer:
        """AdamW with the run's settings for these parameter groups; by default for all that learns, in one group."""
        groups = groups or [{"params": self.parameters(), "weight_decay": self.run.weight_decay}]
        if self.run.fsdp:  # a fused optimiser takes shards or whole parameters; apart with any number of processes
            inside = {id(p) for block in blocks_of(self.model) for p in block.parameters()}
            groups = [
                group | {"params": [p for p in group["params"] if (id(p) in inside) is sharded]}
                for group in groups
                for sharded in (False, True)
            ]
        optimizer = torch.optim.AdamW(groups, lr=self.run.learning_rate, betas=self.run.betas, fused=True)
        return self.accelerator.prepare(optimizer)

    def train(self) -> None:
        """Go into training mode."""
        self.module.train()

    def parts(self, size: int) -> Iterator[slice]:
        """The rows of each part of this process's share of ``size`` samples, for losses that are means over samples.

        Call and :meth:`backward` each part; processes exchange their gradients in the last one.
        """
        count = self.run.gradient_accumulation
        for i in range(count):
            with self._exchange(i == count - 1):
                yield slice(i * size // count, (i + 1) * size // count)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss, averaged over the processes, to those of the weights."""
        self.accelerator.backward(loss)
        self._exchange_whole()

    def clip(self, norm: float) -> Tensor:
        """Clip the gradient of all weights to this norm; returns the norm before."""
        if not self.sharded:
            return self.accelerator.clip_grad_norm_(self.parameters(), norm)
        # Shards and whole parameters each among themselves: torch does not mix them.
        groups = [[p for p in self.parameters() if isinstance(p, DTensor) is sharded] for sharded in (False, True)]
        norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
        total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        for group in groups:
            clip_grads_with_norm_(group, norm, total)
        return total

    @contextmanager
    def _exchange(self, wanted: bool) -> Iterator[None]:
        """Whether backward passes inside exchange gradients between processes."""
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

    def _exchange_whole(self) -> None:
        """Average the gradients of what is not sharded: FSDP leaves that to us."""
        if not (self.sharded and self._exchanging):
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(averaged.view_as(gradient))


class PreparedInParts(Prepared):
    """A model whose losses need the whole share of a process at once: negatives, adaptive weight, discriminator.

    With ``gradient_accumulation`` a call runs the parts and keeps no activations but the outputs, of which losses are
    taken as if there were no parts; :meth:`backward` runs every part again and hands it the gradients of its outputs.
    That costs one more forward pass. Source: Gao et al., "Scaling deep contrastive learning batch size under memory
    limited setup", arXiv 2101.06983.

    Args:
        model: as for :class:`Prepared`.
        run: as for :class:`Prepared`.
        accelerator: as for :class:`Prepared`.
        layer: weight to which losses may be differentiated before :meth:`backward`; the last of the model.
    """

    def __init__(self, model: nn.Module, run: TrainingConfig, accelerator: Accelerator, layer: nn.Parameter) -> None:
        super().__init__(model, run, accelerator)
        self.layer = layer
        self._inputs: tuple[Any, ...] = ()
        self._seeds: list[int] = []
        self._output: Any = None

    def __call__(self, *inputs: Any) -> Any:
        """The forward pass of all parts. Of the inputs, tensors and draws have a row for every sample."""
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
        """``terms(images, outputs)``, means over samples, :func:`differentiated`; one part at a time is in memory."""
        size, found = len(images) // self.run.gradient_accumulation, []
        for targets, part in zip(images.split(size), outputs.split(size), strict=True):
            with autocast(self.accelerator.device, self.run.precision):
                computed = terms(targets, part)
            found.append({name: differentiated(term, part) for name, term in computed.items()})
        return {name: torch.stack([part[name] for part in found]).mean(0) for name in found[0]}

    def backward(self, loss: Tensor) -> None:
        """As :meth:`Prepared.backward`, part by part."""
        count = self.run.gradient_accumulation
        if count == 1:
            return super().backward(loss)
        whole = _tensors(self._output)
        found = iter(torch.autograd.grad(loss, [t for t in whole if t.requires_grad], allow_unused=True))
        gradients = [next(found) if t.requires_grad else None for t in whole]
        for i, (rows, seed) in enumerate(self._rows_and_seeds()):
            with self._exchange(i == count - 1):
                pairs = [
                    (tensor, gradient[rows] if gradient.ndim else gradient / count)
                    for tensor, gradient in zip(_tensors(self._part(rows, seed)), gradients, strict=True)
                    if gradient is not None and tensor.requires_grad
                ]
                torch.autograd.backward(*zip(*pairs, strict=True))
                self._exchange_whole()
        self._inputs, self._output = (), None
        return None

    def _part(self, rows: slice, seed: int) -> Any:
        torch.manual_seed(seed)  # of dropout, which must be the same in both passes
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
    """The same scalar, with its gradient with respect to ``inputs`` in hand and the way there forgotten.

    The adaptive weight asks for the gradients of terms before they are trained. So their networks (VGG, the
    discriminator's backbone) go back once instead of twice, and what they keep for it is freed at once.
    """
    (gradient,) = torch.autograd.grad(term, inputs)
    return _Differentiated.apply(inputs, term.detach(), gradient)


# Blocks


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of the model's stacks that learn, outermost first: lists of modules called blocks or layers."""
    stacks = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("blocks", "layers") and isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    return [block for stack in stacks for block in stack if any(p.requires_grad for p in block.parameters())]


def adapt_blocks(model: nn.Module, checkpointing: bool, compiling: bool) -> None:
    """Let the blocks compute their activations again in the backward pass, and compile them.

    Blocks and not the model: a stack of equal blocks is compiled once. Only their call changes, no name of a weight.

    Raises:
        UserError: the model has no blocks.
    """
    if not (checkpointing or compiling):
        return
    for block in _some_blocks(model, "gradient_checkpointing" if checkpointing else "compile"):
        call = torch.compile(block.forward) if compiling else block.forward
        block.forward = partial(checkpoint, call, use_reentrant=False) if checkpointing else call


def shard_blocks(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard the blocks' parameters among all processes (FSDP2), in place; the little that is left stays whole.

    So codebook and last layer can be looked at at any time, as revival and adaptive weight do.

    Raises:
        UserError: the model has no blocks.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = _some_blocks(model, "fsdp")
    for block in blocks:
        modulation = getattr(block, "adaLN_modulation", None)  # some models call it by itself
        for module in (modulation, block) if modulation is not None else (block,):
            fully_shard(module, mesh=mesh)
    inside = {id(p) for block in blocks for p in block.parameters()}
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if id(p) not in inside})


def _some_blocks(model: nn.Module, setting: str) -> list[nn.Module]:
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(f"{setting} works on blocks, of which this model has none that learn; set {setting}=false")
    return blocks


# Parts of a batch


@contextmanager
def _frozen(parameters: Iterator[nn.Parameter]) -> Iterator[None]:
    """Without gradients of these parameters, so that no activations are kept for them."""
    frozen = [p.requires_grad_(False) for p in parameters]
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def _take(value: Any, rows: slice) -> Any:
    """Rows of a tensor or of a draw; settings are the same for all."""
    if isinstance(value, Tensor):
        return value[rows]
    return value.rows(rows.start, rows.stop) if hasattr(value, "rows") else value


def _map(function: Callable[..., Tensor], *outputs: Any) -> Any:
    """The function of the tensors of model outputs that are alike: tensors, or dataclasses of them."""
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
    """Rows of all parts, or the mean of scalars; gradients of it can be had."""
    whole = torch.cat(parts) if parts[0].ndim else torch.stack(parts).mean()
    return whole.requires_grad_() if whole.is_floating_point() and not whole.requires_grad else whole
