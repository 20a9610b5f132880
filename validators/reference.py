"""What the model answers: transformers' GptOss in float32, with one layer in RAM at a time.

    reference = run_reference(open_checkpoint(folder), default_probes(checkpoint, "quick"))
    reference.logits(0, 0, 32)          # [32, vocab] float32, of the first probe's first 32 positions

In bfloat16 or float16 it is what `from_pretrained(dtype=...)` computes: no reference, but what rounding costs.

The mathematics is transformers' alone: its GptOssModel.forward runs once over all probes, its eager
attention and eager experts, its MXFP4 decoding and, for Hugging Face layouts, its reading of config.json.
What is ours is only where the numbers lie: parameters stay on the meta device until their layer runs, and
an expert is decoded when GptOssExperts indexes it, so that peak memory is one layer's dense weights, one
expert, and the activations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.runner import Logits
from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.open import read_tensor
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, TensorRef
from gptoss_export.exporter.errors import ConfigError, PromptError
from gptoss_export.exporter.progress import Progress, SilentProgress, Task
from gptoss_export.validators.probes import Probe

if TYPE_CHECKING:
    import torch
    from transformers import GptOssConfig

Dtype = Literal["float32", "bfloat16", "float16"]
"""What transformers holds parameters and activations in."""

BLOCK_POSITIONS = 64
BLOCKS_KEPT = 3
VOCABULARY_ROWS = 2048


class Reference:
    """The reference's last hidden states of every probe, and its logits on demand.

    Hidden states are small (one [positions, hidden] float32 a probe, exact whatever the dtype). Logits are
    computed in dtype, in blocks of positions with the head read by slices of the vocabulary from its file,
    so that a head of 2.3 GB in float32 is never whole in RAM; the last few blocks are kept, because parity
    reads positions in order.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        config: ModelConfig,
        hidden: Sequence[NDArray[np.float32]],
        lm_head: TensorRef,
        description: str,
        dtype: Dtype = "float32",
    ) -> None:
        self.probes = tuple(probes)
        self.config = config
        self.description = description
        self.dtype = dtype
        self._hidden = tuple(hidden)
        self._lm_head = lm_head
        self._blocks: OrderedDict[tuple[int, int], Logits] = OrderedDict()

    @property
    def vocab_size(self) -> int:
        return self._lm_head.shape[0]

    def logits(self, probe: int, start: int, stop: int) -> Logits:
        """Logits [stop - start, vocab] float32 of positions start to stop of the probe of that index.

        Row i says what follows the probe's first start + i + 1 tokens. Raises IndexError outside of the
        probe.
        """
        if not 0 <= start < stop <= len(self.probes[probe].ids):
            raise IndexError(f"positions {start} to {stop} of a probe of {len(self.probes[probe].ids)}")
        parts = []
        for block in range(start // BLOCK_POSITIONS, (stop - 1) // BLOCK_POSITIONS + 1):
            base = block * BLOCK_POSITIONS
            parts.append(self._block(probe, block)[max(start - base, 0) : stop - base])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _block(self, probe: int, block: int) -> Logits:
        key = (probe, block)
        if key not in self._blocks:
            while len(self._blocks) >= BLOCKS_KEPT:
                self._blocks.popitem(last=False)
            base = block * BLOCK_POSITIONS
            self._blocks[key] = self._head(self._hidden[probe][base : base + BLOCK_POSITIONS])
        self._blocks.move_to_end(key)
        return self._blocks[key]

    def _head(self, hidden: NDArray[np.float32]) -> Logits:
        import torch

        kind = _torch_dtype(self.dtype)
        x = torch.from_numpy(hidden).to(kind)
        out = np.empty((len(hidden), self.vocab_size), np.float32)
        with torch.inference_mode():
            for row in range(0, self.vocab_size, VOCABULARY_ROWS):
                # Mapped anew each time: pages of a map count as resident for as long as it lives.
                weight = _as(kind, read_tensor(self._lm_head)[row : row + VOCABULARY_ROWS])
                out[:, row : row + VOCABULARY_ROWS] = torch.nn.functional.linear(x, weight).float().numpy()
        return out


def run_reference(
    checkpoint: Checkpoint, probes: Sequence[Probe], *, dtype: Dtype = "float32", progress: Progress | None = None
) -> Reference:
    """Runs transformers' GptOss in `dtype` over all probes, as one batch padded on the right.

    Eager attention takes some 20 bytes * probes * heads * longest**2, which `default_probes` keeps small.
    Raises ConfigError when transformers refuses the config, PromptError for tokens that are none, or none of
    this vocabulary.
    """
    import torch
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssModel, GptOssRotaryEmbedding

    if not probes or not all(probe.ids for probe in probes):
        raise PromptError("a probe without tokens cannot be run", "Give every probe at least one token.")
    config = transformers_config(checkpoint)
    with torch.device("meta"):
        model = GptOssModel(config)
    model.train(False)
    model.rotary_emb = GptOssRotaryEmbedding(config)
    load = _Loader(checkpoint, dtype)
    model.norm.load_state_dict({"weight": load("model.norm.weight")}, assign=True)

    lengths = [len(probe.ids) for probe in probes]
    embeds, mask = _embed(checkpoint, probes, load.dtype)
    label = "reference" if dtype == "float32" else f"noise floor {dtype}"
    task = (progress or SilentProgress()).task(label, total=len(model.layers))
    with torch.inference_mode(), task as layers_done:
        for index, layer in enumerate(model.layers):
            _stream_layer(load, index, layer, layers_done)
        states = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = [np.array(states[row, :n].float().numpy()) for row, n in enumerate(lengths)]
    return Reference(
        probes,
        checkpoint.config,
        hidden,
        checkpoint.tensors["lm_head.weight"],
        f"transformers {transformers.__version__} GptOss, {dtype}, eager, one layer at a time",
        dtype,
    )


def transformers_config(checkpoint: Checkpoint) -> GptOssConfig:
    """The config as transformers understands it, with eager attention and eager experts.

    For Hugging Face layouts it is built from config.json as it stands, so that an error of our own reader
    cannot hide in both sides of the comparison. The OpenAI layout has keys that transformers does not know;
    there our reading is used.
    """
    from transformers import GptOssConfig

    raw: Mapping[str, object]
    if "model_type" in checkpoint.raw_config:
        # A copy: transformers writes into the tables that it is given.
        raw = {k: deepcopy(v) for k, v in checkpoint.raw_config.items() if k != "quantization_config"}
    else:
        raw = _keys_for_transformers(checkpoint.config)
    # These would make forward collect the states of every layer.
    raw = {**raw, "output_hidden_states": False, "output_attentions": False, "output_router_logits": False}
    try:
        return GptOssConfig.from_dict(raw, attn_implementation="eager", experts_implementation="eager")
    except Exception as error:  # its strict dataclasses raise types of their own
        line = " ".join(str(error).split())
        raise ConfigError(
            f"transformers refuses this config.json: {line}",
            "Compare config.json with the one that the model was released with.",
        ) from error


def _keys_for_transformers(config: ModelConfig) -> dict[str, object]:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "original_max_position_embeddings": config.yarn.original_context,
            "truncate": config.yarn.truncate,
        }
    return {
        "num_hidden_layers": config.num_layers,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_positions,
        "swiglu_alpha": config.swiglu_alpha,
        "swiglu_limit": config.swiglu_limit,
        "pad_token_id": config.pad_token_id,
    }


class _Loader:
    """Parameters by name, in the dtype that from_pretrained would give them."""

    def __init__(self, checkpoint: Checkpoint, dtype: Dtype) -> None:
        import torch
        from transformers import GptOssModel

        self.tensors = checkpoint.tensors
        self.dtype = _torch_dtype(dtype)
        # As transformers has it: these modules stay in float32 when the model is asked for in float16 only.
        keep = GptOssModel._keep_in_fp32_modules or [] if self.dtype is torch.float16 else []
        self._in_float32 = frozenset(keep)

    def __call__(self, name: str) -> torch.Tensor:
        import torch

        kept = not self._in_float32.isdisjoint(name.split("."))
        return _as(torch.float32 if kept else self.dtype, read_tensor(self.tensors[name]))


class _ExpertSlices:
    """Stands in for GptOssExperts.gate_up_proj or down_proj: indexed by expert, it gives [K, rows] in dtype.

    gpt-oss' eager forward does nothing else with them, and only asks for experts that some token went to.
    """

    def __init__(self, tensors: Mapping[str, TensorRef], name: str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._stored = [tensors[n] for n in (name, f"{name}_blocks", f"{name}_scales") if n in tensors]

    def __getitem__(self, expert: torch.Tensor) -> torch.Tensor:
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        e = int(expert)
        stored = [read_tensor(ref)[e] for ref in self._stored]
        if len(stored) == 1:
            return _as(self._dtype, stored[0])
        # Every row goes in as an expert of one row: the function then has nothing to transpose, and the
        # transposition that it owes is a view, which saves 40 % of the time.
        blocks, scales = (torch.from_numpy(np.array(part)).unsqueeze(1) for part in stored)
        decoded: torch.Tensor = convert_moe_packed_tensors(blocks, scales, dtype=self._dtype)
        return decoded.squeeze(-1).T


def _stream_layer(load: _Loader, index: int, layer: torch.nn.Module, done: Task) -> None:
    """Has the layer's parameters loaded just before it runs and dropped just after."""
    prefix = f"model.layers.{index}."
    experts = layer.get_submodule("mlp.experts")
    for name in ("gate_up_proj", "down_proj"):
        delattr(experts, name)
        setattr(experts, name, _ExpertSlices(load.tensors, f"{prefix}mlp.experts.{name}", load.dtype))

    def fill(*_: object) -> None:
        layer.load_state_dict({n: load(prefix + n) for n in layer.state_dict()}, assign=True)

    def drop(*_: object) -> None:
        layer.to("meta")
        done.advance(1)

    layer.register_forward_pre_hook(fill)
    layer.register_forward_hook(drop)


def _embed(checkpoint: Checkpoint, probes: Sequence[Probe], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The probes' rows of the embedding, zeros after their ends, and the mask that says so.

    [probes, longest, hidden] in dtype and [probes, longest] int64.
    """
    import torch

    table = read_tensor(checkpoint.tensors["model.embed_tokens.weight"])
    longest = max(len(probe.ids) for probe in probes)
    embeds = torch.zeros(len(probes), longest, table.shape[1], dtype=dtype)
    mask = torch.zeros(len(probes), longest, dtype=torch.int64)
    for row, probe in enumerate(probes):
        if not all(0 <= token < len(table) for token in probe.ids):
            raise PromptError(
                f"probe {probe.name!r} has token ids outside of the vocabulary of {len(table)}",
                "Use the tokenizer of this checkpoint.",
            )
        embeds[row, : len(probe.ids)] = _as(dtype, table[list(probe.ids)])
        mask[row, : len(probe.ids)] = 1
    return embeds, mask


def _torch_dtype(dtype: Dtype) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def _as(dtype: torch.dtype, stored: NDArray[np.generic]) -> torch.Tensor:
    """A bfloat16 array, whatever two-byte dtype it is held in: exact in float32, rounded in float16."""
    import torch

    bits = torch.from_numpy(np.array(stored).view(np.uint16))  # a copy: torch wants memory that it may write
    return bits.view(torch.bfloat16).to(dtype)
