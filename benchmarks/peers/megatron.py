"""megatron-core: GPTModel on its local spec with torch's attention, its DDP and optimizer.

On a CPU, where only the losses are of interest, calls that name CUDA are led to the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..case import Case, Step
from ..llama import fill_one


class Attention(nn.Module):
    """Causal attention by torch's kernels, in the place of Megatron's unfused one."""

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # from (s, b, heads, size)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.permute(2, 0, 1, 3).flatten(2)


class Norm(nn.RMSNorm):
    """torch's norm; Megatron's own wrapper refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class _CudaIs(TorchFunctionMode):
    """Makes "cuda" mean another device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": self.device}
        return func(*args, **kwargs)


@contextmanager
def _at_home(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if device.type == "cpu":
            stack.enter_context(_CudaIs(device))
            from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

            for owner, name, value in (
                (torch.cuda, "current_device", device),
                (torch.cuda, "synchronize", None),
                (CudaRNGStatesTracker, "fork", nullcontext()),
            ):
                fake = partial(_constant, value)
                stack.enter_context(mock.patch.object(owner, name, fake))
        yield


def _constant(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def build(case: Case) -> Step:
    if case.sizes.cp > 1:
        raise ValueError("megatron-core's context parallelism needs Transformer Engine")
    with _at_home(case.device):
        chunks, optimizer, config = _model(case)
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    run = get_forward_backward_func()
    shape = case.shape
    positions = torch.arange(shape.sequence, device=case.device)[None]

    def forward_step(data: Iterator[Tensor], model: nn.Module) -> Any:
        ids = next(data)
        losses = model(ids[:, :-1].contiguous(), positions, None, labels=ids[:, 1:].contiguous())
        return losses, lambda out: (out.mean(), {"loss": out.mean().detach()})

    def step(ids: Tensor) -> Tensor:
        with _at_home(case.device):
            part = case.part(ids, parallel_state.get_data_parallel_rank())
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            said = run(
                forward_step_func=forward_step,
                data_iterator=[iter(part.chunk(case.microbatches)) for _ in chunks],
                model=list(chunks),
                num_microbatches=case.microbatches,
                seq_length=shape.sequence,
                micro_batch_size=1,
                forward_only=False,
            )
            optimizer.step()
            return _mean(said, case)

    return step


def _mean(said: Sequence[Any], case: Case) -> Tensor:
    """Return the mean loss over microbatches and dp, on every rank."""
    from megatron.core import parallel_state

    loss = torch.zeros((), device=case.device)
    if said:
        loss = torch.stack([x["loss"] for x in said]).mean()
    if case.sizes.pp > 1:
        dist.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
    if case.sizes.dp > 1:
        dist.all_reduce(loss, group=parallel_state.get_data_parallel_group())
    return loss / case.sizes.dp


def _model(case: Case) -> tuple[list[Any], Any, Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes, shape, cuda = case.sizes, case.shape, case.device.type == "cuda"
    virtual = case.virtual_stages if case.virtual_stages > 1 else None
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(sizes.tp, sizes.pp, virtual)
    if cuda:
        model_parallel_cuda_manual_seed(0)
    elif virtual is not None and sizes.pp == 2:
        raise RuntimeError("gloo mixes up what two ranks send each other in two directions")
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        ffn_hidden_size=shape.ffn,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=sizes.tp > 1,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=cuda,
        bias_activation_fusion=cuda,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=not cuda,
        perform_initialization=False,
        params_dtype=case.dtype,
        pipeline_dtype=case.dtype,
        bf16=cuda,
        overlap_p2p_comm=virtual is not None and cuda,
        batch_p2p_comm=virtual is None or not cuda,
        deallocate_pipeline_outputs=cuda,  # gloo still sends them
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = Attention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    reduce = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=cuda and sizes.dp > 1,
        overlap_grad_reduce=cuda and sizes.dp > 1,
        overlap_param_gather=False,
    )
    chunks = []
    for chunk in range(case.virtual_stages):
        ends = {"ignore_virtual": virtual is None, "vp_stage": chunk if virtual else None}
        layers = get_num_layers_to_build(config, ends["vp_stage"])
        model = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=Norm),
            vocab_size=shape.vocab,
            max_sequence_length=shape.sequence,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            position_embedding_type="rope",
            rotary_base=500000,
            share_embeddings_and_output_weights=False,
            vp_stage=ends["vp_stage"],
        ).to(case.device)
        _fill(model, case)
        if cuda:
            model = model.bfloat16()
        chunks.append(DistributedDataParallel(config, reduce, model))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=case.lr,
            weight_decay=0.01,
            clip_grad=0.0,
            bf16=cuda,
            params_dtype=case.dtype,
            use_distributed_optimizer=reduce.use_distributed_optimizer,
        ),
        chunks,
    )
    return chunks, optimizer, config


def _fill(model: Any, case: Case) -> None:
    """Give ``model`` this rank's part of the weights that all peers begin with."""
    from megatron.core import parallel_state

    rank, tp, shape = parallel_state.get_tensor_model_parallel_rank(), case.sizes.tp, case.shape

    def whole(name: str, rows: int, columns: int) -> Tensor:
        made = torch.empty(rows, columns, device=case.device)
        fill_one(name, made)
        return made

    inner, kv = shape.heads * shape.head, shape.kv_heads * shape.head
    with torch.no_grad():
        for name, p in model.named_parameters():
            parts = name.split(".")
            if parts[0] == "decoder" and parts[1] == "layers":
                own = f"layers.{model.decoder.layers[int(parts[2])].layer_number - 1}."
            if p.ndim < 2:
                p.fill_(1.0)
            elif "word_embeddings" in name:
                p.copy_(whole("embed.weight", shape.vocab, shape.width).chunk(tp)[rank])
            elif "output_layer" in name:
                p.copy_(whole("head.weight", shape.vocab, shape.width).chunk(tp)[rank])
            elif "linear_qkv" in name:  # for each key head its queries, the key, the value
                q = whole(own + "attention.wq.weight", inner, shape.width)
                k = whole(own + "attention.wk.weight", kv, shape.width)
                v = whole(own + "attention.wv.weight", kv, shape.width)
                heads = [x.unflatten(0, (shape.kv_heads, -1)) for x in (q, k, v)]
                p.copy_(torch.cat(heads, 1).chunk(tp)[rank].flatten(0, 1))
            elif "linear_proj" in name:
                made = whole(own + "attention.wo.weight", shape.width, inner)
                p.copy_(made.chunk(tp, 1)[rank])
            elif "linear_fc1" in name:  # gate and up, each of this rank
                gate = whole(own + "mlp.w1.weight", shape.ffn, shape.width).chunk(tp)[rank]
                up = whole(own + "mlp.w3.weight", shape.ffn, shape.width).chunk(tp)[rank]
                p.copy_(torch.cat([gate, up]))
            elif "linear_fc2" in name:
                made = whole(own + "mlp.w2.weight", shape.width, shape.ffn)
                p.copy_(made.chunk(tp, 1)[rank])
            else:
                raise AssertionError(name)
