"""Hooks that show what each op of transformers' GptOssDecoderLayer puts out, without taking part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EXPERT_PARTS = ("experts.gate_up", "experts.activation", "experts.down")
"""Inside one expert: W1 x + b1, what SwiGLU makes of it, W2 h + b2."""

_OUTPUTS = {
    "input_layernorm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "experts": "mlp.experts",
}

See = Callable[[str, "torch.Tensor"], None]


def watch_router(layer: torch.nn.Module, see: See) -> None:
    """Calls see("router", logits [B * S, E]) whenever the layer runs."""
    # GptOssTopKRouter returns (logits, scores, indices).
    layer.get_submodule("mlp.router").register_forward_hook(lambda _m, _a, output: see("router", output[0]))


def watch_ops(layer: torch.nn.Module, see: See) -> None:
    """Calls see(name, value) for every op of OPS as it ends, and for `hidden` and `residual`, the streams that
    enter the layer and its second half. Values are [B, S, width] or [B * S, width], and must not be changed.
    """
    layer.register_forward_pre_hook(lambda _m, args: see("hidden", args[0]))
    layer.get_submodule("post_attention_layernorm").register_forward_pre_hook(lambda _m, a: see("residual", a[0]))
    layer.get_submodule("self_attn.o_proj").register_forward_pre_hook(lambda _m, args: see("attention", args[0]))
    watch_router(layer, see)
    for name, path in _OUTPUTS.items():
        layer.get_submodule(path).register_forward_hook(_shows(name, see))


def _shows(name: str, see: See) -> Callable[[torch.nn.Module, Any, torch.Tensor], None]:
    return lambda _m, _a, output: see(name, output)


SeePart = Callable[[str, "torch.Tensor", "torch.Tensor"], None]


def watch_expert_parts(layer: torch.nn.Module, see: SeePart) -> None:
    """Calls see(name, value, rows) for every name of EXPERT_PARTS and every expert that runs: value [n, width] of
    the rows [n] int64 of [B * S] that chose it.

    GptOssExperts.forward has no modules inside, so its biases, while it runs, are stand-ins that answer an
    addition with the same addition, and its method for SwiGLU is wrapped. The layer's parameters must be there
    when it runs: `stream_layer` comes first.
    """
    experts: Any = layer.get_submodule("mlp.experts")
    watch = _ExpertWatch(see)
    swiglu = experts._apply_gate

    def watched_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
        return watch.seen("experts.activation", swiglu(gate_up))

    def enter(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        watch.chosen = args[1]
        for name, part in _BIASES.items():
            watch.biases[part] = getattr(module, name)
            delattr(module, name)
            setattr(module, name, _WatchedBias(watch, part))

    def leave(module: torch.nn.Module, *_: object) -> None:
        for name, part in _BIASES.items():
            delattr(module, name)
            setattr(module, name, watch.biases.pop(part))

    experts._apply_gate = watched_swiglu
    experts.register_forward_pre_hook(enter)
    experts.register_forward_hook(leave)


_BIASES = {"gate_up_proj_bias": "experts.gate_up", "down_proj_bias": "experts.down"}


class _ExpertWatch:
    """What is known while the experts of one layer run: the real biases, the choices [B * S, K], whose turn it is."""

    def __init__(self, see: SeePart) -> None:
        self._see = see
        self.biases: dict[str, torch.Tensor] = {}
        self.chosen: torch.Tensor
        self.expert = 0

    def seen(self, part: str, value: torch.Tensor) -> torch.Tensor:
        import torch

        # As GptOssExperts.forward orders an expert's rows: by place among the choices, then by token.
        _, rows = torch.where((self.chosen == self.expert).T)
        self._see(part, value, rows)
        return value


class _WatchedBias:
    """Stands in for a bias [E, width], indexed by expert."""

    def __init__(self, watch: _ExpertWatch, part: str) -> None:
        self._watch, self._part = watch, part

    def __getitem__(self, expert: torch.Tensor) -> _WatchedAddend:
        self._watch.expert = int(expert)
        return _WatchedAddend(self._watch, self._part)


class _WatchedAddend:
    """One expert's bias: `x + addend` is x + bias, seen."""

    def __init__(self, watch: _ExpertWatch, part: str) -> None:
        self._watch, self._part = watch, part

    def __radd__(self, value: torch.Tensor) -> torch.Tensor:
        return self._watch.seen(self._part, value + self._watch.biases[self._part][self._watch.expert])
